"""Bottleneck adapters: AdapterHub's three layouts, its configs and its folders. `adapterhub_check.py` asks the library itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import muxcompile
from muxcompile import BottleneckConfig

from .peft_reference import (
    build,
    equal,
    examples,
    fill,
    llama,
    loss_and_gradients,
    peft_model,
    refused,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")
LAYOUTS = {
    "sequential": BottleneckConfig(),
    "both": BottleneckConfig(mh_adapter=True, original_ln_before=False, non_linearity="swish"),
    "parallel": BottleneckConfig(is_parallel=True, reduction_factor=2, scaling=4.0, init_weights="mam_adapter"),
    "wider than one product": BottleneckConfig(reduction_factor=0.05, non_linearity="sigmoid"),
}
OPTIONS = muxcompile.Options(chunk_tokens=256)


def compiled(backbone: Any, tasks: dict[str, Any]) -> Any:
    return muxcompile.compile(backbone, copy.deepcopy(tasks), OPTIONS)


def test_the_three_layouts_and_a_wide_bottleneck_have_the_gradients_of_plain_torch() -> None:
    backbone = llama()
    model = compiled(backbone, LAYOUTS)
    assert model.state.shape("wider than one product", "model.layers.1.output_adapters.adapter_up.weight") == (32, 639)
    weights = {name: fill(model, name, seed) for seed, name in enumerate(LAYOUTS)}
    batches = {name: examples(seed, (9, 30)) for seed, name in enumerate(LAYOUTS)}
    result = model.forward_backward(batches)
    for name, config in LAYOUTS.items():
        loss, gradients = loss_and_gradients(peft_model(backbone, config, weights[name]), batches[name])
        wrong = wrong_loss(float(result.losses[name]), loss) + wrong_gradients(model.gradients(name), gradients)
        assert not wrong, (name, wrong)


def test_a_newcomer_and_one_who_leaves_change_no_bit_of_the_others() -> None:
    backbone = llama()
    alone, model = (compiled(backbone, {"stays": LAYOUTS["both"], **more}) for more in ({}, {"leaves": LAYOUTS["both"]}))
    for step in range(3):
        given = {"stays": examples(step, (7, 21))}
        others = [name for name in model.tasks if name != "stays"]
        alone.step(given)
        model.step({**given, **{name: examples(50 + step, (5,)) for name in others}})
        if step == 0:
            model.remove_task("leaves")
            model.add_task(muxcompile.Task("comes", copy.deepcopy(LAYOUTS["both"])))
            model.add_task(muxcompile.Task("comes too", copy.deepcopy(LAYOUTS["sequential"])))
    assert equal(alone.state_dict("stays"), model.state_dict("stays"))


def test_padded_rows_stay_out_of_gradients_and_norms() -> None:
    """sigmoid(0) is not 0: the padding of the second table gets a gradient, which must be nobody's."""
    backbone = llama()
    config = BottleneckConfig(reduction_factor=10, non_linearity="sigmoid")
    model = compiled(backbone, {"padded": config})
    weights = fill(model, "padded")
    given = examples(3, (17,))
    norm = model.step({"padded": given}).grad_norms["padded"]
    _, gradients = loss_and_gradients(peft_model(backbone, config, weights), given)
    want = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(float(want), rel=1e-5)


def test_adapterhubs_own_objects_and_dicts_are_taken() -> None:
    fields: dict[str, Any] = {
        "mh_adapter": False,
        "output_adapter": True,
        "reduction_factor": 4,
        "non_linearity": "relu",
        "is_parallel": True,
    }
    model = compiled(llama(), {"object": SimpleNamespace(**fields), "dict": fields, "ours": BottleneckConfig(**fields)})
    shapes = [{key: value.shape for key, value in model.state_dict(name).items()} for name in model.tasks]
    assert shapes[0] == shapes[1] == shapes[2]
    refused(lambda: compiled(llama(), {"eve": {**fields, "depth": 2}}), "'eve'", "'depth' is no field")


def test_layers_that_are_left_out_have_no_adapter_and_each_layer_its_own_size() -> None:
    factors: dict[Any, float] = {2: 4, "default": 8}
    model = compiled(llama(num_hidden_layers=3), {"a": BottleneckConfig(leave_out=[1], reduction_factor=factors)})
    sizes = {key: tuple(value.shape) for key, value in model.state_dict("a").items() if "down.0.weight" in key}
    assert sizes == {
        "model.layers.0.output_adapters.adapter_down.0.weight": (4, 32),
        "model.layers.2.output_adapters.adapter_down.0.weight": (8, 32),
    }


def test_a_folder_is_adapterhubs_and_its_task_may_be_called_otherwise(tmp_path: Path) -> None:
    backbone = llama()
    model = compiled(backbone, {"v1.0": LAYOUTS["sequential"], "double": LAYOUTS["both"]})
    start = fill(model, "v1.0")
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in (tmp_path / "v1.0").iterdir()) == ["adapter_config.json", "pytorch_adapter.bin"]
    given = json.loads((tmp_path / "v1.0" / "adapter_config.json").read_text())
    assert (given["name"], given["model_type"], given["model_class"], given["hidden_size"]) == (
        "v1_0",
        "llama",
        "LlamaForCausalLM",
        32,
    )
    assert given["version"] == "adapters.1.3.0"
    assert given["config"]["non_linearity"] == "relu"
    assert "peft_type" not in given["config"]
    tensors = torch.load(tmp_path / "v1.0" / "pytorch_adapter.bin")
    assert "model.layers.0.output_adapters.adapters.v1_0.adapter_down.0.weight" in tensors
    # A module cannot be called "double".
    assert json.loads((tmp_path / "double" / "adapter_config.json").read_text())["name"] == "double_"
    back = compiled(backbone, {"other": str(tmp_path / "v1.0")})
    assert equal(back.state_dict("other"), start)
    # The library writes safetensors when it is asked to.
    save_file(tensors, tmp_path / "v1.0" / "adapter.safetensors")
    (tmp_path / "v1.0" / "pytorch_adapter.bin").unlink()
    assert equal(compiled(backbone, {"other": str(tmp_path / "v1.0")}).state_dict("other"), start)


def test_an_artifact_saves_the_same_folder(tmp_path: Path) -> None:
    backbone = llama()
    model = compiled(backbone, {"a": LAYOUTS["sequential"]})
    model.save_artifact(tmp_path / "artifact")
    model.save_pretrained(tmp_path / "compiled")
    muxcompile.load_artifact(tmp_path / "artifact", backbone).save_pretrained(tmp_path / "loaded")
    one, other = (torch.load(tmp_path / folder / "a" / "pytorch_adapter.bin") for folder in ("compiled", "loaded"))
    assert equal(one, other)
    texts = [(tmp_path / folder / "a" / "adapter_config.json").read_text() for folder in ("compiled", "loaded")]
    assert texts[0] == texts[1]


BROKEN: dict[str, tuple[Any, str]] = {
    "no tensors": (lambda folder: (folder / "pytorch_adapter.bin").unlink(), "holds neither pytorch_adapter.bin nor"),
    "a torn file": (lambda folder: (folder / "pytorch_adapter.bin").write_bytes(b"PK"), "pytorch_adapter.bin cannot be read"),
    "another adapter's": (
        lambda folder: torch.save({"model.layers.0.output_adapters.adapters.b.x": torch.ones(1)}, folder / "pytorch_adapter.bin"),
        "is none of the adapter 'a'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_by_name(what: str, tmp_path: Path) -> None:
    compiled(llama(), {"a": LAYOUTS["sequential"]}).save_pretrained(tmp_path)
    spoil, pattern = BROKEN[what]
    spoil(tmp_path / "a")
    refused(lambda: compiled(llama(), {"eve": str(tmp_path / "a")}), "'eve'", pattern)


REFUSED: dict[str, Any] = {
    "original_ln_after": False,
    "ln_before": True,
    "ln_after": True,
    "init_weights": "houlsby",
    "init_weights_seed": 0,
    "use_gating": True,
    "residual_before_ln": "post_add",
    "adapter_residual_before_ln": True,
    "inv_adapter": "nice",
    "cross_adapter": True,
    "dropout": 1.0,
    "phm_layer": True,
    "stochastic_depth": 0.1,
    "scaling": "learned",
    "non_linearity": "prelu",
    "leave_out": [2],
    "reduction_factor": 0,
    "is_parallel": "yes",
    "output_adapter": False,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_its_field(field: str) -> None:
    refused(lambda: compiled(llama(), {"eve": BottleneckConfig(**{field: REFUSED[field]})}), "'eve'", field)


def test_a_residual_that_is_added_twice_is_refused_where_it_would_be() -> None:
    refused(lambda: compiled(llama(), {"eve": BottleneckConfig(residual_before_ln=False)}), "'eve'", "residual_before_ln")
    compiled(llama(), {"eve": BottleneckConfig(residual_before_ln=False, original_ln_before=False)})


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, tuple[Any, str]] = {
    "another family": (lambda: build("GPTNeoX", **SHAPE), "does not know the layers of GPTNeoXForCausalLM"),
    "a norm before the residual": (
        lambda: build("Gemma2", **SHAPE, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=None),
        r"'model.layers.0.mlp.down_proj' is not simply added",
    ),
    "attention beside the feed-forward": (
        lambda: build("Cohere", **SHAPE, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        r"'model.layers.0.mlp.down_proj' is not simply added",
    ),
    "norms behind": (
        lambda: build(
            "OPT", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=64, do_layer_norm_before=False, dropout=0.0,
        ),
        "do_layer_norm_before=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_backbone_with_other_layers_is_refused_by_name(what: str) -> None:
    make, pattern = OTHERS[what]
    refused(lambda: compiled(make(), {"eve": BottleneckConfig()}), "'eve'", pattern)

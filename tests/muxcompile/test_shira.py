"""SHiRA: the places are PEFT's, or a mask's of the user's own; they are kept, saved and never trained."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import muxcompile

from .peft_reference import build, equal, everything, examples, llama, logits_of, peft_model, refused, shake

pytestmark = pytest.mark.usefixtures("one_capture")
TARGETS = ["q_proj", "down_proj"]
OPTIONS = muxcompile.Options(chunk_tokens=128)
KEY = "base_model.model.model.layers.0.self_attn.q_proj.shira_indices"


def shira(**fields: Any) -> ShiraConfig:
    mask_fn = fields.pop("mask_fn", None)
    config = ShiraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": TARGETS, **fields})
    if mask_fn is not None:
        config.mask_fn = mask_fn
    return config


def largest(layer: Any, r: int, **given: Any) -> Tensor:
    """The paper's mask by magnitude."""
    weight = layer.weight.detach()
    chosen = weight.abs().flatten().topk(r * sum(weight.shape)).indices
    return torch.zeros(weight.numel()).scatter_(0, chosen, 1.0).view(weight.shape)


def compiled(tasks: dict[str, Any], backbone: nn.Module | None = None) -> Any:
    return muxcompile.compile(backbone or llama(), copy.deepcopy(tasks), OPTIONS)


CONFIGS = {
    "without a seed": shira(),
    "with a seed": shira(random_seed=5, r=3),
    "its own mask": shira(mask_type="magnitude", mask_fn=largest),
    "its own mask, by the name of the random one": shira(mask_fn=largest, random_seed=1),
}


def test_a_fresh_adapter_has_pefts_places_and_values() -> None:
    model = compiled(CONFIGS)
    for name, config in CONFIGS.items():
        peer = peft_model(llama(), config)
        theirs = {**dict(peer.named_parameters()), **indices(peer)}
        for key, value in model.state_dict(name).items():
            assert torch.equal(value, theirs[f"{key}.default"]), key
            assert value.dtype == theirs[f"{key}.default"].dtype


def indices(model: Any) -> dict[str, Tensor]:
    found = {name: module.shira_indices for name, module in model.named_modules() if hasattr(module, "shira_indices")}
    return {f"{name}.shira_indices.{own}": value for name, held in found.items() for own, value in held.items()}


def test_values_that_do_not_begin_with_zero_follow_from_the_tasks_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    config = shira(init_weights=False, mask_type="drawn", mask_fn=drawn)
    one, other = compiled({"a": config, "b": config}), compiled({"a": config})
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one.state_dict("a"), other.state_dict("a"))
    values = [value for key, value in one.state_dict("a").items() if key.endswith("shira_weight")]
    assert 0.8 < float(torch.cat(values).std()) < 1.2


def drawn(layer: Any, r: int) -> Tensor:
    """A mask of the global generator."""
    shape = layer.weight.shape
    return torch.zeros(shape.numel()).scatter_(0, torch.randperm(shape.numel())[: r * sum(shape)], 1.0).view(shape)


def test_a_folder_of_a_mask_of_ones_own_is_read_without_its_function(tmp_path: Path) -> None:
    backbone = llama()
    model = compiled({"a": CONFIGS["its own mask"]}, backbone)
    weights = shake(model, "a")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mask_type"] == "magnitude"
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")[KEY].dtype == torch.int32
    assert equal(compiled({"a": str(tmp_path / "a")}, backbone).state_dict("a"), weights)
    read = PeftModel.from_pretrained(copy.deepcopy(backbone), str(tmp_path / "a"))
    ids = examples(1, (9,))[0]["input_ids"]
    theirs = logits_of(peft_model(backbone, CONFIGS["its own mask"], weights), ids)
    assert torch.equal(logits_of(read, ids), theirs)
    assert not torch.equal(logits_of(backbone, ids), theirs)


def test_a_live_model_of_peft_goes_on_with_its_own_places() -> None:
    with torch.random.fork_rng():
        peer = get_peft_model(llama(), shira(random_seed=9, init_weights=False))
    model = muxcompile.compile(peer, options=OPTIONS)
    held = {**dict(peer.named_parameters()), **indices(peer)}
    assert all(torch.equal(value, held[f"{key}.default"]) for key, value in model.state_dict("default").items())


def test_a_checkpoint_and_an_artifact_hold_the_places(tmp_path: Path) -> None:
    tasks = {"a": CONFIGS["with a seed"], "b": CONFIGS["its own mask"], "c": LoraConfig(r=2, target_modules=["q_proj"])}
    given = {name: examples(seed, (9, 14)) for seed, name in enumerate(tasks)}
    whole = compiled(tasks)
    for _ in range(2):
        whole.step(given)
    whole.save_checkpoint(tmp_path / "checkpoint")
    whole.save_artifact(tmp_path / "artifact")
    # Fresh ones have other places: what the checkpoint holds counts.
    second = compiled({**tasks, "a": shira(random_seed=6, r=3)})
    second.load_checkpoint(tmp_path / "checkpoint")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", llama())
    for model in (whole, second, loaded):
        for _ in range(2):
            model.step(given)
    for model in (second, loaded):
        assert all(equal(model.state_dict(name), whole.state_dict(name)) for name in tasks)


def test_a_newcomer_and_one_who_leaves_change_no_bit_of_the_others() -> None:
    alone, model = compiled({"stays": shira()}), compiled({"leaves": shira(random_seed=1), "stays": shira()})
    weights = shake(alone, "stays")
    shake(model, "stays")
    for step in range(4):
        given = {"stays": examples(step, (7, 21))}
        others = [name for name in model.tasks if name != "stays"]
        alone.step(given)
        model.step({**given, **{name: examples(50 + step, (5,)) for name in others}})
        if step == 0:
            model.remove_task("leaves")
        if step == 1:
            for name in ("takes its slot", "makes the table grow", "has another size"):
                model.add_task(muxcompile.Task(name, shira(r=3 if "size" in name else 2, random_seed=2)))
    assert equal(everything(alone)["stays"], everything(model, ["stays"])["stays"])
    after = model.state_dict("stays")
    for key, value in weights.items():
        assert torch.equal(value, after[key]) == key.endswith("shira_indices"), key
    fresh = compiled({"takes its slot": shira(random_seed=2)}).state_dict("takes its slot")
    assert torch.equal(model.state_dict("takes its slot")[KEY], fresh[KEY])


def test_what_is_not_finite_in_one_task_reaches_no_other() -> None:
    models = [compiled({"sick": shira(random_seed=1), "well": shira()}) for _ in range(2)]
    given = {"sick": examples(1, (9,)), "well": examples(2, (12,))}
    for index, model in enumerate(models):
        shake(model, "well")
        key = KEY.replace("indices", "weight")
        if index:
            model.state.write("sick", key, torch.full(model.state.shape("sick", key), torch.nan))
    results = [model.step(given) for model in models]
    assert torch.equal(results[0].losses["well"], results[1].losses["well"])
    assert equal(models[0].state_dict("well"), models[1].state_dict("well"))
    assert list(results[1].quarantined) == ["sick"]


def test_the_plan_says_what_a_dense_delta_costs() -> None:
    text = compiled({"a": shira()}).plan.text()
    assert "sparse matrices of 128 values at model.layers.0.self_attn.q_proj (2 places): [32, 32], dense for one of 1 slots" in text


def wrong(mask: Any) -> Any:
    return lambda layer, r: mask(layer.weight)


REFUSED: dict[str, tuple[ShiraConfig, str]] = {
    "no function": (shira(mask_type="magnitude"), "mask_type='magnitude' needs a function of yours: set config.mask_fn"),
    "another shape": (shira(mask_type="m", mask_fn=wrong(lambda w: torch.ones(3))), r"mask_fn must return a mask \(32, 32\)"),
    "too few": (
        shira(mask_type="m", mask_fn=wrong(torch.zeros_like)),
        r"mask_fn must return a mask of 128 ones, r \(K \+ N\), not 0",
    ),
    "no rank": (shira(r=0), "r=0 must be a positive integer"),
    "a rank that is no number": (shira(r=True), "r=True must be a positive integer"),
    "more than there is": (shira(r=17), "r=17 asks for 1088 values at 'model.layers.0.self_attn.q_proj', which has 1024"),
    "a module beside": (shira(modules_to_save=["norm"]), "modules_to_save"),
    "a misspelt module": (shira(target_modules=["q_proj", "down_porj"]), "names 'down_porj', .* the closest is 'down_proj'"),
    "a norm": (shira(target_modules=["input_layernorm"]), "target_modules=.*not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str) -> None:
    config, pattern = REFUSED[what]
    refused(lambda: muxcompile.compile(llama(), {"eve": copy.deepcopy(config)}), "'eve'", pattern)


def test_what_peft_refuses_is_refused() -> None:
    """Conv1D, which GPT-2 is made of, whatever `fan_in_fan_out` says."""
    gpt2 = build("GPT2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    config = shira(target_modules=["c_attn"], fan_in_fan_out=True)
    refused(lambda: muxcompile.compile(gpt2, {"eve": config}), "'eve'", "target_modules", "Conv1D")


FAULTS = {
    "a place twice": (lambda places: places.index_copy(1, torch.tensor([1]), places[:, :1]), "has a place twice"),
    "a place outside": (lambda places: places + 20, r"has places outside of \[32, 32\]"),
    "a negative place": (lambda places: places - 5, r"has places outside of \[32, 32\]"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_places_of_a_file_that_cannot_be_are_refused(what: str, tmp_path: Path) -> None:
    change, pattern = FAULTS[what]
    model = compiled({"eve": shira()})
    model.save_pretrained(tmp_path)
    file = tmp_path / "eve" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, KEY: change(tensors[KEY]).contiguous()}, file, metadata={"format": "pt"})
    refused(lambda: compiled({"eve": str(tmp_path / "eve")}), "'eve'", pattern)


def test_fan_in_fan_out_is_pefts_to_correct() -> None:
    """PEFT takes a linear for what it is, with a warning."""
    model = compiled({"a": shira(fan_in_fan_out=True), "b": shira()})
    own = {key.rpartition(".")[0]: value for key, value in model.state_dict("a").items()}
    assert equal(own, {key.rpartition(".")[0]: value for key, value in model.state_dict("b").items()})
    assert dataclasses.asdict(peft_model(llama(), shira(fan_in_fan_out=True)).peft_config["default"])["fan_in_fan_out"] is False

"""Dropout: the formulas of PEFT and AdapterHub under our masks, drawn again from counters wherever they are needed."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor, nn

import muxcompile
from codegen import reference
from passes.linears import site_key

from .peft_reference import (
    build,
    equal,
    examples,
    fill,
    llama,
    loss_and_gradients,
    peft_model,
    shake,
    trainable,
    wrong_after_adamw,
    wrong_after_sgd,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")
SEED = 7
ADAPTERS = {
    "alice": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3),
    "bob": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    "carol": LoraConfig(r=20, target_modules=["q_proj", "k_proj", "up_proj"], lora_dropout=0.6),
    "dave": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.4, use_dora=True),
    "erin": LoraConfig(r=9, target_modules=["k_proj", "v_proj", "down_proj"], lora_dropout=0.2, use_dora=True),
    "frank": LoraConfig(r=3, target_modules=["v_proj", "up_proj"], use_dora=True),
    "greg": LoraConfig(r=3, target_modules=["lm_head", "q_proj"], lora_dropout=0.3),
    "hana": LoraConfig(r=3, target_modules=["lm_head", "v_proj"], lora_dropout=0.4, use_dora=True),
    "gina": VeraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"], vera_dropout=0.4),
    "hugo": muxcompile.BottleneckConfig(mh_adapter=True, reduction_factor=4, non_linearity="swish", scaling=0.7, dropout=0.5),
    "ines": muxcompile.BottleneckConfig(is_parallel=True, reduction_factor=2, non_linearity="tanh", dropout=0.2),
    "jack": muxcompile.BottleneckConfig(is_parallel=True, reduction_factor=2, non_linearity="tanh"),
}
FIELDS = {"LORA": "lora_dropout", "VERA": "vera_dropout", "BOTTLENECK": "dropout"}
# Every sequence has labels: the reference leaves out one that has none, and would count the next by another number.
LENGTHS = {
    "alice": (7, 9, 19),
    "bob": (33, 12),
    "carol": (12, 15, 17),
    "dave": (21, 8),
    "erin": (5, 30),
    "frank": (16,),
    "greg": (6, 17),
    "hana": (13, 9),
    "gina": (21, 5),
    "hugo": (9, 30),
    "ines": (11, 14),
    "jack": (8,),
}


@functools.cache
def backbone() -> Any:
    return llama()


def batches() -> dict[str, Any]:
    return {name: examples(index, lengths) for index, (name, lengths) in enumerate(LENGTHS.items())}


def compiled(names: Any = ADAPTERS, **options: Any) -> Any:
    tasks = [muxcompile.Task(name, ADAPTERS[name], max_length=40, seed=SEED, learning_rate=1e-2) for name in names]
    return muxcompile.compile(backbone(), tasks, muxcompile.Options(**{"chunk_tokens": 64, **options}))


class Mask(nn.Module):
    """In the place of PEFT's dropout: the mask of the task's call number `draw`, for one sequence after another."""

    def __init__(self, task: str, site: str, probability: float, draw: int) -> None:
        super().__init__()
        digest = hashlib.sha256(f"{SEED}\0{task}\0dropout\0{draw}".encode()).digest()
        words = [int.from_bytes(digest[start : start + 4], "little", signed=True) for start in (0, 4)]
        threshold = round(probability * 2**32)
        self.keys = torch.tensor([[*words, threshold - 2**32 if threshold >= 2**31 else threshold]], dtype=torch.int32)
        self.site = torch.tensor([site_key(site), 0], dtype=torch.int32)
        self.sequence = 0

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        sequences = torch.full((length,), self.sequence, dtype=torch.int32)
        self.sequence += 1
        positions = torch.arange(length, dtype=torch.int32)
        route = torch.zeros(1, dtype=torch.int32)
        return x * reference.dropout_factor(self.keys, self.site, route, sequences, positions, x.shape[-1])


def masked(model: Any, task: str, draw: int = 0) -> Any:
    """The reference of one task with our masks; modules that do not drop stay as they are."""
    config = model.peft_config["default"] if hasattr(model, "peft_config") else ADAPTERS[task]
    field = FIELDS[getattr(config.peft_type, "value", config.peft_type)]
    probability = getattr(config, field)
    for name, module in model.named_modules():
        mask = Mask(task, name.removeprefix("base_model.model."), probability, draw)
        held = getattr(module, field, None)
        if probability and isinstance(held, nn.ModuleDict):
            held["default"] = mask
        elif probability and isinstance(held, nn.Dropout):
            module.dropout = mask
    return model


@pytest.mark.parametrize(
    "options", [{}, {"skip_passes": ("fuse",)}, {"chunk_tokens": 16}], ids=["fused", "not fused", "sequences cut in up to three"]
)
def test_a_mixed_step_with_dropout_equals_peft_under_the_same_masks(options: dict[str, Any]) -> None:
    model = compiled(**options)
    assert bool(model._build.groups[0].carried) == ("chunk_tokens" in options)
    weights = {name: shake(model, name, seed=index) for index, name in enumerate(ADAPTERS)}
    given = batches()
    for draw in range(2):
        result = model.forward_backward(given)
        for name, config in ADAPTERS.items():
            peer = masked(peft_model(backbone(), config, weights[name]), name, draw)
            loss, gradients = loss_and_gradients(peer, given[name])
            assert not wrong_loss(float(result.losses[name]), loss), name
            assert not wrong_gradients(model.gradients(name), gradients), name
            model.state.clear_gradients(name)


@pytest.mark.parametrize("name", ["alice", "dave", "gina", "hugo", "ines"])
def test_the_check_fails_under_the_masks_of_another_call(name: str) -> None:
    model = compiled([name])
    weights = fill(model, name)
    given = batches()[name]
    model.forward_backward({name: given})
    _, gradients = loss_and_gradients(masked(peft_model(backbone(), ADAPTERS[name], weights), name, 1), given)
    assert wrong_gradients(model.gradients(name), gradients)


@pytest.mark.parametrize("name", ["alice", "dave", "gina", "hugo", "ines"])
def test_evaluation_drops_nothing_and_draws_nothing(name: str) -> None:
    model = compiled([name])
    weights = fill(model, name)
    given = {name: batches()[name]}
    first, second = model.evaluate(given), model.evaluate(given)
    assert torch.equal(first.losses[name], second.losses[name])
    # Where nothing is trained, PEFT drops nothing.
    loss, _ = loss_and_gradients(peft_model(backbone(), ADAPTERS[name], weights).eval(), given[name])
    assert not wrong_loss(float(first.losses[name]), loss)
    assert model.state.tasks[name].draws == 0


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {
    "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (lambda: build("GPT2", 6, **GPT2), {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "opt": (lambda: build("OPT", 7, **OPT), {"target_modules": ["q_proj", "fc2"], "use_rslora": True}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dora_with_dropout_trains_as_peft_does_under_the_same_masks(family: str, optimizer: str) -> None:
    make, fields = FAMILIES[family]
    config, rate, steps = LoraConfig(r=4, lora_dropout=0.3, use_dora=True, **fields), {"sgd": 0.05, "adamw": 1e-3}[optimizer], 5
    tasks = [
        muxcompile.Task("dave", config, seed=SEED, optimizer=optimizer, learning_rate=rate, weight_decay=0.01),
        muxcompile.Task("beside", LoraConfig(r=4, **fields)),
    ]
    model = muxcompile.compile(make(), tasks, muxcompile.Options(chunk_tokens=96))
    peer = peft_model(make(), config, shake(model, "dave"))
    own = trainable(peer)
    kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    torchs = kind(own.values(), lr=rate, weight_decay=0.01)
    gradients = []
    for step in range(steps):
        given = examples(step, (9, 14))
        result = model.forward_backward({"dave": given, "beside": examples(50 + step, (12,))})
        loss, seen = loss_and_gradients(masked(peer, "dave", step), given)
        if not step:
            assert not wrong_loss(float(result.losses["dave"]), loss) + wrong_gradients(model.gradients("dave"), seen)
        gradients.append(seen)
        model.optim_step(["dave", "beside"])
        torchs.step()
    after = {key: value.detach() for key, value in own.items()}
    if optimizer == "sgd":
        assert not wrong_after_sgd(model.state_dict("dave"), after)
    else:
        found, left_out = wrong_after_adamw(model.state_dict("dave"), after, gradients, rate)
        assert not found
        assert left_out < 0.1


def test_the_plan_says_that_there_is_a_second_product_and_what_it_costs() -> None:
    notes = [note for note in compiled().plan.notes if "second product" in note]
    assert [note.split(":")[0] for note in notes] == ["task 'dave'", "task 'erin'", "task 'hana'"]
    # Two layers; q_proj [32, 32], v_proj [32, 16], down_proj [48, 32]: 3072 multiply-adds a token.
    assert f"at 6 places, {2 * 64 * 2 * 3072:.3g} FLOPs a chunk" in notes[0]


def test_what_a_task_drops_before_a_product_changes_no_bit_of_another_and_holds_no_fault_of_it() -> None:
    """bob stands in blocks that go through the second product and come out of it as zeros, NaN or not."""
    given = batches()
    alone, beside = compiled(["bob"]), compiled(["dave", "bob", "erin"])
    for model in (alone, beside):
        shake(model, "bob")
        model.step({name: given[name] for name in model.tasks})
    assert equal(alone.state_dict("bob"), beside.state_dict("bob"))
    key = next(iter(beside.state_dict("bob")))
    beside.state.write("bob", key, torch.full_like(beside.state_dict("bob")[key], math.inf))
    fresh = compiled(["dave"])
    fresh.step({"dave": given["dave"]})
    for model in (fresh, beside):
        result = model.step({name: given[name] for name in model.tasks})
    assert set(result.quarantined) == {"bob"}
    assert equal(beside.state_dict("dave"), fresh.state_dict("dave"))


def test_masks_do_not_depend_on_neighbours_or_on_the_global_generator() -> None:
    together = compiled()
    given = batches()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        result = together.step(given)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ADAPTERS:
        torch.manual_seed(1)
        alone = compiled([name])
        for _ in range(2):
            single = alone.step({name: given[name]})
        assert torch.equal(single.losses[name], result.losses[name])
        assert equal(alone.state_dict(name), together.state_dict(name))


def test_a_resumed_run_draws_the_masks_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first = compiled(), compiled()
    given = batches()
    for _ in range(2):
        whole.step(given)
    first.step(given)
    first.save_checkpoint(tmp_path / "checkpoint")
    second = compiled()
    second.load_checkpoint(tmp_path / "checkpoint")
    second.step(given)
    for name in ADAPTERS:
        assert equal(second.state_dict(name), whole.state_dict(name))


def test_an_artifact_drops_what_the_compiled_model_drops(tmp_path: Path) -> None:
    model = compiled()
    model.step(batches())
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone())
    for own in (model, loaded):
        own.step(batches())
    for name in ADAPTERS:
        assert equal(loaded.state_dict(name), model.state_dict(name))


def test_a_task_moves_to_other_tables_with_what_it_drops() -> None:
    alone, joined = compiled(["dave"]), compiled(["dave"])
    given = batches()
    for model in (alone, joined):
        shake(model, "dave")
        model.step({"dave": given["dave"]})
    for name in ("erin", "alice"):
        joined.add_task(muxcompile.Task(name, ADAPTERS[name], seed=SEED, learning_rate=1e-2))
    joined.forward_backward({name: given[name] for name in joined.tasks})
    joined.remove_task("alice")
    alone.forward_backward({"dave": given["dave"]})
    assert equal(alone.gradients("dave"), joined.gradients("dave"))
    for model in (alone, joined):
        model.optim_step("dave")
        model.step({"dave": given["dave"]})
    assert equal(alone.state_dict("dave"), joined.state_dict("dave"))


@pytest.mark.parametrize("probability", [1.0, -0.1, True, "0.1"])
def test_a_dropout_outside_its_range_is_refused(probability: Any) -> None:
    with pytest.raises(ValueError, match=r"task 'a': lora_dropout=.* must be at least 0 and below 1"):
        muxcompile.compile(backbone(), {"a": LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=probability)})
    with pytest.raises(ValueError, match=r"task 'a': vera_dropout=.* must be"):
        muxcompile.compile(backbone(), {"a": VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=probability)})
    with pytest.raises(ValueError, match=r"task 'a': dropout=.* must be"):
        muxcompile.compile(backbone(), {"a": muxcompile.BottleneckConfig(dropout=probability)})

"""Dropout: the formulas of PEFT and AdapterHub under our masks, drawn again from counters wherever they are needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor, nn

import muxcompile
from codegen import reference
from passes.linears import site_key

from .peft_reference import equal, examples, fill, llama, loss_and_gradients, peft_model, wrong_gradients, wrong_loss

SEED = 7
ADAPTERS = {
    "alice": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3),
    "bob": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    "carol": LoraConfig(r=20, target_modules=["q_proj", "k_proj", "up_proj"], lora_dropout=0.6),
    "dave": VeraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"], vera_dropout=0.4),
    "erin": muxcompile.BottleneckConfig(mh_adapter=True, reduction_factor=4, non_linearity="swish", scaling=0.7, dropout=0.5),
    "fay": muxcompile.BottleneckConfig(is_parallel=True, reduction_factor=2, non_linearity="tanh", dropout=0.2),
    "gus": muxcompile.BottleneckConfig(is_parallel=True, reduction_factor=2, non_linearity="tanh"),
}
FIELDS = {"LORA": "lora_dropout", "VERA": "vera_dropout", "BOTTLENECK": "dropout"}
# Every sequence has labels: the reference leaves out one that has none, and would count the next by another number.
LENGTHS = {
    "alice": (7, 9, 19),
    "bob": (33, 12),
    "carol": (12, 15, 17),
    "dave": (21, 5),
    "erin": (9, 30),
    "fay": (11, 14),
    "gus": (8,),
}


def batches() -> dict[str, Any]:
    return {name: examples(index, lengths) for index, (name, lengths) in enumerate(LENGTHS.items())}


def compiled(names: Any = ADAPTERS, **options: Any) -> Any:
    tasks = [muxcompile.Task(name, ADAPTERS[name], seed=SEED, learning_rate=1e-2) for name in names]
    return muxcompile.compile(llama(), tasks, muxcompile.Options(chunk_tokens=64, **options))


class Mask(nn.Module):
    """In the place of PEFT's dropout: the mask of the task's call number `draw`, for one sequence after another."""

    def __init__(self, task: str, site: str, probability: float, draw: int) -> None:
        super().__init__()
        digest = hashlib.sha256(f"{SEED}\0{task}\0dropout\0{draw}".encode()).digest()
        words = [int.from_bytes(digest[start : start + 4], "little", signed=True) for start in (0, 4)]
        threshold = round(probability * 2**32)
        self.keys = torch.tensor([[*words, threshold - 2**32 if threshold >= 2**31 else threshold]], dtype=torch.int32)
        self.site = torch.tensor(site_key(site), dtype=torch.int32)
        self.sequence = 0

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        sequences = torch.full((length,), self.sequence, dtype=torch.int32)
        self.sequence += 1
        positions = torch.arange(length, dtype=torch.int32)
        route = torch.zeros(1, dtype=torch.int32)
        return x * reference.dropout_factor(self.keys, self.site, route, sequences, positions, x.shape[2])


def masked(model: Any, task: str, draw: int = 0) -> Any:
    """The reference of one task with our masks; modules that do not drop stay as they are."""
    peft_type = ADAPTERS[task].peft_type
    field = FIELDS[getattr(peft_type, "value", peft_type)]
    probability = getattr(ADAPTERS[task], field)
    for name, module in model.named_modules():
        mask = Mask(task, name.removeprefix("base_model.model."), probability, draw)
        held = getattr(module, field, None)
        if probability and isinstance(held, nn.ModuleDict):
            held["default"] = mask
        elif probability and isinstance(held, nn.Dropout):
            module.dropout = mask
    return model


@pytest.mark.parametrize("skip", [(), ("fuse",)], ids=["fused", "not fused"])
def test_a_mixed_step_with_dropout_equals_peft_under_the_same_masks(skip: tuple[str, ...]) -> None:
    model = compiled(skip_passes=skip)
    weights = {name: fill(model, name, seed=index) for index, name in enumerate(ADAPTERS)}
    given = batches()
    for draw in range(2):
        result = model.forward_backward(given)
        for name, config in ADAPTERS.items():
            peer = masked(peft_model(llama(), config, weights[name]), name, draw)
            loss, gradients = loss_and_gradients(peer, given[name])
            assert not wrong_loss(float(result.losses[name]), loss), name
            assert not wrong_gradients(model.gradients(name), gradients), name
            model.state.clear_gradients(name)


@pytest.mark.parametrize("name", ["alice", "dave", "erin", "fay"])
def test_the_check_fails_under_the_masks_of_another_call(name: str) -> None:
    model = compiled([name])
    weights = fill(model, name)
    given = batches()[name]
    model.forward_backward({name: given})
    _, gradients = loss_and_gradients(masked(peft_model(llama(), ADAPTERS[name], weights), name, 1), given)
    assert wrong_gradients(model.gradients(name), gradients)


@pytest.mark.parametrize("name", ["alice", "dave", "erin", "fay"])
def test_evaluation_drops_nothing_and_draws_nothing(name: str) -> None:
    model = compiled([name])
    weights = fill(model, name)
    given = {name: batches()[name]}
    first, second = model.evaluate(given), model.evaluate(given)
    assert torch.equal(first.losses[name], second.losses[name])
    # Where nothing is trained, PEFT drops nothing.
    loss, _ = loss_and_gradients(peft_model(llama(), ADAPTERS[name], weights).eval(), given[name])
    assert not wrong_loss(float(first.losses[name]), loss)
    assert model.state.tasks[name].draws == 0


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
    for _ in range(4):
        whole.step(given)
    for _ in range(2):
        first.step(given)
    first.save_checkpoint(tmp_path / "checkpoint")
    second = compiled()
    second.load_checkpoint(tmp_path / "checkpoint")
    for _ in range(2):
        second.step(given)
    for name in ADAPTERS:
        assert equal(second.state_dict(name), whole.state_dict(name))


def test_an_artifact_drops_what_the_compiled_model_drops(tmp_path: Path) -> None:
    model = compiled()
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", llama())
    for own in (model, loaded):
        for _ in range(2):
            own.step(batches())
    for name in ADAPTERS:
        assert equal(loaded.state_dict(name), model.state_dict(name))


@pytest.mark.parametrize("probability", [1.0, -0.1, True, "0.1"])
def test_a_dropout_outside_its_range_is_refused(probability: Any) -> None:
    with pytest.raises(ValueError, match=r"task 'a': lora_dropout=.* must be at least 0 and below 1"):
        muxcompile.compile(llama(), {"a": LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=probability)})
    with pytest.raises(ValueError, match=r"task 'a': vera_dropout=.* must be"):
        muxcompile.compile(llama(), {"a": VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=probability)})
    with pytest.raises(ValueError, match=r"task 'a': dropout=.* must be"):
        muxcompile.compile(llama(), {"a": muxcompile.BottleneckConfig(dropout=probability)})

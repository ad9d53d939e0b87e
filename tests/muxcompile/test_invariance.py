"""At one chunk size a task's losses, gradients and adapter have the same bits whoever shares the run, comes or goes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor

import muxcompile
from muxcompile import driver
from runtime.pack import pack
from runtime.program import Kind

from .peft_reference import Example, Tensors, equal, examples, fill, llama

pytestmark = pytest.mark.usefixtures("one_capture")
STEPS = 3
# Twice what a bundle of sequences may hold: a tenant's bundles share a chunk or not, as the neighbours leave room.
CHUNK = muxcompile.Options(chunk_tokens=256)


@dataclass(frozen=True)
class Tenant:
    """What one tenant brings: its adapter, how it trains, and the lengths of each step's sequences."""

    adapter: LoraConfig
    lengths: tuple[int, ...]
    training: tuple[tuple[str, Any], ...] = ()


# Ranks in every bucket up to 64, sites that coincide, overlap and differ, both optimizers, clipping and schedules. "ann" has
# two bundles, which fit one chunk if it comes first; "hal" has three, more than a chunk holds.
TENANTS = {
    "ann": Tenant(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), (50, 33, 64, 20)),
    "ben": Tenant(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), (5, 30, 3), (("optimizer", "sgd"), ("momentum", 0.9))),
    "cid": Tenant(LoraConfig(r=20, target_modules=["k_proj", "o_proj"], use_rslora=True), (16,), (("max_grad_norm", 0.05),)),
    "dot": Tenant(LoraConfig(r=1, target_modules="all-linear"), (7, 7, 7, 7)),
    "eve": Tenant(LoraConfig(r=33, target_modules=["down_proj"]), (40, 2)),
    "fay": Tenant(LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"]), (1, 30), (("weight_decay", 0.1),)),
    "gus": Tenant(
        LoraConfig(r=16, target_modules=["gate_proj", "up_proj"]), (17, 15), (("lr_schedule", "linear"), ("total_steps", 9))
    ),
    "hal": Tenant(LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1]), (120, 120, 120)),
}


def data_of(name: str, step: int) -> list[Example]:
    return examples(50 * sum(map(ord, name)) + step, TENANTS[name].lengths)


def task_of(name: str) -> muxcompile.Task:
    tenant = TENANTS[name]
    return muxcompile.Task(name, tenant.adapter, **{"learning_rate": 1e-2, **dict(tenant.training)})


def start(model: Any, name: str) -> None:
    fill(model, name, seed=sum(map(ord, name)))


@functools.cache
def backbone() -> Any:
    return llama(31)


@dataclass(frozen=True)
class Record:
    """Everything that a tenant sees of a run, bit by bit."""

    losses: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    gradients: tuple[Tensors, ...]
    adapter: Tensors
    evaluated: Tensor

    def differences(self, other: Record) -> list[str]:
        found = [
            f"{what} of step {step}"
            for what in ("losses", "norms")
            for step in differing(getattr(self, what), getattr(other, what))
        ]
        for step, (own, its) in enumerate(zip(self.gradients, other.gradients, strict=True)):
            found += [f"gradient of {key} in step {step}" for key in own if not torch.equal(own[key], its[key])]
        found += [f"adapter {key}" for key in self.adapter if not torch.equal(self.adapter[key], other.adapter[key])]
        return found + ([] if torch.equal(self.evaluated, other.evaluated) else ["evaluated loss"])


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[int]:
    return [index for index, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)]


class Diary:
    """Takes steps of a model and keeps what each tenant sees; a tenant's own steps are counted, not the model's."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[str, list[tuple[Tensor, Tensor, Tensors]]] = {}

    def step(self, names: Sequence[str]) -> None:
        result = self.model.forward_backward({name: data_of(name, len(self.seen.get(name, []))) for name in names})
        gradients = {name: self.model.gradients(name) for name in names}
        norms = self.model.optim_step(names)
        for name in names:
            self.seen.setdefault(name, []).append((result.losses[name].clone(), norms[name].clone(), gradients[name]))

    def record(self, name: str) -> Record:
        losses, norms, gradients = zip(*self.seen[name], strict=True)
        evaluated = self.model.evaluate({name: data_of(name, 99)}).losses[name]
        return Record(losses, norms, gradients, self.model.state_dict(name), evaluated)


def run(names: Sequence[str]) -> dict[str, Record]:
    """Compile these tenants together and take three steps of all of them."""
    model = muxcompile.compile(backbone(), [task_of(name) for name in names], CHUNK)
    for name in names:
        start(model, name)
    diary = Diary(model)
    for _ in range(STEPS):
        diary.step(names)
    return {name: diary.record(name) for name in names}


def test_tasks_that_share_blocks_of_the_loss_have_the_bits_of_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ben", "cid", "fay", "gus"]
    spec = driver.head_spec
    blocks, found = [], []
    for shared in (True, False):
        monkeypatch.setattr(driver, "head_spec", lambda *given, own=shared, **_: spec(*given, shared=own))
        model = muxcompile.compile(backbone(), [task_of(name) for name in names], CHUNK)
        (group,) = model._build.groups
        assert group.head.shared is shared
        read = model._read({name: data_of(name, 0) for name in names})
        blocks.append(sum(len(chunk.rows) for chunk in pack(read, group.geometry, shared=shared)))
        found.append(run(names))
    assert blocks[0] < blocks[1]
    for name in names:
        assert not found[0][name].differences(found[1][name])


@pytest.mark.parametrize("steady", [True, False])
def test_tasks_share_blocks_of_the_loss_where_their_products_are_steady(steady: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def looked(*given: Any) -> bool:
        asked.append(given)
        return steady

    monkeypatch.setattr(driver, "steady", looked)
    model = muxcompile.compile(backbone(), [task_of("cid"), task_of("eve")], CHUNK)
    assert model._build.groups[0].head.shared is steady
    ((rows, tile, weight, *rest),) = asked
    assert (rows, tile, rest) == (64, 16, [torch.float32, torch.device("cpu")])
    assert weight is backbone().lm_head.weight
    loose = muxcompile.compile(backbone(), [task_of("cid")], muxcompile.Options(chunk_tokens=256, invariant=False))
    assert loose._build.groups[0].head.shared


def test_adapters_of_the_head_have_blocks_of_the_loss_to_themselves() -> None:
    for targets, shared in ((["q_proj"], True), (["q_proj", "lm_head"], False)):
        adapter = LoraConfig(r=2, target_modules=targets)
        model = muxcompile.compile(backbone(), {"one": adapter, "other": LoraConfig(r=2, target_modules=["q_proj"])}, CHUNK)
        assert model._build.groups[0].head.shared is shared


@functools.cache
def alone(name: str) -> Record:
    return run([name])[name]


def test_a_tenant_among_seven_others_has_the_bits_it_has_alone() -> None:
    together = run(list(TENANTS))
    for name, record in together.items():
        assert record.differences(alone(name)) == [], name
        assert all(gradient.any() for gradient in record.gradients[0].values()), name
    assert any(torch.is_tensor(norm) and float(norm) > 0.05 for norm in together["cid"].norms), "nothing was clipped"


def test_the_comparison_sees_a_single_bit() -> None:
    record = alone("ben")
    key = next(iter(record.adapter))
    other = {**record.adapter, key: record.adapter[key].clone()}
    other[key].view(torch.int32).view(-1)[0] ^= 1
    changed = Record(record.losses, record.norms, record.gradients, other, record.evaluated)
    assert record.differences(changed) == [f"adapter {key}"]


# Every example is compiled: a failure is reported as it was drawn, to shrink it would take minutes.
@settings(max_examples=max(1, settings().max_examples // 8), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(names=st.lists(st.sampled_from(sorted(TENANTS)), min_size=2, max_size=6, unique=True))
def test_any_set_of_co_tenants_in_any_order_leaves_every_tenant_its_bits(names: list[str]) -> None:
    for name, record in run(names).items():
        assert record.differences(alone(name)) == [], (name, names)


def chunks_of(model: Any, name: str) -> list[int]:
    return [action.micro for action in model.executed if action.kind is Kind.LOAD and name in action.tasks]


def test_tenants_that_pause_leave_the_others_their_bits() -> None:
    names = ["ann", "dot", "fay", "hal"]
    model = muxcompile.compile(backbone(), [task_of(name) for name in names], CHUNK)
    for name in names:
        start(model, name)
    diary, places = Diary(model), []
    for present in (["ann"], ["hal", "ann", "dot"], ["dot", "fay", "hal"], ["fay", "ann"], ["fay"], ["hal", "dot"]):
        diary.step(present)
        places.append({name: chunks_of(model, name) for name in present})
    for name in names:
        assert diary.record(name).differences(alone(name)) == [], name
    # The blocks of one step stood in one chunk or in two, as the neighbours left room.
    assert [place["ann"] for place in places if "ann" in place] == [[0], [1, 2], [0]]
    assert [place["hal"] for place in places if "hal" in place] == [[0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("reserve", [0, 2])
def test_tenants_that_come_and_go_leave_the_others_their_bits(reserve: int) -> None:
    model = muxcompile.compile(
        backbone(), [task_of("ann"), task_of("ben")], muxcompile.Options(chunk_tokens=256, reserve_slots=reserve)
    )
    for name in ("ann", "ben"):
        start(model, name)
    diary = Diary(model)
    diary.step(["ann", "ben"])
    compiled = set(model._compiler.templates.lowered)
    model.add_task(task_of("fay"))  # shares ben's rank bucket and sites
    assert (set(model._compiler.templates.lowered) == compiled) == (reserve > 0), (
        "a free slot is there so that nothing is compiled again"
    )
    start(model, "fay")
    diary.step(["fay", "ann", "ben"])
    model.remove_task("ann")
    diary.step(["ben", "fay"])
    records = {"ben": diary.record("ben")}
    model.remove_task("ben")
    model.add_task(task_of("dot"))  # may take ann's slots
    start(model, "dot")
    diary.step(["dot", "fay"])
    diary.step(["dot"])
    diary.step(["dot"])
    records |= {name: diary.record(name) for name in ("fay", "dot")}
    for name, record in records.items():
        assert record.differences(alone(name)) == [], name
    assert model.tasks == ("fay", "dot")


def test_a_neighbour_that_joins_between_forward_and_step_leaves_the_gradients_that_wait() -> None:
    model = muxcompile.compile(backbone(), [task_of("ben")], CHUNK)
    start(model, "ben")
    first = Diary(model)
    first.step(["ben"])
    result = model.forward_backward({"ben": data_of("ben", 1)})
    model.add_task(task_of("fay"))
    start(model, "fay")
    gradients = model.gradients("ben")
    model.step({"fay": data_of("fay", 0)})
    norms = model.optim_step("ben")
    first.seen["ben"].append((result.losses["ben"], norms["ben"], gradients))
    first.step(["fay", "ben"])
    assert first.record("ben").differences(alone("ben")) == []


def test_a_tenant_that_leaves_and_returns_starts_as_if_it_had_never_been_there() -> None:
    model = muxcompile.compile(backbone(), [task_of("ben"), task_of("hal")], CHUNK)
    fresh = model.state_dict("hal")
    start(model, "hal")
    model.step({"ben": data_of("ben", 0), "hal": data_of("hal", 0)})
    model.remove_task("hal")
    model.add_task(task_of("hal"))
    assert all(torch.equal(model.state_dict("hal")[key], value) for key, value in fresh.items())
    assert model.steps == {"ben": 1, "hal": 0}
    start(model, "hal")
    diary = Diary(model)
    for _ in range(STEPS):
        diary.step(["hal"])
    assert diary.record("hal").differences(alone("hal")) == []


def test_the_saved_files_of_a_tenant_are_equal_byte_for_byte(tmp_path: Path) -> None:
    saved = []
    for number, names in enumerate((["eve"], ["gus", "eve", "dot"])):
        model = muxcompile.compile(backbone(), [task_of(name) for name in names], CHUNK)
        for step in range(2):
            model.step({name: data_of(name, step) for name in names})
        model.save_pretrained(tmp_path / str(number))
        saved.append({path.name: path.read_bytes() for path in sorted((tmp_path / str(number) / "eve").iterdir())})
    assert saved[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert saved[0] == saved[1]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


def surrounded(around: Any) -> tuple[Tensors, Tensor]:
    """Compile and step inside: an encoder, a start that is drawn, and an optimizer with momentum."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights="orthogonal")
    task = muxcompile.Task("ann", adapter, optimizer="sgd", momentum=0.9, learning_rate=1e-2)
    model, data = llama(31), [{"ann": data_of("ann", step)} for step in range(3)]
    with around():
        made = muxcompile.compile(model, [task], CHUNK)
        losses = [made.step(batch).losses["ann"] for batch in data[:2]]
        return made.state_dict("ann"), torch.stack([*losses, made.evaluate(data[2]).losses["ann"]])


@functools.cache
def in_peace() -> tuple[Tensors, Tensor]:
    return surrounded(contextlib.nullcontext)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_a_script_sets_for_its_own_tensors_changes_no_bit(name: str) -> None:
    assert equal(surrounded(SURROUNDINGS[name]), in_peace())


def test_steps_inside_inference_mode_go_on_outside_of_it() -> None:
    model, again = (muxcompile.compile(llama(31), [task_of("ann")], CHUNK) for _ in range(2))
    for step in range(3):
        batch = {"ann": data_of("ann", step)}
        with torch.inference_mode() if step < 2 else contextlib.nullcontext():
            model.step(batch)
        again.step(batch)
    assert equal(model.state_dict("ann"), again.state_dict("ann"))

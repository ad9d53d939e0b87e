"""A survey at one size of chunk foretells another size, and any of the tasks; its bytes are those that the emitted text holds."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import muxcompile
from codegen import emit, spec
from codegen.lower import Target
from codegen.machine import PRESETS, machine
from passes.adapters import Adapter
from passes.cost import Cost, CostModel, Shape
from passes.loss import differentiate_head
from passes.partition import share
from passes.records import Phase
from passes.survey import Bodies, Survey, bodies, frozen, of_bodies, survey
from runtime.examples import Example
from runtime.pack import pack
from runtime.region import load_source
from tests.backbones import CPU, arguments, chunk_of, llama, resolved, run_bodies, state_of

pytestmark = pytest.mark.usefixtures("one_capture")
H200 = PRESETS["NVIDIA H200"]


def _lora(*targets: str, **fields: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), **{"r": 4, **fields})


TASKS: dict[str, Any] = {
    "lora": _lora("q_proj", "v_proj", "down_proj"),
    "wide": _lora("q_proj", "up_proj", r=20),
    "dora": _lora("v_proj", use_dora=True, r=3),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "vera": VeraConfig(task_type="CAUSAL_LM", r=12, target_modules=["q_proj"]),
    "bottleneck": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="tanh"),
}
CHUNK = 512


@functools.cache
def model() -> Any:
    return llama(2)


@functools.cache
def adapters() -> dict[str, Adapter]:
    return {adapter.task.name: adapter for adapter in resolved(model(), TASKS)}


@functools.cache
def built(tokens: int, *names: str, target: Target | None = None) -> Bodies:
    return bodies(model(), [adapters()[name] for name in names], tokens, device=CPU, target=target)


@functools.cache
def surveyed(*names: str, tokens: int = 0, target: Target | None = None) -> Survey:
    """Of a chunk whose size tells what grows with it; of a given chunk, as it is."""
    if tokens:
        return of_bodies(built(tokens, *names, target=target), 0, cuda=False, checkpoint=(False, True), optimizers={})
    variants = (False, True) if names == tuple(TASKS) else (False,)
    return survey(model(), [adapters()[name] for name in names], device=CPU, target=target, checkpoint=variants)


def phases(found: Survey, checkpoint: bool) -> list[tuple[str, Phase]]:
    """Every region's phases in running order, and the head."""
    parts = [found.parts[checkpoint][index] for index in found.order]
    own = [(f"{i}.forward", part.forward) for i, part in enumerate(parts)]
    own += [(f"{i}.backward", part.backward) for i, part in enumerate(parts) if part.backward is not None]
    return [*own, ("head", found.head)]


def there(phase: Phase, extras: frozenset[str]) -> list[Any]:
    return [row for row in phase.records if all(clause & extras for clause in row.clauses)]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_survey_foretells_another_size_of_chunk(checkpoint: bool) -> None:
    names = tuple(TASKS)
    found, real = surveyed(*names), surveyed(*names, tokens=CHUNK)
    assert found.tokens != CHUNK
    for (name, ours), (other, theirs) in zip(phases(found, checkpoint), phases(real, checkpoint), strict=True):
        assert name == other
        assert [row.op for row in ours.records] == [row.op for row in theirs.records]
        for row, exact in zip(ours.records, theirs.records, strict=True):
            for figure in ("flops", "nbytes", "elements"):
                assert getattr(row, figure).at(CHUNK) == pytest.approx(getattr(exact, figure).at(0), rel=1e-12), (
                    name,
                    row.name,
                    figure,
                )
        for own, held in zip(ours.storages, theirs.storages, strict=True):
            assert own.nbytes.at(CHUNK) == pytest.approx(held.nbytes.at(0), rel=1e-12), (name, own.name)


def test_flops_are_those_of_torch_s_formulas(derivative: Callable[..., Any]) -> None:
    names = tuple(TASKS)
    case = built(CHUNK, *names)
    found = surveyed(*names)
    templates = {name: derivative(name, own[0]) for name, own in share(case.bodies).items()}
    owner = {body.spec.name: name for name, own in share(case.bodies).items() for body in own}
    extras = found.extras(names)
    for body, index in zip(case.bodies, found.order, strict=True):
        part, template = found.parts[False][index], templates[owner[body.spec.name]]
        for phase, gm in ((part.forward, template.forward), (part.backward, template.backward)):
            if phase is not None and gm is not None:
                assert _flops(phase, extras) == pytest.approx(spec.flops(gm), rel=1e-9)
    head = differentiate_head(case.head, rows=case.geometry.head_rows, tile=case.geometry.head_tile)
    assert _flops(found.head, extras) == pytest.approx(spec.flops(head.backward), rel=1e-9)


def _flops(phase: Phase, extras: frozenset[str]) -> float:
    """Attention's formula has every row see half a chunk; of banks the dearest counts."""
    total, groups = 0.0, dict[str, float]()
    for row in there(phase, extras):
        own = row.flops.at(CHUNK) + row.per_key * CHUNK * CHUNK / 2
        if row.group:
            groups[row.group] = max(groups.get(row.group, 0.0), own)
        else:
            total += own
    return total + sum(groups.values())


MIXES: list[tuple[str, ...]] = [
    ("lora", "ia3", "dora"),
    ("prompt", "wide", "vera"),
    ("bottleneck", "lora"),
    ("ia3", "prefix", "norms"),
]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_dropping_the_others_extras_gives_the_survey_of_the_mix_alone(mix: tuple[str, ...]) -> None:
    everybody, alone = surveyed(*TASKS), surveyed(*mix)
    on = everybody.extras(mix)
    for (name, ours), (_, theirs) in zip(_merged(everybody), _merged(alone), strict=True):
        assert _account(ours, on) == _account(theirs, alone.extras(mix)), name


def _merged(found: Survey) -> list[tuple[str, list[Phase]]]:
    parts = [found.parts[False][index] for index in found.order]
    return [
        *(
            (f"{i} {part.template}", [own for own in (part.forward, part.backward) if own is not None])
            for i, part in enumerate(parts)
        ),
        ("head", [found.head]),
    ]


def _account(phases: Sequence[Phase], extras: frozenset[str]) -> Counter[tuple[Any, ...]]:
    """What runs, views aside: operators with their FLOPs and kernels."""
    rows = [row for phase in phases for row in there(phase, extras) if row.launches or row.flops.row]
    return Counter((row.op, row.kind, round(row.flops.at(CHUNK)), row.per_key, row.launches) for row in rows)


def test_prices_grow_with_the_chunk_and_with_extras() -> None:
    names = tuple(TASKS)
    for target in (H200, machine("cpu")):
        found = CostModel(surveyed(*names), target)
        extras = found.survey.extras(names)
        for checkpoint in (False, True):
            prices = [found.chunk(extras, Shape(tokens, checkpoint)) for tokens in (64, 128, 512, 4096)]
            assert all(a.cost <= b.cost and a.bytes < b.bytes for a, b in itertools.pairwise(prices))
            grown = [found.chunk(found.survey.extras(names[:count]), Shape(512, checkpoint)) for count in range(1, len(names) + 1)]
            assert all(a.cost <= b.cost and a.bytes <= b.bytes for a, b in itertools.pairwise(grown))


def test_a_chunk_is_the_sum_of_its_regions() -> None:
    found = CostModel(surveyed(*TASKS), H200)
    extras, shape = found.survey.extras(list(TASKS)), Shape(512, True)
    parts = found.survey.parts[True]
    costs: list[tuple[Cost, float]] = [
        (found.phase(i, phase, extras, shape), len(own.regions)) for i, own in enumerate(parts) for phase in ("forward", "backward")
    ]
    costs.append((found.head(extras), found.blocks(512)))
    seconds, used = found.seconds(extras, shape)
    device, host = (sum(getattr(cost, name) * count for cost, count in costs) for name in ("device", "host"))
    assert seconds == pytest.approx(max(device, host))
    assert used == pytest.approx(device / seconds)


def test_a_product_that_was_measured_takes_what_it_took() -> None:
    half, shape = of_half(), Shape(512)
    assert frozen(half)[32, 48] is frozen(half)[48, 32] is True
    assert frozen(half)[32, 50] is frozen(half)[50, 32] is False, "the head's, of a block of the loss"
    assert frozen(surveyed("lora")) == {}, "a table is of products in 16 bits"
    extras, plain = half.extras(["lora"]), CostModel(half, H200)
    rate = {256: 1e11, 1024: 2e11}
    known = replace(plain, products={(32, 48): tuple(rate.items())})
    # gate and up multiply by (32, 48) forwards, down backwards: by straight line between two numbers of rows.
    for phase, count in (("forward", 2), ("backward", 1)):
        (layer,) = [index for index, part in enumerate(half.parts[False]) if "model.layers.1" in part.regions]
        for tokens, speed in ((512, 1e11 * (1 + 256 / 768)), (1024, 2e11), (4096, 2e11)):
            before, after = (own.phase(layer, phase, extras, Shape(tokens)).device for own in (plain, known))
            products = count * 2 * 32 * 48 * tokens / speed
            assert 0.9 * products < after - before < products
        # Fewer rows than were measured take as long as those.
        few, least = (known.phase(layer, phase, extras, Shape(tokens)).device for tokens in (64, 256))
        assert few > count * 2 * 32 * 48 * 256 / 1e11
        assert few < least
    head = replace(plain, products={(32, 50): ((half.geometry.head_rows, 1e9),)})
    assert head.head(extras).device > 2 * 32 * 50 * half.geometry.head_rows / 1e9 > plain.head(extras).device
    assert head.seconds(extras, shape)[0] >= plain.seconds(extras, shape)[0]


@functools.cache
def of_half() -> Survey:
    backbone = llama(2).bfloat16()
    return survey(backbone, resolved(backbone, {"lora": TASKS["lora"]}), device=CPU, target=None, checkpoint=(False,))


def test_a_recorded_chunk_does_not_wait_for_the_host() -> None:
    called = CostModel(surveyed(*TASKS), H200)
    recorded = replace(called, recorded=True)
    extras = called.survey.extras(list(TASKS))
    for tokens in (64, 512, 65536):
        shape = Shape(tokens)
        slow, fast = called.seconds(extras, shape), recorded.seconds(extras, shape)
        assert fast[0] <= slow[0]
        assert recorded.called(extras, shape) == pytest.approx(slow[0] - fast[0])
        assert called.called(extras, shape) == 0
    assert called.seconds(extras, Shape(64))[0] > 2 * recorded.seconds(extras, Shape(64))[0]
    # A task with an encoder takes its steps by calls.
    assert recorded.step(["lora"]) < called.step(["lora"])
    encoded = [name for name, own in called.survey.tasks.items() if own.encodings]
    assert encoded
    assert recorded.step(encoded) == called.step(encoded)


class Memory(TorchDispatchMode):
    """Bytes of the storages that some tensor still stands on, of those made or given; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: Counter[int] = Counter()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.hold(tensor, new=not any(_same(tensor, arg) for arg in torch.utils._pytree.tree_leaves((args, kwargs))))
        return found

    def hold(self, tensor: Tensor, *, new: bool) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if new or self.readers[place]:
            if not self.readers[place]:
                self.live += size
                self.peak = max(self.peak, self.live)
            self.readers[place] += 1
            weakref.finalize(tensor, self.drop, place, size)

    def drop(self, place: int, size: int) -> None:
        self.readers[place] -= 1
        if not self.readers[place]:
            self.live -= size


def _same(tensor: Tensor, arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("names", [("lora", "wide"), ("prefix", "norms", "ia3", "lora"), ("bottleneck", "dora")], ids="+".join)
def test_a_phase_holds_what_its_emitted_text_holds(
    names: tuple[str, ...], checkpoint: bool, derivative: Callable[..., Any]
) -> None:
    """Forward and backward of every template, run as text: the peak, what is left, what is saved."""
    case = built(64, *names)
    found = of_bodies(case, 0, cuda=False, checkpoint=(checkpoint,), optimizers={})
    state, chunk = state_of(case.graph), chunk_of({name: [7, 5] for name in names})
    values = run_bodies(case.bodies, case.graph.weights, state, chunk)
    extras = found.extras(names)
    model_ = CostModel(found, machine("cpu"))
    for body, index in zip(case.bodies, found.order, strict=True):
        template = derivative("template", body, checkpoint=checkpoint)
        inputs = arguments(body, values, case.graph.weights, state, chunk)
        forward = model_.phase(index, "forward", extras, Shape(64, checkpoint))
        results, peak, left = _run(template.forward, [*inputs], [])
        assert forward.peak == pytest.approx(peak, rel=0.03), body.spec.name
        saved = results[template.spec.outputs :]
        assert forward.saved + sum(own.nbytes for own in results[: template.spec.outputs]) == pytest.approx(left, rel=0.03)
        if template.backward is None:
            continue
        assert template.spec.backward is not None
        given: dict[str, Callable[[int], Tensor]] = {
            "input": inputs.__getitem__,
            "saved": saved.__getitem__,
            "tangent": [torch.randn_like(own) for own in results[: template.spec.outputs]].__getitem__,
            "grad": [state.grads.get(name.removeprefix("table:")) for name in body.spec.inputs].__getitem__,
        }
        references = [reference.partition(":") for reference in template.spec.backward]
        bound = [given[kind](int(text)) for kind, _, text in references]
        owned = [place for place, (kind, _, _) in enumerate(references) if kind == "saved"]
        del saved, results, given
        _, peak, _ = _run(template.backward, bound, owned)
        assert model_.phase(index, "backward", extras, Shape(64, checkpoint)).peak == pytest.approx(peak, rel=0.03), body.spec.name


def _run(gm: Any, args: list[Tensor], owned: Sequence[int]) -> tuple[list[Tensor], int, int]:
    """The results of the emitted text, the most it held of what it made and of the arguments that are its own, and what is left."""
    call = load_source(emit.eager_source(gm, "measured"), "<measured>")["call"]
    memory = Memory()
    given = list(args)
    for place in owned:
        memory.hold(given[place], new=True)
    args.clear()
    with torch.no_grad(), memory:
        results = list(call(given))
    left = memory.live
    return results, memory.peak, left


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_chunk_holds_what_its_program_holds(checkpoint: bool) -> None:
    names, options = ("lora", "wide", "norms"), muxcompile.Options(chunk_tokens=CHUNK, gradient_checkpointing=checkpoint)
    compiled = muxcompile.compile(model(), {name: TASKS[name] for name in names}, options=options)
    executor = compiled._executors[0]
    examples = {name: [Example(np.arange(2, 42), np.arange(2, 42))] * 3 for name in names}
    (chunk,) = pack(examples, executor.compiled.geometry)
    found = CostModel(surveyed(*TASKS), machine("cpu"))
    memory = Memory()
    with memory:
        executor.run([chunk], names, train=True)
    predicted = found.bytes(found.survey.extras(names), Shape(CHUNK, checkpoint))
    # The chunk's own numbers (ids, borders, labels) are not counted: they are few beside a real model's values.
    assert predicted == pytest.approx(memory.peak, rel=0.1)
    assert predicted < found.bytes(found.survey.extras(list(TASKS)), Shape(CHUNK, checkpoint))


def test_what_is_resident_is_what_the_state_holds() -> None:
    compiled = muxcompile.compile(model(), TASKS, options=muxcompile.Options(chunk_tokens=128))
    ids = list(range(2, 20))
    compiled.step({name: [{"input_ids": ids, "labels": ids}] for name in TASKS})
    state, found = compiled.state, CostModel(surveyed(*TASKS), machine("cpu"))
    moments = [
        value for task in state.tasks.values() for own in task.optimizer.state.values() for value in own.values() if value.dim()
    ]
    encoded = [*state.encoded.tensors.values(), *state.encoded.grads.values()]
    held = [*state.masters.values(), *state.copies.values(), *state.grads.values(), *encoded, *moments]
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert found.resident() - found.survey.backbone == pytest.approx(sum(tensors.values()), rel=0.01)
    assert found.survey.backbone == sum(own.numel() * 4 for own in model().parameters()) + sum(
        own.numel() * own.element_size()
        for name, own in compiled._executors[0].weights.items()
        if name not in dict(model().named_parameters())
    )
    assert found.resident(["lora"]) < found.resident(["lora", "wide"]) < found.resident()
    assert found.step(["lora"]) < found.step(["lora", "wide"])


def test_a_forward_alone_costs_less_than_a_chunk() -> None:
    found = CostModel(surveyed(*TASKS), H200)
    extras = found.survey.extras(list(TASKS))
    for checkpoint in (False, True):
        shape = Shape(CHUNK, checkpoint)
        assert 0 < found.forward(extras, shape).cost < found.chunk(extras, shape).cost
        assert found.forward(extras, shape).bytes < found.chunk(extras, shape).bytes
    assert found.forward(extras, Shape(CHUNK, True)).bytes < found.forward(extras, Shape(CHUNK)).bytes

"""The executor walks a program: right losses and gradients, no value kept a moment too long, none touched that is not listed.

The model is written by hand: embed -> mix (the adapter) -> left -> right, where right reads mix's output beside left's:

    h0 = E[ids]    h1 = h0 A[slot]    h2 = tanh(2 h1)    h3 = h1 h2    logits = h3 W^T
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import codegen.ops  # noqa: F401  (registers mux::tile_mm)
from passes.schedule import schedule
from runtime.examples import IGNORE, Example
from runtime.executor import Compiled, Executor
from runtime.pack import Chunk, Geometry, pack
from runtime.program import Action, Kind, Program
from runtime.region import HeadSpec, RegionSpec, TemplateSpec
from runtime.state import State, Training
from runtime.tables import Param, Table

mux = torch.ops.mux
WIDTH, VOCABULARY = 3, 11
GEOMETRY = Geometry(tokens=16, tile=4, sequences=12, bundle_tokens=8, bundle_sequences=4, head_rows=3)
CPU = torch.device("cpu")

REGIONS = [
    RegionSpec("embed", "embed", ("chunk:input_ids", "weight:E"), ("h0",)),
    RegionSpec("mix", "mix", ("value:h0", "route:alice+bob", "table:A"), ("h1",)),
    RegionSpec("left", "left", ("value:h1",), ("h2",)),
    RegionSpec("right", "right", ("value:h1", "value:h2"), ("h3",)),
]
TEMPLATES = {
    "embed": TemplateSpec("embed", 1, 0, None, ()),
    "mix": TemplateSpec("mix", 1, 1, ("saved:0", "input:1", "tangent:0", "grad:2"), ()),
    "left": TemplateSpec("left", 1, 1, ("saved:0", "tangent:0"), (0,)),
    "right": TemplateSpec("right", 1, 0, ("input:0", "input:1", "tangent:0"), (0, 1)),
}


def embed(args: list[Any]) -> Any:
    ids, table = args
    args.clear()
    return (table[ids],)


def mix(args: list[Any]) -> Any:
    x, route, table = args
    args.clear()
    rows = x[0].clone()  # what the backward needs, saved
    return mux.tile_mm(rows, table, route, None, False)[None], rows


def mix_backward(args: list[Any]) -> Any:
    rows, route, tangent, grad = args
    args.clear()
    mux.tile_outer_(grad, rows, tangent[0], route, None)
    return ()


def left(args: list[Any]) -> Any:
    (x,) = args
    args.clear()
    y = torch.tanh(2 * x)
    return y, y.clone()


def left_backward(args: list[Any]) -> Any:
    y, tangent = args
    args.clear()
    return (2 * (1 - y * y) * tangent,)


def right(args: list[Any]) -> Any:
    x, y = args
    args.clear()
    return (x * y,)


def right_backward(args: list[Any]) -> Any:
    x, y, tangent = args
    args.clear()
    return tangent * y, tangent * x


def head(args: list[Any]) -> Any:
    rows, weight, targets = args
    args.clear()
    return (F.cross_entropy(rows[0] @ weight.T, targets, reduction="none"),)


def head_backward(args: list[Any]) -> Any:
    rows, weight, targets, seeds = args
    args.clear()
    logits = rows[0] @ weight.T
    grad = (logits.softmax(-1) - F.one_hot(targets, VOCABULARY)) * seeds[:, None]
    return F.cross_entropy(logits, targets, reduction="none"), (grad @ weight)[None]


CALLABLES: dict[str, Callable[[list[Any]], Any]] = {
    "embed.forward": embed, "mix.forward": mix, "mix.backward": mix_backward, "left.forward": left, "left.backward": left_backward,
    "right.forward": right, "right.backward": right_backward, "head.forward": head, "head.backward": head_backward,
}  # fmt: skip


def compiled() -> Compiled:
    train, evaluate = (schedule(REGIONS, TEMPLATES, "h3", tasks=("alice", "bob"), train=train) for train in (True, False))
    spec = HeadSpec(("weight:W",), "h3", (1, GEOMETRY.tokens, WIDTH), "float32", VOCABULARY)
    return Compiled(
        ("alice", "bob"),
        GEOMETRY,
        TEMPLATES,
        {region.name: region for region in REGIONS},
        spec,
        train,
        evaluate,
        dict.fromkeys(CALLABLES, ""),
    )


def state_of() -> State:
    rows = ("alice", "bob")
    tables = {"A": Table("A", (2, WIDTH, WIDTH), rows, True, "alice+bob")}
    params = [Param(task, "k", "A", row, 0, WIDTH, False, bound=1.0) for row, task in enumerate(rows)]
    return State(tables, params, dict.fromkeys(rows, Training()), CPU)


def weights_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"E": torch.randn(VOCABULARY, WIDTH, generator=generator), "W": torch.randn(VOCABULARY, WIDTH, generator=generator)}
    return {name: torch.nn.Parameter(value) for name, value in found.items()}


def executor_of(callables: dict[str, Callable[[list[Any]], Any]] | None = None) -> Executor:
    return Executor(compiled(), weights_of(), state_of(), callables or CALLABLES)


def examples(seed: int, *lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, IGNORE, ids)
        found.append(Example(ids.numpy(), labels.numpy()))
    return found


BATCHES = {"alice": examples(1, 5, 8, 3), "bob": examples(2, 7)}


def exact(task: str, batches: dict[str, list[Example]], state: State, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The task's summed loss, and the gradient of its mean loss, by autograd over each sequence alone."""
    table = state.read(task, "k").requires_grad_()
    total, count = torch.zeros(()), 0
    for example in batches[task]:
        h1 = weights["E"][torch.from_numpy(example.input_ids)] @ table
        logits = (h1 * torch.tanh(2 * h1)) @ weights["W"].T
        total = total + F.cross_entropy(logits[:-1], torch.from_numpy(example.labels[1:]), ignore_index=IGNORE, reduction="sum")
        count += example.labelled
    (grad,) = torch.autograd.grad(total / count, table)
    return total.detach(), grad


# --- results ----------------------------------------------------------------------------------------------------------


def test_losses_and_gradients_are_those_of_each_task_alone() -> None:
    executor = executor_of()
    chunks = list(pack(BATCHES, GEOMETRY))
    assert len(chunks) == 2
    loss = executor.run(chunks, ["alice", "bob"], train=True)
    assert loss.tasks == ("alice", "bob")
    assert loss.sums.shape == (2, 1, 1)
    for index, task in enumerate(loss.tasks):
        total, grad = exact(task, BATCHES, executor.state, dict(executor.weights))
        torch.testing.assert_close(loss.sums[index, 0, 0], total)
        torch.testing.assert_close(executor.state.read(task, "k", gradient=True), grad)


def test_evaluation_gives_the_same_losses_and_touches_no_gradient() -> None:
    executor = executor_of()
    chunks = list(pack(BATCHES, GEOMETRY))
    before = executor.run(chunks, ["alice", "bob"], train=False).sums
    assert not executor.state.grads["A"].any()
    assert torch.equal(executor.run(chunks, ["alice", "bob"], train=True).sums, before)
    assert executor.state.grads["A"].any()


def test_gradients_accumulate_over_calls() -> None:
    once, twice = executor_of(), executor_of()
    chunks = list(pack(BATCHES, GEOMETRY))
    once.run(chunks, ["alice", "bob"], train=True)
    for _ in range(2):
        twice.run(chunks, ["alice", "bob"], train=True)
    torch.testing.assert_close(twice.state.grads["A"], 2 * once.state.grads["A"])


def test_the_order_of_the_losses_is_the_callers() -> None:
    chunks = list(pack(BATCHES, GEOMETRY))
    first, second = (executor_of().run(chunks, names, train=False).sums.flatten() for names in (["alice", "bob"], ["bob", "alice"]))
    assert torch.equal(first.flip(0), second)


def test_a_task_keeps_its_bits_when_a_neighbour_leaves() -> None:
    alone, among = executor_of(), executor_of()
    first = alone.run(pack({"alice": BATCHES["alice"]}, GEOMETRY), ["alice"], train=True)
    second = among.run(pack(BATCHES, GEOMETRY), ["alice", "bob"], train=True)
    assert torch.equal(first.sums[0], second.sums[0])
    assert torch.equal(alone.state.grads["A"][0], among.state.grads["A"][0])
    assert not alone.state.grads["A"][1].any()


def test_a_chunk_without_a_label_gives_no_loss_and_no_gradient() -> None:
    executor = executor_of()
    silent = [Example(example.input_ids, np.full_like(example.labels, IGNORE)) for example in BATCHES["alice"]]
    loss = executor.run(pack({"alice": silent}, GEOMETRY), ["alice"], train=True)
    assert not loss.sums.any()
    assert not executor.state.grads["A"].any()


def test_a_poisoned_task_stays_within_itself() -> None:
    clean, poisoned = executor_of(), executor_of()
    poisoned.state.write("bob", "k", torch.full((WIDTH, WIDTH), math.nan))
    chunks = list(pack(BATCHES, GEOMETRY))
    first = clean.run(chunks, ["alice", "bob"], train=True).sums
    second = poisoned.run(chunks, ["alice", "bob"], train=True).sums
    assert torch.equal(first[0], second[0])
    assert second[1].isnan().all()
    assert torch.equal(clean.state.grads["A"][0], poisoned.state.grads["A"][0])


def test_weights_are_read_and_never_written_nor_differentiated() -> None:
    executor = executor_of()
    before = {name: tensor.clone() for name, tensor in executor.weights.items()}
    loss = executor.run(pack(BATCHES, GEOMETRY), ["alice", "bob"], train=True)
    assert all(torch.equal(tensor, before[name]) and tensor.grad is None for name, tensor in executor.weights.items())
    assert not loss.sums.requires_grad


# --- the walk ---------------------------------------------------------------------------------------------------------


def test_what_was_executed_is_the_program_with_each_chunks_tasks() -> None:
    executor = executor_of()
    chunks = list(pack(BATCHES, GEOMETRY))
    executor.run(chunks, ["alice", "bob"], train=True)
    assert Program(tuple(executor.executed)) == executor.compiled.train.unroll([chunk.tasks for chunk in chunks])
    executor.run(chunks[:1], ["alice"], train=False)
    assert Program(tuple(executor.executed)) == executor.compiled.evaluate.unroll([chunks[0].tasks])


def test_every_kind_of_action_in_a_program_has_one_handler() -> None:
    executor = executor_of()
    called: list[Kind] = []
    handlers: dict[Kind, Any] = executor._handlers
    for kind, handler in list(handlers.items()):

        def noting(own: Executor, action: Action, *rest: Any, kind: Kind = kind, handler: Any = handler) -> None:
            assert action.kind is kind
            called.append(kind)
            handler(own, action, *rest)

        handlers[kind] = noting
    executor.run(pack({"bob": BATCHES["bob"]}, GEOMETRY), ["bob"], train=True)
    assert called == [action.kind for action in executor.compiled.train]
    # Optimizer steps are the state's; transfers between ranks are timed by the simulator alone.
    assert set(executor._handlers) == set(Kind) - {Kind.STEP, Kind.SEND, Kind.RECV}


def watched(executor: Executor, seen: Callable[[Action, MutableMapping[str, Any]], None]) -> None:
    """Call `seen` with the values after every action."""
    handlers: dict[Kind, Any] = executor._handlers
    for kind, handler in list(handlers.items()):

        def watching(own: Executor, action: Action, values: Any, *rest: Any, handler: Any = handler) -> None:
            handler(own, action, values, *rest)
            seen(action, values)

        handlers[kind] = watching


@pytest.mark.parametrize("train", [True, False])
def test_a_value_lives_from_its_action_to_its_last_reader(train: bool) -> None:
    executor = executor_of()
    program = list(executor.compiled.train if train else executor.compiled.evaluate)
    live: list[set[str]] = []
    watched(executor, lambda action, values: live.append(set(values)))
    executor.run(pack({"bob": BATCHES["bob"]}, GEOMETRY), ["bob"], train=train)
    assert len(live) == len(program)
    for index, found in enumerate(live):
        written = {name for action in program[: index + 1] for name in action.writes}
        to_come = {name for action in program[index + 1 :] for name in action.reads}
        ever_read = {name for action in program for name in action.reads}
        # What nobody ever reads (positions, the loss) is no value that someone holds on to by mistake.
        assert found & ever_read == written & to_come, f"after {program[index].kind} {program[index].region}"
    assert max(len(found & {"h0", "h1", "h2", "h3"}) for found in live) == 2 + train


class Listed(MutableMapping[str, Any]):
    """The values of a run, through which an action may touch only what it lists."""

    def __init__(self, values: dict[str, Any], action: Action) -> None:
        self.held, self.action = values, action

    def __getitem__(self, name: str) -> Any:
        assert name in self.action.reads, f"{self.action.kind} {self.action.region} reads {name}, which it does not list"
        return self.held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        assert name in self.action.writes, f"{self.action.kind} {self.action.region} writes {name}, which it does not list"
        self.held[name] = value

    def __delitem__(self, name: str) -> None:
        assert name in self.action.reads
        del self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@pytest.mark.parametrize("train", [True, False])
def test_an_action_touches_only_what_its_line_lists(train: bool) -> None:
    executor = executor_of()
    handlers: dict[Kind, Any] = executor._handlers
    for kind, handler in list(handlers.items()):

        def guarded(own: Executor, action: Action, values: Any, *rest: Any, handler: Any = handler) -> None:
            handler(own, action, Listed(values, action), *rest)

        handlers[kind] = guarded
    executor.run(pack(BATCHES, GEOMETRY), ["alice", "bob"], train=train)


def test_an_executor_is_gone_with_its_last_use() -> None:
    """Not when the collector comes by: its records hold memory of the device."""
    executor = executor_of()
    executor.run(pack(BATCHES, GEOMETRY), ["alice", "bob"], train=True)
    gone = weakref.ref(executor)
    gc.disable()
    try:
        del executor
        assert gone() is None
    finally:
        gc.enable()


def test_a_region_holds_the_last_reference_to_what_it_reads_last() -> None:
    """h2 is read last by right's backward: inside it, with its arguments let go, the tensor is gone."""
    held: dict[str, weakref.ref[Tensor]] = {}
    gone: list[bool] = []

    def noting_left(args: list[Any]) -> Any:
        results = left(args)
        held["h2"] = weakref.ref(results[0])
        return results

    def noting_right_backward(args: list[Any]) -> Any:
        results = right_backward(args)
        gc.collect()
        gone.append(held["h2"]() is None)
        return results

    executor = executor_of(CALLABLES | {"left.forward": noting_left, "right.backward": noting_right_backward})
    executor.run(pack({"bob": BATCHES["bob"]}, GEOMETRY), ["bob"], train=True)
    assert gone == [True]


def test_nothing_of_a_run_outlives_it() -> None:
    made: list[weakref.ref[Tensor]] = []

    def noting(call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def noted(args: list[Any]) -> Any:
            results = call(args)
            made.extend(weakref.ref(result) for result in results)
            return results

        return noted

    executor = executor_of({name: noting(call) for name, call in CALLABLES.items()})
    loss = executor.run(pack(BATCHES, GEOMETRY), ["alice", "bob"], train=True)
    gc.collect()
    assert len(made) > 20
    assert not any(ref() is not None for ref in made)
    assert loss.sums.isfinite().all()


def test_a_gradient_of_several_readers_is_their_sum() -> None:
    # h1 is read by left and by right: without either part the table's gradient is another.
    full = executor_of()
    chunks = list(pack({"bob": BATCHES["bob"]}, GEOMETRY))
    full.run(chunks, ["bob"], train=True)
    for name, silent in (("left.backward", 0), ("right.backward", 0)):

        def muted(args: list[Any], call: Any = CALLABLES[name], index: int = silent) -> Any:
            results = list(call(args))
            results[index] = torch.zeros_like(results[index])
            return tuple(results)

        partial = executor_of(CALLABLES | {name: muted})
        partial.run(chunks, ["bob"], train=True)
        assert not torch.allclose(partial.state.grads["A"], full.state.grads["A"])


def test_rows_of_nobody_are_in_no_loss_and_no_gradient() -> None:
    # 7 tokens in blocks of 3 rows of the loss: the last block is filled up with nobody's row.
    chunk: Chunk
    (chunk,) = pack({"bob": BATCHES["bob"]}, GEOMETRY)
    assert (chunk.rows == GEOMETRY.tokens).any()
    executor = executor_of()
    loss = executor.run([chunk], ["bob"], train=True)
    total, grad = exact("bob", BATCHES, executor.state, dict(executor.weights))
    torch.testing.assert_close(loss.sums[0, 0, 0], total)
    torch.testing.assert_close(executor.state.read("bob", "k", gradient=True), grad)

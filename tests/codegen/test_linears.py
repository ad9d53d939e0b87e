"""mux::linears and its backward mean what `codegen.reference` says, in every form, and what a task gets depends on it alone.

The device's forms run by Triton's interpreter, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codegen import device, host, ops, reference
from codegen.linears import _check_linears
from codegen.lower import FORMS, Forms

mux = torch.ops.mux
NanMemory = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Bank:
    """Tasks of one rank that adapt the same linears."""

    rank: int
    members: tuple[int, ...]
    slots: int
    rate: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """Sizes of a problem; `route` says for each block its task, counted through all banks, -1: nobody."""

    tile: int
    features: int
    outputs: tuple[int, ...]
    banks: tuple[Bank, ...]
    route: tuple[int, ...]
    biases: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        return self.tile * len(self.route)


def made(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of `reference.linears`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, generator=generator).int()

    args: dict[str, Any] = {
        "x": normal(2, shapes.tokens // 2, shapes.features) if shapes.tokens % 2 == 0 else normal(shapes.tokens, shapes.features),
        "weights": [normal(size, shapes.features) for size in shapes.outputs],
        "biases": [normal(size) if there else None for size, there in zip(shapes.outputs, shapes.biases, strict=True)],
    }
    args |= {name: [] for name in ("a", "b", "scale", "route", "drop", "sites")}
    args |= {"sequences": None, "positions": None, "members": [], "drops": []}
    first, whole = 0, torch.tensor(shapes.route, dtype=torch.int32)
    for index, bank in enumerate(shapes.banks):
        args["a"].append(normal(bank.slots, bank.rank * len(bank.members), shapes.features))
        args["b"] += [normal(bank.slots, bank.rank, shapes.outputs[member]) for member in bank.members]
        args["scale"] += [torch.rand(bank.slots, generator=generator) + 0.5 for _ in bank.members]
        args["members"] += bank.members
        own = (whole >= first) & (whole < first + bank.slots)
        args["route"].append(torch.where(own, whole - first, -1).int())
        args["drops"].append(int(bank.rate > 0))
        if bank.rate:
            keys = words(bank.slots, 3)
            keys[:, 2] = int(bank.rate * 2**32) - (2**32 if bank.rate >= 0.5 else 0)
            args["drop"].append(keys)
            # Keys, and the columns that x begins with.
            args["sites"].append(torch.tensor([[10 * index + member, 3 * member] for member in range(len(bank.members))]).int())
            args["sequences"] = torch.arange(shapes.tokens, dtype=torch.int32).view(args["x"].shape[:-1]) // 7
            args["positions"] = torch.arange(shapes.tokens, dtype=torch.int32) % 7
        first += bank.slots
    return args


@dataclass
class Results:
    """Everything that a forward and a backward give."""

    y: list[Tensor]
    narrow: Tensor
    dx: Tensor
    grads: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.y, self.narrow, self.dx, *self.grads]


def upstream(args: dict[str, Any], seed: int = 7) -> list[Tensor]:
    generator, x = torch.Generator().manual_seed(seed), args["x"]
    return [torch.randn(*x.shape[:-1], len(weight), generator=generator).to(x.dtype) for weight in args["weights"]]


def backward_args(args: dict[str, Any], dy: list[Tensor], narrow: Tensor) -> dict[str, Any]:
    return {"dy": dy, "narrow": narrow, **{name: value for name, value in args.items() if name != "biases"}}


def run(ops: Any, args: dict[str, Any], forms: str | None = None, dy: list[Tensor] | None = None, held: float = 0.0) -> Results:
    """Forward and backward of one implementation; the gradients of the tables held `held` before, dx NaN."""
    given = {} if forms is None else {"forms": forms}
    dy = upstream(args) if dy is None else dy
    *y, narrow = ops.linears(**args, **given)
    grads = [torch.full(table.shape, held, dtype=torch.float32) for table in (*args["a"], *args["b"])]
    dx = torch.full_like(args["x"], math.nan)
    ops.linears_backward(grads=grads, dx=dx, **backward_args(args, dy, narrow), **given)
    return Results(y, narrow, dx, grads)


def close(found: Tensor, expected: Tensor, bound: float = 3e-6) -> None:
    """The error against the largest entry; a NaN is not below it."""
    assert found.shape == expected.shape
    if found.numel():
        limit = bound * max(1.0, float(expected.abs().max()))
        assert float((found.double() - expected.double()).abs().max()) <= limit


# --- meaning --------------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn, tiles: tuple[int, ...] = (1, 3, 16, 20), whole: bool = False, most: int = 3, least: int = 0) -> Shapes:
    """`whole`: features in multiples of 16; `least`, `most`: numbers of banks."""
    size = st.sampled_from([16, 48] if whole else [1, 7, 16, 45])
    outputs = tuple(draw(st.lists(size, min_size=1, max_size=most)))
    indices = range(len(outputs))
    bank = st.builds(
        Bank,
        st.sampled_from([1, 3, 8, 17]),
        st.lists(st.sampled_from(indices), min_size=1, max_size=len(outputs), unique=True).map(tuple),
        st.integers(1, 3),
        st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    )
    banks = tuple(draw(st.lists(bank, min_size=least, max_size=most)))
    tasks = sum(bank.slots for bank in banks)
    route = tuple(draw(st.lists(st.integers(-1, tasks - 1), min_size=1, max_size=most + 1)))
    biases = tuple(draw(st.lists(st.booleans(), min_size=len(outputs), max_size=len(outputs))))
    return Shapes(draw(st.sampled_from(tiles)), draw(size), outputs, banks, route, biases)


@st.composite
def lowered(draw: st.DrawFn) -> tuple[Shapes, Forms]:
    """Shapes that the device takes, and lowerings that are legal for them."""
    found = draw(shapes((16,), whole=draw(st.booleans()), most=2, least=1))
    sizes = (found.features, *found.outputs)
    known = [form for form in FORMS if form != "fused" or all(size % 16 == 0 for size in sizes)]
    y = tuple(draw(st.sampled_from([form for form in known if not (bias and form == "accumulate")])) for bias in found.biases)
    return found, Forms(y, draw(st.sampled_from(known)))


@given(case=shapes())
def test_the_host_means_the_reference(case: Shapes, nan_memory: NanMemory) -> None:
    args = made(case)
    expected = run(reference, args, held=0.5)
    with nan_memory():
        found = run(host, args, "", held=0.5)
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        close(mine, theirs)


@settings(max_examples=max(1, settings.default.max_examples * 2 // 5) if settings.default else 1)
@given(case=lowered())
def test_every_form_of_the_device_means_the_reference(
    case: tuple[Shapes, Forms], interpreted_device: SimpleNamespace, nan_memory: NanMemory
) -> None:
    args = made(case[0])
    expected = run(reference, args, held=0.5)
    with nan_memory():
        found = run(interpreted_device, args, str(case[1]), held=0.5)
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_without_adapters_every_form_of_the_device_is_the_frozen_linears(
    blocks: int, form: str, interpreted_device: SimpleNamespace, nan_memory: NanMemory
) -> None:
    # Without a route the whole chunk is one block: its rows need not be a power of two (3 and 5 blocks of 16 are not).
    args = made(Shapes(16, 32, (48, 16), (), (-1,) * blocks, (form != "accumulate", False)))
    expected = run(reference, args)
    with nan_memory():
        found = run(interpreted_device, args, f"y={form},{form} dx={form}")
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_device_takes_weights_that_are_transposed_views(form: str, interpreted_device: SimpleNamespace) -> None:
    args = made(replace(PLAIN, outputs=(48, 32)))
    args["weights"] = [turn(weight) for weight in args["weights"]]
    expected = run(reference, args)
    for mine, theirs in zip(run(interpreted_device, args, f"y={form},{form} dx={form}").tensors, expected.tensors, strict=True):
        close(mine, theirs)


@given(case=shapes())
def test_the_gradients_of_the_reference_are_those_of_autograd(case: Shapes) -> None:
    args = made(case)
    found = run(reference, args)
    for mine, theirs in zip([found.dx, *found.grads], differentiated(args), strict=True):
        close(mine, theirs)


@given(case=shapes())
def test_the_gradients_of_the_operator_are_those_of_the_reference(case: Shapes) -> None:
    args = made(case)
    leaves = {name: required(args[name]) for name in ("x", "a", "b")}
    *y, _ = mux.linears(**{**args, **leaves}, forms="")
    wanted = [leaves["x"], *leaves["a"], *leaves["b"]]
    found = torch.autograd.grad(y, wanted, upstream(args))
    for mine, theirs in zip(found, differentiated(args), strict=True):
        close(mine, theirs)


def required(given: Any) -> Any:
    return [table.clone().requires_grad_() for table in given] if isinstance(given, list) else given.clone().requires_grad_()


def differentiated(args: dict[str, Any]) -> list[Tensor]:
    """[dx, *da, *db] of the reference, in float64, by autograd."""
    exact = {name: [None if t is None else t.double() for t in args[name]] for name in ("weights", "biases")}
    leaves = {"x": required(args["x"].double()), **{name: required([t.double() for t in args[name]]) for name in ("a", "b")}}
    *y, _ = reference.linears(**{**args, **exact, **leaves})
    wanted = [leaves["x"], *leaves["a"], *leaves["b"]]
    found = torch.autograd.grad(y, wanted, [own.double() for own in upstream(args)], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, found, strict=True)]


SMALL = Shapes(
    16, 32, (48, 16), (Bank(8, (0, 1), 3, 0.3), Bank(3, (1,), 2)), route=(1, 3, -1, 0, 1), biases=(True, False)
)  # fmt: skip
PLAIN = replace(SMALL, banks=(Bank(8, (0, 1), 3), Bank(3, (1,), 2)), biases=(False, False))
NOBODY = replace(PLAIN, banks=(), route=(-1,) * 5)


def test_an_output_without_a_gradient_counts_as_zeros() -> None:
    args = made(SMALL)
    args["x"].requires_grad_()
    y = mux.linears(**args, forms="")[0]
    dy = upstream(args)
    (found,) = torch.autograd.grad(y, args["x"], dy[0])
    args["x"] = args["x"].detach()
    close(found, run(reference, args, dy=[dy[0], torch.zeros_like(dy[1])]).dx)


def test_tables_in_bfloat16_get_their_gradients_in_bfloat16() -> None:
    args = made(PLAIN, dtype=torch.bfloat16)
    args |= {name: required(args[name]) for name in ("x", "a", "b")}
    y = mux.linears(**args, forms="")[:-1]
    found = torch.autograd.grad(y, [args["x"], *args["a"], *args["b"]], upstream(args))
    assert {grad.dtype for grad in found} == {torch.bfloat16}


@pytest.mark.parametrize("case", [SMALL, NOBODY], ids=["banks", "no banks"])
def test_no_dx_is_computed_where_nobody_wants_it(case: Shapes) -> None:
    args = made(case)
    *_, narrow = mux.linears(**args, forms="")
    dy = upstream(args)
    every = mux.linears_backward(**backward_args(args, dy, narrow), wants_dx=True, forms="")
    some = mux.linears_backward(**backward_args(args, dy, narrow), wants_dx=False, forms="")
    assert len(every) == len(some) + 1 == len(args["a"]) + len(args["b"]) + 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(some, every[:-1], strict=True))


# --- containment and bits -------------------------------------------------------------------------------------------------

# Task 0 adapts the first linear, tasks 1 and 2 both, task 3 the second; task 0's blocks are not adjacent.
MANY = Shapes(
    16,
    48,
    (32, 16),
    (Bank(8, (0,), 1, 0.25), Bank(17, (0, 1), 2), Bank(3, (1,), 1, 0.5)),
    route=(0, 1, 3, -1, 0, 2),
    biases=(False, False),
)
OWN = {"host": "", **{form: f"y={form},{form} dx={form}" for form in FORMS}}


@pytest.fixture(params=OWN)
def form(request: pytest.FixtureRequest) -> Callable[..., Results]:
    """Forward and backward of `host`, or of one of the device's forms."""
    ops = host if request.param == "host" else request.getfixturevalue("interpreted_device")
    return lambda args, **given: run(ops, args, OWN[request.param], **given)


def rows_of(task: int) -> Tensor:
    return torch.tensor([own == task for own in MANY.route]).repeat_interleave(MANY.tile)


def slots_of(task: int) -> tuple[int, int, list[int]]:
    """A task's bank, its slot there and the places of its B tables."""
    place = 0
    for index, bank in enumerate(MANY.banks):
        if task < bank.slots:
            return index, task, list(range(place, place + len(bank.members)))
        task, place = task - bank.slots, place + len(bank.members)
    raise AssertionError


def of_task(results: Results, task: int, count: int) -> list[Tensor]:
    """What one task sees: its rows of y, narrow and dx, and its gradients."""
    bank, slot, places = slots_of(task)
    rows, own = rows_of(task), MANY.banks[bank]
    flat = [t.reshape(-1, t.shape[-1])[rows] for t in (*results.y, results.narrow[:, : own.rank * len(own.members)], results.dx)]
    return [*flat, results.grads[bank][slot], *(results.grads[count + place][slot] for place in places)]


def flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


@pytest.mark.parametrize(("broken", "poison"), [(0, math.nan), (1, math.inf)])
def test_what_one_task_holds_reaches_nobody_else(form: Callable[..., Results], broken: int, poison: float) -> None:
    args = made(MANY)
    dy = upstream(args)
    clean = form(args, dy=dy)
    bank, slot, places = slots_of(broken)
    rows = rows_of(broken) | rows_of(-1)
    flat(args["x"])[rows] = poison
    args["a"][bank][slot] = poison
    for place in places:
        args["b"][place][slot] = args["scale"][place][slot] = poison
    for own in dy:
        flat(own)[rows] = poison
    found = form(args, dy=dy)
    banks = len(MANY.banks)
    for task in {0, 1, 2, 3} - {broken}:
        assert all(torch.equal(*pair) for pair in zip(of_task(found, task, banks), of_task(clean, task, banks), strict=True)), task
    # That the poison took effect; rows of nobody keep zeros in the narrow tensor.
    assert not any(t.isfinite().all() for t in of_task(found, broken, banks))
    assert torch.equal(found.narrow[rows_of(-1)], torch.zeros_like(found.narrow[rows_of(-1)]))


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_has_the_bits_that_it_has_alone(form: Callable[..., Results], task: int) -> None:
    args = made(MANY)
    dy = upstream(args)
    together = of_task(form(args, dy=dy), task, len(MANY.banks))
    bank, slot, places = slots_of(task)
    # The same T, the same places; no other bank, no other slot, other values in the rows of the others.
    alone = {**args, "x": args["x"].clone(), "a": [args["a"][bank][slot : slot + 1].clone()]}
    alone["b"] = [args["b"][place][slot : slot + 1].clone() for place in places]
    alone["scale"] = [args["scale"][place][slot : slot + 1].clone() for place in places]
    alone["route"] = [torch.where(args["route"][bank] == slot, 0, -1).int()]
    alone["members"], alone["drops"] = [args["members"][place] for place in places], [args["drops"][bank]]
    index = sum(args["drops"][:bank])
    kept = slice(index, index + args["drops"][bank])
    alone["drop"] = [keys[slot : slot + 1].clone() for keys in args["drop"][kept]]
    alone["sites"] = args["sites"][kept]
    other = [flat(args["x"]), *(flat(own) for own in dy)]
    alone_dy = [own.clone() for own in dy]
    for mine, theirs in zip([flat(alone["x"]), *(flat(own) for own in alone_dy)], other, strict=True):
        mine[~rows_of(task)] = 3 * theirs[~rows_of(task)] + 1
    results = form(alone, dy=alone_dy)
    rows, own = rows_of(task), MANY.banks[bank]
    by_row = [*results.y, results.narrow, results.dx]
    assert results.narrow.shape[1] == own.rank * len(own.members)
    found = [*(t.reshape(-1, t.shape[-1])[rows] for t in by_row), *(grad[0] for grad in results.grads)]
    for index, pair in enumerate(zip(found, together, strict=True)):
        assert torch.equal(*pair), index


def test_three_runs_have_the_same_bits(form: Callable[..., Results]) -> None:
    args = made(replace(MANY, route=(0, 1, 3)))
    first, *others = (form(args) for _ in range(3))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first.tensors, other.tensors, strict=True))


def test_a_neighbour_that_adapts_another_linear_changes_no_bits_of_it(form: Callable[..., Results]) -> None:
    # With the neighbour the second linear runs in its form, without it as a frozen linear.
    case = replace(MANY, banks=(MANY.banks[0],), route=(0, -1, -1, -1, 0, -1))
    beside = replace(case, banks=(MANY.banks[0], Bank(3, (1,), 1)), route=(0, -1, 1, -1, 0, 1))
    args = made(case)
    other = made(beside)
    assert torch.equal(args["x"], other["x"])
    alone, together = form(args), form(other)
    rows = torch.tensor([task != 1 for task in beside.route]).repeat_interleave(MANY.tile)
    for mine, theirs in zip([*alone.y, alone.dx], [*together.y, together.dx], strict=True):
        assert torch.equal(flat(mine)[rows], flat(theirs)[rows])


# --- as torch operators ---------------------------------------------------------------------------------------------------


def op_cases() -> list[Any]:
    found = []
    for name, case in (("dropout", SMALL), ("plain", PLAIN), ("no banks", NOBODY)):
        args = made(case)
        *_, narrow = host.linears(**args, forms="")
        back = backward_args(args, upstream(args), narrow)
        grads = [torch.zeros(table.shape) for table in (*args["a"], *args["b"])]
        learnt = args | {key: required(args[key]) for key in ("x", "a", "b")}
        into = {"grads": grads, "dx": torch.zeros_like(args["x"]), **back, "forms": ""}
        found += [
            pytest.param(ops.LINEARS, learnt | {"forms": ""}, id=f"linears, {name}"),
            pytest.param(ops.LINEARS_BACKWARD, {**back, "wants_dx": True, "forms": ""}, id=f"linears_backward, {name}"),
            pytest.param(ops.LINEARS_BACKWARD_, into, id=f"linears_backward_, {name}"),
        ]
    frozen = made(PLAIN)
    *_, narrow = host.linears(**frozen, forms="")
    back = backward_args(frozen, upstream(frozen), narrow)
    grads = [torch.zeros(table.shape) for table in (*frozen["a"], *frozen["b"])]
    return [
        *found,
        pytest.param(ops.LINEARS_BACKWARD, {**back, "wants_dx": False, "forms": ""}, id="linears_backward, no dx"),
        pytest.param(ops.LINEARS_BACKWARD_, {"grads": grads, "dx": None, **back, "forms": ""}, id="linears_backward_, no dx"),
    ]


@pytest.mark.parametrize(("op", "args"), op_cases())
def test_torch_finds_no_fault_with_the_operator(op: Any, args: dict[str, Any]) -> None:
    torch.library.opcheck(op, (), args)


@pytest.mark.parametrize("case", [SMALL, PLAIN, NOBODY], ids=["dropout", "plain", "no banks"])
def test_the_operator_compiles_as_one_graph(case: Shapes) -> None:
    args = made(case)
    leaves = {name: required(args[name]) for name in ("x", "a", "b")}
    wanted = [leaves["x"], *leaves["a"], *leaves["b"]]

    def loss(**given: Any) -> Tensor:
        *y, _ = mux.linears(**{**args, **given}, forms="")
        return sum((own.square().sum() for own in y), torch.zeros(()))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(**leaves), compiled(**leaves)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_flops_are_those_of_the_frozen_products_and_of_the_widest_bank() -> None:
    args = made(SMALL)
    args |= {name: required(args[name]) for name in ("x", "a", "b")}
    with FlopCounterMode(display=False) as counter:
        *y, narrow = mux.linears(**args, forms="")
        sum(own.sum() for own in y).backward()
    frozen = 2 * SMALL.tokens * 32 * (48 + 16)
    adapters = 2 * SMALL.tokens * 8 * (2 * 32 + 48 + 16)  # the first bank: A and B of both its members
    assert {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()} == {
        "mux.linears": frozen + adapters,
        "mux.linears_backward": frozen + 2 * adapters,
    }
    plain = {name: [t.detach() for t in args[name]] for name in ("a", "b")} | {"x": args["x"].detach()}
    back = backward_args(args | plain, upstream(args), narrow.detach())
    grads = [torch.zeros(table.shape) for table in (*args["a"], *args["b"])]
    for dx in (None, torch.zeros_like(plain["x"])):
        with FlopCounterMode(display=False) as counter:
            mux.linears_backward_(grads=grads, dx=dx, **back, forms="")
        assert counter.get_total_flops() == 2 * adapters + (0 if dx is None else frozen)
        with FlopCounterMode(display=False) as counter:
            mux.linears_backward(**back, wants_dx=dx is not None, forms="")
        assert counter.get_total_flops() == 2 * adapters + (0 if dx is None else frozen)
    assert nobody_flops() == 2 * NOBODY.tokens * 32 * (48 + 16)


def nobody_flops() -> int:
    with FlopCounterMode(display=False) as counter:
        mux.linears(**made(NOBODY), forms="")
    return counter.get_total_flops()


# --- wrong arguments ------------------------------------------------------------------------------------------------------

# SMALL: x [2, 40, 32]; weights [48, 32], [16, 32]; a [3, 16, 32], [2, 3, 32]; b [3, 8, 48], [3, 8, 16], [2, 3, 16];
# members 0, 1, 1; the first bank drops.


def put(name: str, index: int, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """Replace a member of a list."""

    def edit(args: dict[str, Any]) -> None:
        args[name] = [*args[name][:index], change(args[name][index]), *args[name][index + 1 :]]

    return edit


def turn(x: Tensor) -> Tensor:
    """The same values with other strides."""
    return x.mT.contiguous().mT


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def with_(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Replace arguments, by values or by functions of the old ones."""

    def edit(args: dict[str, Any]) -> None:
        args |= {name: value(args[name]) if callable(value) else value for name, value in values.items()}

    return edit


def both(*edits: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def edit(args: dict[str, Any]) -> None:
        for each in edits:
            each(args)

    return edit


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "x in one dimension": (with_(x=lambda x: x[0, 0]), r"x must be .*\(32,\)"),
    "no weights": (with_(weights=[], biases=[]), r"weights is empty"),
    "biases of another number": (with_(biases=[None]), r"biases has 1 entries, weights has 2"),
    "a weight of other features": (put("weights", 1, lambda w: w[:, :31]), r"weights\[1\] .*\(16, 31\)"),
    "a weight in one dimension": (put("weights", 0, lambda w: w[0]), r"weights\[0\] .*\(32,\)"),
    "a weight of another dtype": (put("weights", 0, Tensor.double), r"weights\[0\] .*float64"),
    "a bias of another length": (put("biases", 0, lambda bias: bias[:5]), r"biases\[0\] .*\(5,\)"),
    "a bias of another dtype": (put("biases", 0, Tensor.half), r"biases\[0\] .*float16"),
    "routes of another number": (with_(route=lambda route: route[:1]), r"route has 1 entries, a has 2"),
    "scales of another number": (with_(scale=lambda scale: scale[:2]), r"scale has 2 entries, b has 3"),
    "a in two dimensions": (put("a", 1, lambda a: a[0]), r"\ba\[1\] .*\(3, 32\)"),
    "a of another dtype": (put("a", 0, Tensor.bfloat16), r"\ba\[0\] .*bfloat16"),
    "a with other strides": (put("a", 0, turn), r"\ba\[0\] must be contiguous"),
    "a of other features": (put("a", 1, lambda a: a[:, :, :30].contiguous()), r"\ba\[1\] has 30 features, x has 32"),
    "b in two dimensions": (put("b", 2, lambda b: b[0]), r"\bb\[2\] .*\(3, 16\)"),
    "b of another dtype": (put("b", 1, Tensor.double), r"\bb\[1\] .*float64"),
    "b with other strides": (put("b", 0, turn), r"\bb\[0\] must be contiguous"),
    "b of another number of slots": (put("b", 1, lambda b: b[:2]), r"\bb\[1\] must be \(3, 8, 16\).*\(2, 8, 16\)"),
    "b of other features": (put("b", 0, lambda b: b[:, :, :40].contiguous()), r"\bb\[0\] must be \(3, 8, 48\).*\(3, 8, 40\)"),
    "members of another number": (with_(members=[0, 1]), r"members has 2 entries, b has 3"),
    "rank 257": (
        both(put("a", 1, lambda a: a.new_zeros(2, 257, 32)), put("b", 2, lambda b: b.new_zeros(2, 257, 16))),
        r"\bb\[2\] has rank 257, must be 1 to 256",
    ),
    "rank 0": (
        both(put("a", 1, lambda a: a[:, :0].contiguous()), put("b", 2, lambda b: b[:, :0].contiguous())),
        r"\bb\[2\] has rank 0, must be 1 to 256",
    ),
    "rows of a that are no multiple": (put("a", 0, lambda a: a[:, :15].contiguous()), r"\ba\[0\] has 15 rows.*rank 8"),
    "a without a table in b": (
        both(with_(b=lambda b: b[:2], scale=lambda scale: scale[:2], members=[0, 1])),
        r"\ba\[1\] has no table in b",
    ),
    "a with rows for more tables": (
        put("a", 1, lambda a: a.new_zeros(2, 6, 32)),
        r"\ba\[1\] has rows for 2 tables of b, 1 are left",
    ),
    "tables of b that nobody has": (
        with_(a=lambda a: a[:1], route=lambda r: r[:1], drops=[1]),
        r"\bb has 3 tables, a has rows for 2",
    ),
    "a bank of two ranks": (put("b", 1, lambda b: b[:, :4].contiguous()), r"\bb\[1\] has rank 4, b\[0\] has 8"),
    "a member beyond the linears": (with_(members=[0, 2, 1]), r"members\[1\] is 2, there are 2 linears"),
    "a negative member": (with_(members=[-1, 1, 1]), r"members\[0\] is -1, there are 2 linears"),
    "a member twice": (with_(members=[1, 1, 1]), r"members of a\[0\] name a linear twice"),
    "drops of another number": (with_(drops=[1]), r"drops has 1 entries, a has 2"),
    "a route of int64": (put("route", 1, Tensor.long), r"route\[1\] must be contiguous int32.*int64"),
    "a route in two dimensions": (put("route", 0, lambda route: route[None]), r"route\[0\] must be contiguous int32 .*\(1, 5\)"),
    "an empty route": (with_(route=lambda route: [own[:0] for own in route]), r"x has 80 rows, .*route\[0\]'s 0 blocks"),
    "rows that are no whole blocks": (with_(route=lambda route: [own[:3] for own in route]), r"x has 80 rows.*3 blocks"),
    "routes of other blocks": (put("route", 1, lambda route: route[:4]), r"route\[1\] has 4 blocks, route\[0\] has 5"),
    "a scale of another length": (put("scale", 1, lambda scale: scale[:2]), r"scale\[1\] .*\(2,\)"),
    "a scale of float64": (put("scale", 2, Tensor.double), r"scale\[2\] .*float64"),
    "no keys": (with_(drop=[]), r"drop has 0 entries, 1 banks drop"),
    "no sites": (with_(sites=[]), r"sites has 0 entries, 1 banks drop"),
    "keys of another shape": (put("drop", 0, lambda drop: drop[:2]), r"drop\[0\] must be .*\(3, 3\).*\(2, 3\)"),
    "keys of int64": (put("drop", 0, Tensor.long), r"drop\[0\] .*int64"),
    "sites of another length": (put("sites", 0, lambda sites: sites[:1]), r"sites\[0\] must be .*\(2, 2\).*\(1, 2\)"),
    "sites of int64": (put("sites", 0, Tensor.long), r"sites\[0\] .*int64"),
    "no sequences": (with_(sequences=None), r"sequences .*80 rows.*None"),
    "no positions": (with_(positions=None), r"positions .*80 rows.*None"),
    "sequences of int64": (with_(sequences=Tensor.long), r"sequences .*int64"),
    "positions of another length": (with_(positions=lambda positions: positions[:7]), r"positions .*80 rows.*\(7,\)"),
    **{
        f"{name} on another device": (put(name, 0, meta), rf"{name}\[0\] is on meta, the first argument on cpu")
        for name in ("weights", "a", "b", "scale", "route", "drop", "sites")
    },
    # Seen to pass the checks: on CUDA such a pointer would be read on the wrong device.
    "biases on another device": (put("biases", 0, meta), r"biases\[0\] is on meta, the first argument on cpu"),
    "sequences on another device": (with_(sequences=meta), r"sequences is on meta, the first argument on cpu"),
    "positions on another device": (with_(positions=meta), r"positions is on meta, the first argument on cpu"),
    # Seen to pass the checks and to end in a StopIteration of the device.
    "a without rows": (
        with_(
            a=lambda a: [a[0].new_zeros(3, 0, 32), *a],
            route=lambda route: [torch.full_like(route[0], -1), *route],
            drops=lambda drops: [0, *drops],
        ),
        r"\ba\[0\] has 0 rows",
    ),
}
WRONG_BACKWARD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "dy of another number": (with_(dy=lambda dy: dy[:1]), r"dy has 1 entries, weights has 2"),
    "dy of another shape": (put("dy", 1, lambda dy: dy[0]), r"dy\[1\] must be .*\(2, 40, 16\).*\(40, 16\)"),
    "dy of another dtype": (put("dy", 0, Tensor.double), r"dy\[0\] .*float64"),
    "narrow of another width": (with_(narrow=lambda narrow: narrow[:, :8].contiguous()), r"narrow must be .*\(80, 16\).*\(80, 8\)"),
    "narrow of another dtype": (with_(narrow=Tensor.double), r"narrow .*float64"),
    "narrow with other strides": (with_(narrow=turn), r"narrow must be contiguous"),
    "gradients of another number": (with_(grads=lambda grads: grads[:4]), r"grads has 4 entries, there are 5 tables"),
    "a gradient of another shape": (put("grads", 3, lambda grad: grad[:2]), r"grads\[3\] .*\(3, 8, 16\).*\(2, 8, 16\)"),
    "a gradient of bfloat16": (put("grads", 0, Tensor.bfloat16), r"grads\[0\] .*bfloat16"),
    "a gradient with other strides": (put("grads", 4, turn), r"grads\[4\] must be contiguous"),
    "dx of another shape": (with_(dx=lambda dx: dx[0]), r"dx must be .*\(2, 40, 32\).*\(40, 32\)"),
    "dx of another dtype": (with_(dx=Tensor.half), r"dx .*float16"),
    "dx with other strides": (with_(dx=turn), r"dx must be contiguous"),
    "grads on another device": (put("grads", 0, meta), r"grads\[0\] is on meta"),
    "dx on another device": (with_(dx=meta), r"dx is on meta"),
    "dy on another device": (put("dy", 1, meta), r"dy\[1\] is on meta"),
    "narrow on another device": (with_(narrow=meta), r"narrow is on meta"),
}


def backward_case() -> dict[str, Any]:
    args = made(SMALL)
    *_, narrow = host.linears(**args, forms="")
    grads = [torch.zeros(table.shape) for table in (*args["a"], *args["b"])]
    return {"grads": grads, "dx": torch.zeros_like(args["x"]), **backward_args(args, upstream(args), narrow)}


def refused(op: Any, args: dict[str, Any], message: str, tracing: bool) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.utils._pytree import tree_map

    if not tracing:
        with pytest.raises(ValueError, match=message):
            op(**args, forms="")
        return
    mode = FakeTensorMode()
    fakes = tree_map(lambda given: mode.from_tensor(given) if isinstance(given, Tensor) else given, args)
    with mode, pytest.raises(ValueError, match=message):
        op(**fakes, forms="")


@pytest.mark.parametrize("tracing", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str, tracing: bool) -> None:
    edit, message = WRONG[name]
    args = made(SMALL)
    edit(args)
    refused(mux.linears, args, "linears: " + message.removeprefix(r"\b"), tracing)


@pytest.mark.parametrize("tracing", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_a_wrong_argument_of_the_backward_is_named(name: str, tracing: bool) -> None:
    edit, message = WRONG_BACKWARD[name]
    args = backward_case()
    edit(args)
    refused(mux.linears_backward_, args, "linears_backward: " + message, tracing)


@pytest.mark.parametrize("name", ["a with other strides", "a scale of float64", "keys of int64", "sequences of int64"])
def test_the_backward_checks_the_arguments_of_the_forward_as_well(name: str) -> None:
    edit, message = WRONG[name]
    args = backward_case()
    edit(args)
    refused(mux.linears_backward_, args, message, tracing=False)


@pytest.mark.parametrize("name", ["biases", "scale", "route", "drop", "sites"])
def test_a_small_tensor_with_other_strides_is_refused_or_read_rightly(name: str, interpreted_device: SimpleNamespace) -> None:
    # The kernels read these as if they were contiguous: with other strides results were seen to be wrong without an error.
    args = made(SMALL)
    args[name] = [None if given is None else torch.stack([given, given + 7], -1)[..., 0] for given in args[name]]
    try:
        _check_linears(**args)
    except ValueError as error:
        assert f"{name}[0]" in str(error)  # noqa: PT017
        return
    expected = run(reference, args)
    for mine, theirs in zip(run(interpreted_device, args, "y=fused,fused dx=fused").tensors, expected.tensors, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ("y=fused", r"'y=fused' is not of the form"),
        ("dx=fused y=fused,fused z=fused", r"is not of the form"),
        ("y=fused,quick dx=fused", r"no lowering 'quick' \(there are accumulate, epilogue, fused\)"),
        ("y=fused dx=fused", r"has 1 outputs, there are 2 linears"),
    ],
)
def test_wrong_forms_are_named(forms: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device.linears(**made(PLAIN), forms=forms)


@given(y=st.lists(st.sampled_from(FORMS), min_size=1, max_size=4).map(tuple), dx=st.sampled_from(FORMS))
def test_forms_print_as_text_that_parses_to_them(y: tuple[str, ...], dx: str) -> None:
    assert Forms.parse(str(Forms(y, dx))) == Forms(y, dx)

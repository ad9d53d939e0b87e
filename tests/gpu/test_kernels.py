"""The mux products on a CUDA device: errors against float32, bits of a task beside others, containment, graphs and launches.

Sizes are a Llama layer's scaled down, in blocks of 128 rows; the sums that are compared for bits run at true sizes as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import ops, reference
from codegen.lower import FORMS

pytestmark = pytest.mark.gpu

mux = torch.ops.mux
DEVICE, TILE = "cuda", 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NanMemory = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Task:
    """An adapter of some linears on some blocks of the chunk."""

    rank: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    rate: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Linears of one input, and the tasks that adapt them."""

    tasks: tuple[Task, ...]
    blocks: int = 8
    features: int = 512
    outputs: tuple[int, ...] = (768, 256, 256)
    dtype: torch.dtype = BF16
    biases: bool = False

    @property
    def banks(self) -> dict[tuple[int, tuple[int, ...], bool], list[int]]:
        """Tasks of one rank that adapt the same linears and drop elements, or do not, by index."""
        found: dict[tuple[int, tuple[int, ...], bool], list[int]] = {}
        for index, task in enumerate(self.tasks):
            found.setdefault((task.rank, task.members, task.rate > 0), []).append(index)
        return found

    def rows(self, index: int) -> Tensor:
        return torch.cat([torch.arange(block * TILE, (block + 1) * TILE, device=DEVICE) for block in self.tasks[index].blocks])


class Data:
    """Tensors of a problem. What belongs to a task follows from the task alone: with other neighbours it is the same.

    Args:
        seed: of everything that is not a task's own: the frozen weights excepted.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem, self.seed = problem, seed
        tokens, features = problem.blocks * TILE, problem.features
        frozen = self._generator(1)
        self.weights = [self._normal(frozen, size, features, deviation=features**-0.5) for size in problem.outputs]
        self.biases = [self._normal(frozen, size) if problem.biases else None for size in problem.outputs]
        others = self._generator(2 + seed)
        self.x = self._normal(others, tokens, features)
        self.dy = [self._normal(others, tokens, size) for size in problem.outputs]
        self.sequences = torch.arange(tokens, dtype=torch.int32, device=DEVICE) // 100
        self.positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 100
        self.own: list[dict[str, Any]] = []
        for index, task in enumerate(problem.tasks):
            mine, count = self._generator(hash((task.rank, task.members, task.blocks)) % 2**31), len(task.blocks) * TILE
            rows = problem.rows(index)
            self.x[rows] = self._normal(mine, count, features)
            for dy in self.dy:
                dy[rows] = self._normal(mine, count, dy.shape[1])
            threshold = int(task.rate * 2**32)
            words = torch.tensor([task.rank, 17 * task.blocks[0] + 1, threshold - (2**32 if threshold >= 2**31 else 0)])
            self.own.append(
                {
                    "a": self._normal(mine, task.rank * len(task.members), features, deviation=features**-0.5),
                    "b": [self._normal(mine, task.rank, problem.outputs[m], deviation=task.rank**-0.5) for m in task.members],
                    "scale": [torch.rand((), generator=mine, device=DEVICE) + 0.5 for _ in task.members],
                    "drop": words.to(DEVICE, torch.int32),
                }
            )

    @staticmethod
    def _generator(seed: int) -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(seed)

    def _normal(self, generator: torch.Generator, *shape: int, deviation: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=DEVICE) * deviation).to(self.problem.dtype)

    def arguments(self) -> dict[str, Any]:
        """What `reference.linears` takes."""
        args: dict[str, Any] = {"x": self.x, "weights": self.weights, "biases": self.biases, "members": [], "drops": []}
        args |= {name: [] for name in ("a", "b", "scale", "route", "drop", "sites")} | {"sequences": None, "positions": None}
        for (_, members, drops), tasks in self.problem.banks.items():
            own = [self.own[task] for task in tasks]
            args["a"].append(torch.stack([each["a"] for each in own]))
            args["b"] += [torch.stack([each["b"][place] for each in own]) for place in range(len(members))]
            args["scale"] += [torch.stack([each["scale"][place] for each in own]) for place in range(len(members))]
            args["members"] += members
            args["drops"].append(int(drops))
            route = torch.full((self.problem.blocks,), -1, dtype=torch.int32)
            for slot, task in enumerate(tasks):
                route[list(self.problem.tasks[task].blocks)] = slot
            args["route"].append(route.to(DEVICE))
            if drops:
                args["drop"].append(torch.stack([each["drop"] for each in own]))
                args["sites"].append(torch.tensor([[member + 5, 7] for member in members], dtype=torch.int32, device=DEVICE))
                args |= {"sequences": self.sequences, "positions": self.positions}
        return args

    def exact(self) -> Data:
        """The same numbers in float32."""
        found = Data(self.problem, self.seed)
        found.weights, found.dy = [w.float() for w in self.weights], [dy.float() for dy in self.dy]
        found.biases = [None if bias is None else bias.float() for bias in self.biases]
        found.x = self.x.float()
        found.own = [own | {"a": own["a"].float(), "b": [table.float() for table in own["b"]]} for own in self.own]
        return found


@dataclass
class Results:
    y: list[Tensor]
    narrow: Tensor
    dx: Tensor
    grads: list[Tensor]

    def of_task(self, problem: Problem, index: int) -> dict[str, Tensor]:
        """What a task sees: its rows of y and dx, and its gradients."""
        rows = problem.rows(index)
        found = {f"y[{place}]": y[rows] for place, y in enumerate(self.y)} | {"dx": self.dx[rows]}
        place = len(problem.banks)
        for bank, ((_, members, _), tasks) in enumerate(problem.banks.items()):
            if index in tasks:
                slot = tasks.index(index)
                found["dA"] = self.grads[bank][slot]
                found |= {f"dB[{member}]": self.grads[place + order][slot] for order, member in enumerate(members)}
            place += len(members)
        return found


def run(data: Data, forms: str | None, held: float = 0.0) -> Results:
    """Forward and backward, by the operators in `forms` or by the reference (None); dx holds NaN before."""
    args = data.arguments()
    *y, narrow = reference.linears(**args) if forms is None else mux.linears(**args, forms=forms)
    grads = [torch.full(table.shape, held, device=DEVICE) for table in (*args["a"], *args["b"])]
    dx = torch.full_like(args["x"], math.nan)
    back = {name: value for name, value in args.items() if name != "biases"}
    back |= {"grads": grads, "dx": dx, "dy": data.dy, "narrow": narrow}
    if forms is None:
        reference.linears_backward(**back)
    else:
        mux.linears_backward_(**back, forms=forms)
    return Results(y, narrow, dx, grads)


def text(form: str, outputs: int = 3) -> str:
    return f"y={','.join([form] * outputs)} dx={form}"


def relative(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(exact))


def no_worse_than_plain(data: Data, forms: str, memory: NanMemory) -> None:
    """Every tensor of every task is at most twice as far from float32 as plain torch in the same dtype is."""
    problem = data.problem
    exact, plain = run(data.exact(), None), run(data, None)
    with memory():
        found = run(data, forms)
    floor = 1e-5 if problem.dtype == FP32 else 1e-6
    for index in range(len(problem.tasks)):
        mine, theirs, truth = (results.of_task(problem, index) for results in (found, plain, exact))
        for name, expected in truth.items():
            assert mine[name].dtype == theirs[name].dtype
            error, usual = relative(mine[name], expected), relative(theirs[name], expected)
            assert error <= max(2 * usual, floor), f"task {index}: {name}: {error:.2e}, plain torch {usual:.2e}"
    for y, expected in zip(found.y, exact.y, strict=True):  # rows of nobody as well
        assert relative(y, expected) <= (1e-5 if problem.dtype == FP32 else 1e-2)
    assert relative(found.dx, exact.dx) <= (1e-5 if problem.dtype == FP32 else 1e-2)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# --- meaning --------------------------------------------------------------------------------------------------------------


def mixed(rate: float) -> Problem:
    """Every rank in one launch, over other linears each; blocks that are not adjacent, and one of nobody."""
    return Problem(
        (
            Task(8, (0, 1, 2), (0, 4), rate),
            Task(16, (0,), (1,), rate),
            Task(64, (1, 2), (2, 6), rate),
            Task(256, (0, 2), (3,), rate),
            Task(8, (0, 1, 2), (7,), rate),
        )
    )


@pytest.mark.parametrize(("dtype", "rate"), [(BF16, 0.0), (BF16, 0.1), (FP16, 0.1), (FP32, 0.1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_mixed_ranks_in_one_launch_lose_no_more_than_plain_torch(
    form: str, dtype: torch.dtype, rate: float, nan_memory: NanMemory
) -> None:
    problem = replace(mixed(rate), dtype=dtype, biases=form != "accumulate")
    no_worse_than_plain(Data(problem), text(form), nan_memory)


def test_the_operators_own_choice_loses_no_more_than_plain_torch(nan_memory: NanMemory) -> None:
    no_worse_than_plain(Data(mixed(0.1)), "", nan_memory)


def test_every_output_may_have_a_form_of_its_own(nan_memory: NanMemory) -> None:
    no_worse_than_plain(Data(mixed(0.1)), "y=fused,accumulate,epilogue dx=fused", nan_memory)


@pytest.mark.parametrize("form", FORMS)
def test_70_adapters_in_one_chunk_lose_no_more_than_plain_torch(form: str, nan_memory: NanMemory) -> None:
    places = [(37 * index) % 70 for index in range(70)]
    tasks = (Task(16 if index < 66 else 8, (0, 1), (place,), 0.1 * (index >= 66)) for index, place in enumerate(places))
    no_worse_than_plain(Data(Problem(tuple(tasks), blocks=70)), text(form), nan_memory)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_of_true_size_loses_no_more_than_plain_torch(form: str, nan_memory: NanMemory) -> None:
    tasks = (Task(16, (0,), (0, 1, 2, 9)), Task(16, (0,), (3, 4), 0.05), Task(64, (0,), (5, 6, 7, 8)), Task(8, (0,), (15,)))
    no_worse_than_plain(Data(Problem(tasks, 16, 4096, (14336,))), text(form, 1), nan_memory)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_products_by_block_lose_no_more_than_plain_torch(dtype: torch.dtype, nan_memory: NanMemory) -> None:
    """tile_mm in both directions, tile_outer and drop, at sizes that are no multiples of a step."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    route = torch.tensor([1, 0, -1, 1, 3], dtype=torch.int32, device=DEVICE)
    scale, floor = torch.rand(5, generator=generator, device=DEVICE) + 0.5, 1e-5 if dtype == FP32 else 1e-6

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    x, dy, w = normal(5 * TILE, 100), normal(5 * TILE, 40), normal(5, 100, 40)
    for transpose, left in ((False, x), (True, dy)):
        with nan_memory():
            found = mux.tile_mm(left, w, route, scale, transpose)
        exact, plain = (reference.tile_mm(left.to(kind), w.to(kind), route, scale, transpose) for kind in (FP32, dtype))
        assert relative(found, exact) <= max(2 * relative(plain, exact), floor)
        assert torch.equal(found[2 * TILE : 3 * TILE], torch.zeros_like(found[2 * TILE : 3 * TILE]))
    expected = torch.zeros(5, 100, 40, device=DEVICE)
    reference.tile_outer(expected, x, dy, route, scale)
    assert relative(mux.tile_outer(x, dy, route, scale, 5), expected) <= 1e-5
    keys = torch.tensor([[1, 2, 2**30]] * 5, dtype=torch.int32, device=DEVICE)
    rows, site = torch.arange(5 * TILE, dtype=torch.int32, device=DEVICE), torch.tensor([[3, 1]], dtype=torch.int32, device=DEVICE)
    dropped = ops.DROP(x, keys, site, route, rows // 50, rows % 50)
    keys, place, route, rows = (own.cpu() for own in (keys, site[0], route, rows))
    factor = reference.dropout_factor(keys, place, route, rows // 50, rows % 50, 100)
    assert torch.equal(dropped.cpu(), (x.cpu() * factor).to(dtype))


def test_a_gradient_begins_with_what_its_table_already_held() -> None:
    data = Data(replace(mixed(0.1), dtype=FP32))
    fresh, held = run(data, text("epilogue")), run(data, text("epilogue"), held=3.0)
    for found, expected in zip(held.grads, fresh.grads, strict=True):
        torch.testing.assert_close(found, expected + 3.0, rtol=1e-4, atol=1e-4)


# --- bits -----------------------------------------------------------------------------------------------------------------

TENANTS = (
    Task(8, (0,), (0,), 0.1),
    Task(16, (0, 1, 2), (1,)),
    Task(64, (1, 2), (2,), 0.1),
    Task(256, (0, 2), (3,)),
    Task(8, (0, 1, 2), (4,), 0.25),
    Task(32, (2,), (5,)),
    Task(16, (0, 1, 2), (6,)),
    Task(8, (1,), (7,)),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_three_runs_have_the_same_bits(form: str, dtype: torch.dtype) -> None:
    data = Data(replace(Problem(TENANTS), dtype=dtype))
    first, *others = (run(data, text(form)) for _ in range(3))
    for other in others:
        pairs = zip((*first.y, first.dx, *first.grads), (*other.y, other.dx, *other.grads), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_task_has_the_bits_that_it_has_alone(index: int, form: str) -> None:
    # At the same T and places; alone there is no other bank, and the rows of the others hold other values.
    together, alone = Problem(TENANTS), Problem(TENANTS[index : index + 1])
    expected = run(Data(together), text(form)).of_task(together, index)
    equal(run(Data(alone, seed=1), text(form)).of_task(alone, 0), expected)


SIZES = {
    "small": (8, 512, (768, 256, 256)),
    "qkv of 2048 tokens": (16, 4096, (4096, 1024, 1024)),
    "qkv of 8192 tokens": (64, 4096, (4096, 1024, 1024)),
    "gate and up": (16, 4096, (14336, 14336, 4096)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_neighbour_that_adapts_another_linear_changes_no_bits(size: str, form: str) -> None:
    # With the neighbour linears 1 and 2 run in their form, without it they are frozen linears alone.
    mine, other = Task(16, (0,), (0, 3)), Task(8, (1, 2), (1, 6))
    blocks, features, outputs = SIZES[size]
    alone, together = (Problem(tasks, blocks, features, outputs) for tasks in ((mine,), (mine, other)))
    # The neighbour's rows hold other values in the two, everything else the same.
    found, expected = run(Data(alone), text(form)), run(Data(together), text(form))
    rest = torch.ones(blocks * TILE, dtype=torch.bool, device=DEVICE)
    rest[together.rows(1)] = False
    for name, left, right in zip(("y0", "y1", "y2", "dx"), [*found.y, found.dx], [*expected.y, expected.dx], strict=True):
        assert torch.equal(left[rest], right[rest]), name
    equal(found.of_task(alone, 0), expected.of_task(together, 0))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_what_one_task_holds_reaches_nobody_else(form: str, poison: float) -> None:
    problem = mixed(0.1)
    data = Data(problem)
    clean = run(data, text(form))
    for broken in (0, 3):
        bad = Data(problem)
        rows = problem.rows(broken)
        for given in (bad.x, *bad.dy):
            given[rows] = poison
            given[5 * TILE : 6 * TILE] = poison  # the block of nobody
        own = bad.own[broken]
        own |= {
            "a": torch.full_like(own["a"], poison),
            "b": [torch.full_like(table, poison) for table in own["b"]],
            "scale": [torch.full_like(scale, poison) for scale in own["scale"]],
        }
        found = run(bad, text(form))
        for index in {*range(len(problem.tasks))} - {broken}:
            equal(found.of_task(problem, index), clean.of_task(problem, index))
        assert not any(value.isfinite().all() for value in found.of_task(problem, broken).values())


# --- as CUDA programs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_replayed_graph_computes_what_an_eager_run_does(form: str) -> None:
    problem = mixed(0.1)
    data, fresh = Data(problem), Data(problem)
    args = data.arguments()  # tables are copies: the graph reads these
    grads = [torch.zeros(table.shape, device=DEVICE) for table in (*args["a"], *args["b"])]
    dx = torch.full_like(args["x"], math.nan)
    back = {name: value for name, value in args.items() if name != "biases"} | {"grads": grads, "dx": dx, "dy": data.dy}

    def step() -> list[Tensor]:
        *y, narrow = mux.linears(**args, forms=text(form))
        mux.linears_backward_(**back, narrow=narrow, forms=text(form))
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # kernels are compiled before a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    # Other values than those of the capture.
    fresh.x, fresh.dy = data.x.flip(1).contiguous(), [dy.flip(1).contiguous() for dy in data.dy]
    data.x.copy_(fresh.x)
    for mine, theirs in zip(data.dy, fresh.dy, strict=True):
        mine.copy_(theirs)
    expected = run(fresh, text(form))
    for grad in grads:
        grad.zero_()
    for output in (*y, dx):
        output.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    pairs = zip((*y, dx, *grads), (*expected.y, expected.dx, *expected.grads), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def launches(problem: Problem, forms: str) -> int:
    """Kernels that a forward and a backward start."""
    data = Data(problem)
    args = data.arguments()
    grads = [torch.zeros(table.shape, device=DEVICE) for table in (*args["a"], *args["b"])]
    back = {name: value for name, value in args.items() if name != "biases"}
    back |= {"grads": grads, "dx": torch.empty_like(data.x), "dy": data.dy}

    def step() -> None:
        *_, narrow = mux.linears(**args, forms=forms)
        mux.linears_backward_(**back, narrow=narrow, forms=forms)

    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.count for event in profile.key_averages() if event.device_type == on_device)


@pytest.mark.parametrize("form", FORMS)
def test_launches_do_not_grow_with_the_number_of_adapters(form: str) -> None:
    few, many = (
        Problem(tuple(Task(8 + 8 * (index % 2), (0, 1), (index,)) for index in range(count)), blocks=32) for count in (2, 32)
    )
    counted = launches(few, text(form))
    assert 0 < counted == launches(many, text(form))

"""What ranks send through symmetric memory, and models on meshes of them, recorded and in lanes.

Where there are fewer GPUs than ranks they share them: what is found is the same, and takes longer.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import muxcompile
from runtime.comm import Mesh, Ranks
from tests.dist.processes import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 4


@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_have_the_bits_of_the_addition_whatever_runs_beside_them(count: int) -> None:
    for found in run("tests.gpu.test_ranks:sums", count, count, backend="nccl"):
        assert found == []


def test_messages_arrive_in_order_when_the_receiver_is_late() -> None:
    for found in run("tests.gpu.test_ranks:messages", 2, backend="nccl"):
        assert found == []


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2", "dp=2", "pp=2,tp=2", "dp=2,pp=2"])
def test_a_mesh_trains_as_one_gpu_does(mesh: str) -> None:
    for found in run("tests.gpu.test_ranks:as_one", Mesh.of(mesh).size, mesh, backend="nccl", seconds=400.0):
        assert found == []


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_a_run_on_a_mesh_has_the_bits_of_another(mesh: str) -> None:
    """What runs beside something else must not read or write what that does."""
    for found in run("tests.gpu.test_ranks:twice", 2, mesh, backend="nccl", seconds=400.0):
        assert found == []


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_a_gpu_that_waits_too_long_says_in_which_action(mesh: str, tmp_path: Path) -> None:
    said, other = run("tests.gpu.test_ranks:left_alone", 2, mesh, str(tmp_path / "over"), backend="nccl", seconds=400.0)
    assert other is None
    place = f"rank 0 (replica 0, stage 0, shard 0 of mesh dp=1,{'pp=2,tp=1' if mesh == 'pp=2' else 'pp=1,tp=2'})"
    # The first round is on its way: of its two groups one or both were begun, and none is over without the other rank.
    assert said.startswith(f"{place}: the device stopped in "), said
    assert "stage.0 of micro-batch 0" in said, said


# --- what a rank does ---


def joined(mesh: str) -> Ranks:
    return Ranks(mesh, torch.device("cuda", torch.cuda.current_device()), 60.0)


def sums(count: int) -> list[str]:
    """Two lanes sum at a time, recorded, each its own tensors, many times."""
    ranks = joined(f"tp={count}")
    if not ranks.symmetric:
        return ["no symmetric memory"]
    shape = (1024, 512)
    ranks.reserve({}, 2 * 1024 * 512, 0, flight=(2,), lanes=2)
    device = ranks.device
    lanes = [torch.cuda.Stream() for _ in range(2)]
    given = [
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(10 * lane + rank)).bfloat16().to(device)
            for rank in range(count)
        ]
        for lane in range(2)
    ]
    graphs, found = [], []
    for lane in range(2):
        mine, before = given[lane][ranks.rank].clone(), given[lane]
        wanted = torch.zeros(shape, device=device, dtype=torch.bfloat16)
        for turn in range(5):
            wanted = wanted + sum((own + turn).float() for own in before).bfloat16()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=lanes[lane], capture_error_mode="thread_local"):
            ranks.begin(lane)
            total = torch.zeros(shape, device=device, dtype=torch.bfloat16)
            for turn in range(5):
                total = total + ranks.total(mine + turn, "tp")
        graphs.append((graph, total, wanted, mine))
    for _ in range(50):
        for lane in range(2):
            with torch.cuda.stream(lanes[lane]):
                graphs[lane][0].replay()
                found.append((lane, (graphs[lane][1] != graphs[lane][2]).sum()))
    torch.cuda.synchronize()
    return [f"lane {lane}: {int(wrong)} elements" for lane, wrong in found if int(wrong)]


def messages() -> list[str]:
    """More than there is room for, to a rank that comes late, both ways."""
    ranks = joined("pp=2")
    if not ranks.symmetric:
        return ["no symmetric memory"]
    shape, device, other = (256, 128), ranks.device, 1 - ranks.stage
    form = (shape, torch.float32)
    small = ((3,), torch.int32)
    ranks.reserve({other: 256 * 128 * 4 + 256}, 0, 64, flight=(2, 1), lanes=1)
    count, wrong = 40, []
    sent = []
    if ranks.stage == 0:
        for number in range(3):
            sent.append(
                ranks.send([torch.full(shape, 1.0 * number, device=device), torch.full((3,), number, device=device).int()], 1)
            )
    for number in range(count):
        if ranks.stage == 0:
            if number + 3 < count:
                tensors = [torch.full(shape, 3.0 + number, device=device), torch.full((3,), number + 3, device=device).int()]
                sent.append(ranks.send(tensors, 1))
            back, _ = ranks.receive([form, small], 1)
            wrong.append(((back - 2.0 * number).abs().max(), number))
        else:
            torch.cuda._sleep(3_000_000 if number % 7 == 0 else 1000)
            got, mark = ranks.receive([form, small], 0)
            wrong.append(((got - number).abs().max() + (mark - number).abs().max(), number))
            sent.append(ranks.send([got * 2, mark], 0))
    for work in sent:
        work()
    torch.cuda.synchronize()
    for number in range(12):
        # Whoever reads three figures has posted the next three only when it had read the three before: six places do.
        ranks.post(number % 6, torch.full((2, 3), float(10 * number + ranks.rank), device=device))
        if number % 3 == 2:
            for own in range(number - 2, number + 1):
                read = ranks.read(own % 6, ((2, 3), torch.float32))
                wrong.append(((read - torch.tensor([10.0 * own, 10.0 * own + 1], device=device)[:, None, None]).abs().max(), own))
    return [f"message {number}: off by {float(off)}" for off, number in wrong if float(off)]


def left_alone(mesh: str, over: str) -> str:
    """What the first rank says when the other hangs behind their first round; until `over` is there, that is."""
    workload, model = compiled(mesh, timeout=10.0)
    rounds = [workload.batches(step) for step in range(2)]
    for _ in range(3):  # then all is recorded: nothing that is launched waits for the device
        model.step_rounds(rounds)
    torch.cuda.synchronize()
    if model.state.ranks.rank == 1:
        while not os.path.exists(over):
            time.sleep(0.1)
        os._exit(0)
    try:
        model.step_rounds(rounds)
        torch.cuda.synchronize()
        said = "nothing was noticed"
    except RuntimeError as error:
        end = time.monotonic() + 10.0
        while model._pipeline._watch.stopped is None and time.monotonic() < end:
            time.sleep(0.1)
        said = str(model._pipeline._watch.stopped or error)
    open(over, "w").close()
    return said


def compiled(mesh: str | None, timeout: float = 60.0) -> Any:
    from benchmarks import gate
    from benchmarks.cases import WORKLOADS

    workload = dataclasses.replace(WORKLOADS["tiny-four"], dtype=torch.bfloat16)
    names = list(workload.tasks)
    groups = (tuple(names[:2]), tuple(names[2:]))
    options = muxcompile.Options(chunk_tokens=2048, groups=groups, mesh=mesh, timeout=timeout)
    model = muxcompile.compile(workload.backbone("cuda"), workload.compiled_tasks(), options)
    gate.start_weights(model, model.tasks)
    return workload, model


def outcome(workload: Any, model: Any) -> dict[str, torch.Tensor]:
    """Of rounds whose groups are on their way together: called, recorded, and launched."""
    found: dict[str, torch.Tensor] = {}
    for turn in range(3):
        results = model.step_rounds([workload.batches(STEPS * turn + step) for step in range(STEPS)])
        for step, result in enumerate(results):
            found |= {f"loss of {name} at {turn}.{step}": value.cpu() for name, value in result.losses.items()}
            found |= {f"norm of {name} at {turn}.{step}": value.cpu() for name, value in result.grad_norms.items()}
    for name in model.tasks:
        found |= {f"{name}: {key}": value.cpu() for key, value in model.state_dict(name).items()}
    return found


def as_one(mesh: str) -> list[str]:
    workload, one = compiled(None)
    wanted = outcome(workload, one)
    found = outcome(*compiled(mesh))
    wrong = []
    for name, want in wanted.items():
        error = float((found[name].float() - want.float()).norm() / want.float().norm().clamp(min=1e-6))
        limit = 0.02 if name.startswith("loss") else 0.2
        wrong += [f"{name}: off by {error:.3g}"] * (not error <= limit)
    return wrong


def twice(mesh: str) -> list[str]:
    one, other = (outcome(*compiled(mesh)) for _ in range(2))
    return [name for name, value in one.items() if not torch.equal(value, other[name])]

"""CUDA graphs of chunks and optimizer steps: the bits of kernels launched one by one, in the same memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import muxcompile
from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from runtime.cudagraph import CudaGraphs

pytestmark = pytest.mark.gpu

TINY, KINDS = WORKLOADS["tiny-four"], WORKLOADS["tiny-kinds"]


def compiled(workload: Workload, **options: Any) -> Any:
    backbone = workload.backbone("cuda")
    model = muxcompile.compile(backbone, workload.compiled_tasks(), muxcompile.Options(chunk_tokens=2048, **options))
    gate.start_weights(model, model.tasks)
    return model


def seen(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    result = model.step(given)
    return [
        *result.losses.values(),
        *result.grad_norms.values(),
        *model.evaluate(given).losses.values(),
        *(value for name in given for value in model.state_dict(name).values()),
    ]


@pytest.mark.parametrize("mix", [TINY, KINDS], ids=["lora", "kinds"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_have_the_bits_of_calls(mix: Workload, checkpointing: bool) -> None:
    workload = dataclasses.replace(mix, dtype=torch.bfloat16)
    models = [compiled(workload, cuda_graphs=graphs, gradient_checkpointing=checkpointing) for graphs in (False, True)]
    for step in range(5):
        given = workload.batches(step)
        if step == 3:  # fewer tasks, shorter sequences
            given = {name: own[:1] for name, own in list(given.items())[::2]}
        one, other = (seen(model, given) for model in models)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), step
    called, launched = models
    assert not any(slot.records for own in called._executors for slot in own._slots)
    assert all(len(slot.records) == 2 for own in launched._executors for slot in own._slots)


def test_what_inductor_emits_is_recorded() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    models = [compiled(workload, cuda_graphs=graphs, regions="inductor", invariant=False) for graphs in (False, True)]
    for step in range(4):
        one, other = (seen(model, workload.batches(step)) for model in models)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), step
    assert all(len(slot.records) == 2 for own in models[1]._executors for slot in own._slots)


def test_graphs_and_calls_share_memory() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    held = []
    for graphs in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        model = compiled(workload, cuda_graphs=graphs, gradient_checkpointing=False)
        for step in range(4):
            model.step(workload.batches(step))
            model.evaluate(workload.batches(step))
        held.append(torch.cuda.memory_reserved() - before)
        del model
    assert held[1] <= 1.3 * held[0] + (128 << 20), held


def test_cut_sequences_and_whole_ones_take_turns() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    found = []
    for graphs in (False, True):
        backbone = workload.backbone("cuda")
        model = muxcompile.compile(backbone, workload.compiled_tasks(), muxcompile.Options(chunk_tokens=256, cuda_graphs=graphs))
        gate.start_weights(model, model.tasks)
        found.append([seen(model, workload.batches(step)) for step in range(4)])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_task_whose_step_is_not_finite_is_stopped_and_the_others_keep_their_bits() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    clean, broken = compiled(workload), compiled(workload)
    for seed in range(6):
        if seed == 4:
            key = next(iter(broken.state_dict("wide")))
            broken.state.write("wide", key, torch.full(broken.state.shape("wide", key), float("inf")))
        clean.step(workload.batches(seed))
        result = broken.step(workload.batches(seed))
    assert list(result.quarantined) == ["wide"]
    for name in ("short", "medium", "long"):
        assert all(torch.equal(value, clean.state_dict(name)[key]) for key, value in broken.state_dict(name).items()), name


def test_work_that_waits_for_the_device_is_refused() -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    number = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph \(Options\(cuda_graphs=False\)"):
        graphs.record(lambda values: values.update(host=float(number)), {})
    # What comes afterwards is sound: random numbers, and other records.
    assert torch.rand(8, device="cuda").isfinite().all()
    values = {"number": number}
    launch = graphs.record(lambda values: values.update(twice=2 * values["number"]), values)
    number.fill_(3.0)
    launch()
    assert float(values["twice"]) == 6.0


def test_tasks_come_and_go_between_graphs() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    found = []
    for graphs in (False, True):
        tasks = workload.compiled_tasks()
        model = muxcompile.compile(workload.backbone("cuda"), tasks[:2], muxcompile.Options(chunk_tokens=2048, cuda_graphs=graphs))
        own = []
        for step in range(8):
            if step in (3, 5):
                model.add_task(tasks[2 + step // 4])
            if step == 6:
                model.remove_task(tasks[0].name)
            given = {name: batch for name, batch in workload.batches(step).items() if name in model.tasks}
            own.append(seen(model, given))
        found.append(own)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

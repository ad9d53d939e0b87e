"""The straight path on a CUDA device: equivalence with HF PEFT, and a tenant's bits beside its neighbours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import muxcompile
from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload

pytestmark = pytest.mark.gpu

TINY, KINDS = WORKLOADS["tiny-four"], WORKLOADS["tiny-kinds"]


def _compiled(workload: Workload, regions: str, names: list[str] | None = None) -> tuple[muxcompile.CompiledModel, torch.nn.Module]:
    backbone = workload.backbone("cuda")
    tasks = [task for task in workload.compiled_tasks() if names is None or task.name in names]
    return muxcompile.compile(
        backbone, tasks, muxcompile.Options(chunk_tokens=2048, regions=regions, invariant=regions == "eager")
    ), backbone


@pytest.mark.parametrize("regions", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_step_equals_separate_peft_steps(dtype: torch.dtype, regions: str) -> None:
    workload = dataclasses.replace(TINY, dtype=dtype)
    model, backbone = _compiled(workload, regions)
    report = gate.against_peft(workload, model, backbone, scale=0.5)
    assert report["passed"], report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_every_kind_equals_separate_peft_steps(dtype: torch.dtype) -> None:
    workload = dataclasses.replace(KINDS, dtype=dtype)
    model, backbone = _compiled(workload, "eager")
    report = gate.against_peft(workload, model, backbone, scale=0.5)
    assert report["passed"], report


@pytest.mark.parametrize("mix", [TINY, KINDS], ids=["lora", "kinds"])
def test_a_tenant_keeps_its_bits_beside_neighbours(mix: Workload) -> None:
    workload = dataclasses.replace(mix, dtype=torch.bfloat16)
    together, _ = _compiled(workload, "eager")
    weights = gate.start_weights(together)
    batches = workload.batches(seed=3)
    result = together.forward_backward(batches)
    for name in workload.tasks:
        alone, _ = _compiled(workload, "eager", [name])
        for key, value in weights[name].items():
            alone.state.write(name, key, value)
        single = alone.forward_backward({name: batches[name]})
        assert torch.equal(single.losses[name], result.losses[name]), name
        expected = together.gradients(name)
        for key, grad in alone.gradients(name).items():
            assert torch.equal(grad, expected[key]), f"{name}: {key}"


def test_three_runs_have_the_same_bits() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    runs = []
    for _ in range(3):
        model, _ = _compiled(workload, "eager")
        for seed in range(3):
            model.step(workload.batches(seed))
        runs.append({name: model.state_dict(name) for name in model.tasks})
    for run in runs[1:]:
        for name, tensors in run.items():
            assert all(torch.equal(value, runs[0][name][key]) for key, value in tensors.items()), name


def test_a_non_finite_task_is_stopped_and_the_others_keep_their_bits() -> None:
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    clean, _ = _compiled(workload, "eager")
    broken, _ = _compiled(workload, "eager")
    key = next(iter(broken.state_dict("wide")))
    broken.state.write("wide", key, torch.full(broken.state.shape("wide", key), float("inf")))
    for seed in range(2):
        clean.step(workload.batches(seed))
        result = broken.step(workload.batches(seed))
    assert list(result.quarantined) == ["wide"]
    for name in ("short", "medium", "long"):
        assert all(torch.equal(value, clean.state_dict(name)[key]) for key, value in broken.state_dict(name).items()), name

"""The straight path on a CUDA device: equivalence with HF PEFT, and a tenant's bits beside its neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import muxcompile
from benchmarks import gate
from benchmarks.cases import WORKLOADS, Workload
from runtime import executor

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


def test_a_step_of_kinds_that_peft_lacks_is_that_of_the_cpu() -> None:
    # On the CPU it is held against plain torch, in tests/muxcompile.
    tasks = {
        "bitfit": muxcompile.BitFitConfig(target_modules=["q_proj", "v_proj"]),
        "both": muxcompile.BottleneckConfig(mh_adapter=True, original_ln_before=False, non_linearity="swish"),
        "parallel": muxcompile.BottleneckConfig(is_parallel=True, reduction_factor=2, scaling=4.0, init_weights="mam_adapter"),
    }
    config = LlamaConfig(**TINY.model, attention_bias=True)
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(config).eval().requires_grad_(False)
    batches = dict(zip(tasks, TINY.batches(seed=3).values(), strict=False))
    found = []
    for device in ("cpu", "cuda"):
        model = muxcompile.compile(backbone.to(device), tasks, muxcompile.Options(chunk_tokens=2048, regions="eager"))
        gate.start_weights(model, model.tasks)
        result = model.forward_backward(batches)
        found.append(({name: float(loss) for name, loss in result.losses.items()}, {name: model.gradients(name) for name in tasks}))
    (losses, exact), (ours, grads) = found
    for name in tasks:
        assert abs(ours[name] - losses[name]) <= 3e-6 * losses[name], (name, ours[name], losses[name])
        largest = max(float(grad.norm()) for grad in exact[name].values())
        for key, grad in exact[name].items():
            error = float((grads[name][key].cpu() - grad.cpu()).norm())
            assert error <= 1e-5 * float(grad.norm()) + 1e-6 * largest, (name, key)


@pytest.mark.parametrize("mix", [TINY, KINDS], ids=["lora", "kinds"])
def test_a_tenant_keeps_its_bits_beside_neighbours(mix: Workload) -> None:
    workload = dataclasses.replace(mix, dtype=torch.bfloat16)
    together, _ = _compiled(workload, "eager")
    weights = gate.start_weights(together, together.tasks)
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


def test_nothing_reads_what_padding_rows_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused products write no row behind the last task's. Whatever is there instead changes no bit."""
    workload = dataclasses.replace(TINY, dtype=torch.bfloat16)
    found = []
    for written in (True, False):
        if written:
            monkeypatch.setattr(executor, "_route", lambda rows, tasks: [executor._slot(rows, task) for task in tasks])
        else:
            monkeypatch.undo()
            for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
                monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
        model, _ = _compiled(workload, "eager")
        gate.start_weights(model, model.tasks)
        result = model.forward_backward({name: given[:2] for name, given in workload.batches(seed=3).items()})
        found.append({f"loss of {name}": loss for name, loss in result.losses.items()})
        found[-1] |= {f"{name}: {key}": grad for name in model.tasks for key, grad in model.gradients(name).items()}
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def poisoned(made: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*given: Any, **named: Any) -> torch.Tensor:
        tensor = made(*given, **named)
        return tensor.fill_(torch.nan) if tensor.is_cuda and tensor.is_floating_point() else tensor

    return make


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

"""Correctness gates: what a benchmark runs before it prints a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Workload
from benchmarks.peers.peft_eager import PeftEager
from muxcompile import CompiledModel


def start_weights(model: CompiledModel, names: Collection[str], seed: int = 1) -> dict[str, dict[str, Tensor]]:
    """Fresh adapters with noise (a B of zeros would make dA zero), the same values in bf16 and float32."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, Tensor]] = {}
    for task in names:
        found[task] = {}
        for key, value in model.state_dict(task).items():
            if value.is_floating_point():  # not the places of a sparse matrix
                if "lora_A" not in key and "vera_A" not in key:
                    value = value + torch.randn(value.shape, generator=generator) * 0.02
                value = value.bfloat16().float()
                if model.state.holds(task, key):
                    model.state.write(task, key, value)
            found[task][key] = value
    return found


def against_peft(workload: Workload, model: CompiledModel, backbone: nn.Module, *, scale: float) -> dict[str, Any]:
    """Losses and every adapter gradient of one mixed step of the workload's tasks against PEFT, in the backbone's dtype and in
    float32. The model may have more tasks.

    The error of a tensor is |g - g32| / |g32|. The gate: ours is no worse than twice PEFT's own, tensor by tensor; in float32
    it is the rule |d| <= 1e-5 |g| + 1e-7 max |g|.

    Returns:
        Figures, with `passed`.
    """
    names = tuple(workload.tasks)
    weights = start_weights(model, names)
    batches = workload.batches(seed=7, scale=scale)
    result = model.forward_backward(batches)
    losses = {name: float(loss) for name, loss in result.losses.items()}
    ours = {name: model.gradients(name) for name in names}
    for name in names:
        model.state.clear_gradients(name)
    exact_dtype = next(backbone.parameters()).dtype == torch.float32
    full = copy.deepcopy(backbone).float()
    reference = _peft(full, workload, weights, batches)
    del full
    eager = reference if exact_dtype else _peft(backbone, workload, weights, batches)
    worst_ratio, worst_key, errors, eager_errors = 0.0, "", [], []
    for name, (_, exact) in reference.items():
        largest = max(float(grad.norm()) for grad in exact.values())
        for key, grad in exact.items():
            error = float((ours[name][key] - grad).norm())
            if exact_dtype:
                ratio = error / (1e-5 * float(grad.norm()) + 1e-7 * largest)
            else:
                eager_error = float((eager[name][1][key] - grad).norm())
                # A row that nobody read has a gradient of 0, exactly, in both.
                ratio = error / (2 * eager_error) if error else 0.0
                eager_errors.append(_relative(eager_error, grad))
            errors.append(_relative(error, grad))
            if not ratio <= worst_ratio:
                worst_ratio, worst_key = ratio, f"{name}: {key}"
    loss_errors = {name: abs(losses[name] - reference[name][0]) for name in reference}
    eager_loss_errors = {name: abs(eager[name][0] - reference[name][0]) for name in reference}
    passed = math.isfinite(worst_ratio) and worst_ratio <= 1 and max(loss_errors.values()) <= (1e-5 if exact_dtype else 2e-2)
    return {
        "passed": passed,
        "losses": losses,
        "loss_error": loss_errors,
        "loss_error_of_peft": eager_loss_errors,
        "tensors": len(errors),
        "gradient_error_median": sorted(errors)[len(errors) // 2],
        "gradient_error_median_of_peft": sorted(eager_errors)[len(eager_errors) // 2] if eager_errors else None,
        "gradient_error_over_allowed_max": worst_ratio,
        "gradient_error_worst_at": worst_key,
    }


def _relative(error: float, grad: Tensor) -> float:
    return error / float(grad.norm()) if error else 0.0


def _peft(backbone: nn.Module, workload: Workload, weights: Any, batches: Any) -> dict[str, tuple[float, dict[str, Tensor]]]:
    peer = PeftEager(backbone, workload.configs(), weights)
    return {name: peer.gradients(name, batches[name]) for name in workload.tasks}

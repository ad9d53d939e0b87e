"""mux::lse: cross entropy of rows of logits, which are never written in float32.

The negative log-likelihood of a place is the row's logarithm of the sum of exponentials less its own logit. Ranks that each have a
part of the vocabulary exchange both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codegen import device
from codegen.checks import check, check_device, describe


def _check(logits: Tensor, index: Tensor) -> None:
    check(logits.dim() == 2 and logits.is_contiguous(), f"lse: logits must be contiguous [R, V], got {describe(logits)}")
    right = index.shape == logits.shape[:1] and index.dtype == torch.int64 and index.is_contiguous()
    check(right, f"lse: index must be contiguous torch.int64 [{logits.shape[0]}], got {describe(index)}")
    check_device("lse", logits, index=index)


@torch.library.custom_op("mux::lse", mutates_args=())
def lse(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """[R] float32 each: the logarithm of the sum of every row's exponentials, and that less its logit at `index`, if that is a
    column.

    Args:
        logits: [R, V]; what is computed of them is float32.
        index: [R] int64.
    """
    _check(logits, index)
    if logits.is_cuda:
        return device.lse(logits, index)
    value = logits.float()
    most = value.amax(1, keepdim=True)
    rest, most = (value - most).exp().sum(1).log(), most[:, 0]
    here = (index >= 0) & (index < logits.shape[1])
    picked = value.gather(1, index.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return most + rest, rest + (most - torch.where(here, picked, 0.0))


@lse.register_fake
def _(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits, index)
    return logits.new_empty(logits.shape[0], dtype=torch.float32), logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("mux::lse_backward", mutates_args=())
def lse_backward(dsums: Tensor, dnll: Tensor, logits: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """[R, V] in the logits' dtype: their gradient, from those of both results and the first result."""
    _check(logits, index)
    if logits.is_cuda:
        return device.lse_backward(dsums, dnll, logits, index, sums)
    grad = (logits.float() - sums[:, None]).exp() * (dsums + dnll)[:, None]
    columns = torch.arange(logits.shape[1], device=logits.device)
    return (grad - torch.where(columns == index[:, None], dnll[:, None], 0.0)).to(logits.dtype)


@lse_backward.register_fake
def _(dsums: Tensor, dnll: Tensor, logits: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _backward(ctx: Any, dsums: Tensor, dnll: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mux.lse_backward(dsums.contiguous(), dnll.contiguous(), *ctx.saved_tensors), None


lse.register_autograd(_backward, setup_context=_setup)

LSE = torch.ops.mux.lse.default
LSE_BACKWARD = torch.ops.mux.lse_backward.default

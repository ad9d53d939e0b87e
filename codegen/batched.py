"""tile_mm and tile_outer on a device: batched products and no host synchronisation, so that they may be captured in a CUDA graph.

Same meaning as `codegen.reference`. Launches do not grow with the number of adapters; a slot's matrix is gathered once for each
block that uses it. Scaling and masking touch the narrow side of a product, rank R wide, never the wide one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """See `reference.tile_mm`."""
    slot = route.clamp(min=0).long()
    has = (route >= 0)[:, None, None]
    factor = None if scale is None else scale[slot][:, None, None]
    x_B = x.unflatten(0, (route.shape[0], -1))
    w_B = w[slot]
    w_B = w_B.mT if transpose else w_B
    # A block without a slot is replaced by zeros, never multiplied by zero: 0 x inf would be NaN.
    if x_B.shape[2] < w_B.shape[2]:
        x_B = torch.where(has, x_B if factor is None else (x_B * factor).to(x.dtype), 0)
        return torch.bmm(x_B, torch.where(has, w_B, 0)).flatten(0, 1)
    y = torch.bmm(x_B, w_B)
    return torch.where(has, y if factor is None else (y * factor).to(x.dtype), 0).flatten(0, 1)


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """See `reference.tile_outer`; adds to `grad` in place, each slot's blocks one after another."""
    blocks = route.shape[0]
    partial = _product(a.unflatten(0, (blocks, -1)).mT, b.unflatten(0, (blocks, -1)))  # [B, K, N]
    if scale is not None:
        partial *= scale[route.clamp(min=0).long()][:, None, None]
    # Rows in order of (slot, block), each slot led by what it already holds; segment_reduce adds them in that order.
    slots = grad.shape[0]
    key = torch.cat([torch.arange(slots, device=route.device), torch.where(route >= 0, route.long(), slots)])
    order = torch.argsort(key, stable=True)
    # bincount would synchronise with the host.
    lengths = (key[None] == torch.arange(slots + 1, device=route.device)[:, None]).sum(1)
    rows = torch.cat([grad, partial]).index_select(0, order).flatten(1)
    grad.copy_(torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)[:slots].view_as(grad))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by blocks, accumulated and returned in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())

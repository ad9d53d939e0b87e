"""tile_mm and tile_outer on a device: batched products and no host synchronisation, so that they may be captured in a CUDA graph.

Same meaning as `codegen.reference`. Launches do not grow with the number of adapters; tables are gathered once for each block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """See `reference.tile_mm`."""
    blocks = route.shape[0]
    # A block without a slot multiplies with slot 0 and is then replaced, never weighted: 0 x inf would be NaN.
    slot = route.clamp(min=0).long()
    w_B = w[slot]
    y = torch.bmm(x.unflatten(0, (blocks, -1)), w_B.mT if transpose else w_B)
    if scale is not None:
        y = (y * scale[slot][:, None, None]).to(x.dtype)
    return torch.where((route >= 0)[:, None, None], y, 0).flatten(0, 1)


def tile_outer(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """See `reference.tile_outer`; adds to `grad` in place, each slot's blocks one after another."""
    blocks = route.shape[0]
    partial = torch.bmm(a.unflatten(0, (blocks, -1)).mT.float(), b.unflatten(0, (blocks, -1)).float())  # [B, K, N]
    if scale is not None:
        partial = partial * scale[route.clamp(min=0).long()][:, None, None]
    # Rows in order of (slot, block), each slot led by what it already holds; segment_reduce adds them in that order.
    slots = grad.shape[0]
    key = torch.cat([torch.arange(slots, device=route.device), torch.where(route >= 0, route.long(), slots)])
    order = torch.argsort(key, stable=True)
    # bincount would synchronise with the host.
    lengths = (key[None] == torch.arange(slots + 1, device=route.device)[:, None]).sum(1)
    rows = torch.cat([grad, partial]).index_select(0, order).flatten(1)
    grad.copy_(torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)[:slots].view_as(grad))

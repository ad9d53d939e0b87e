"""steady: whether rows of a product have the same bits wherever they stand and whoever stands beside them, seen on the device.

A library may share out a long sum in other ways from tile to tile of the result. Where it does, a product must not have rows of
several tasks whose places follow from who else is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Product = Callable[[Tensor, Tensor], Tensor]
# What was seen, by all that a library may choose by.
_SEEN: dict[tuple[Any, ...], bool] = {}


def steady(rows: int, tile: int, weight: Tensor, dtype: torch.dtype, device: torch.device, product: Product = torch.mm) -> bool:
    """Of `rows` rows times W^T and times W, with W [out, in], when tiles of rows change places and neighbours.

    Args:
        tile: rows that move together.
        weight: of W's shape; its values are taken where they lie on the device, else some are drawn.
        product: of two matrices.
    """
    key = rows, tile, tuple(weight.shape), dtype, device, product
    if key not in _SEEN:
        there = weight.device == device and weight.dtype == dtype and not isinstance(weight, FakeTensor)
        _SEEN[key] = _looked(rows, tile, weight.detach() if there else weight.shape, dtype, device, product)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a drawn weight may take a gigabyte, which records of CUDA graphs could not have
    return _SEEN[key]


def _looked(rows: int, tile: int, given: Tensor | torch.Size, dtype: torch.dtype, device: torch.device, product: Product) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    weight = given if isinstance(given, Tensor) else drawn(*given)
    for right in (weight.t(), weight):
        own = drawn(rows, right.shape[0])
        here = product(own, right)
        for _ in range(2):
            moved = torch.randperm(rows // tile, generator=generator, device=device)
            moved = (moved[:, None] * tile + torch.arange(tile, device=device)).flatten()
            # Every other tile is somebody else's now.
            beside = (torch.arange(rows, device=device) // tile % 2 == 1)[:, None]
            there = product(torch.where(beside, drawn(rows, right.shape[0]), own[moved]), right)
            if not torch.equal(torch.where(beside, 0, there), torch.where(beside, 0, here[moved])):
                return False
    return True

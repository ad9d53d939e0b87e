"""choose: between two lists of tensors by a condition that only the device knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements from which on a tensor is chosen by itself: a launch is then short beside its work, and a joint copy costs memory.
_LARGE = 1 << 20


def choose(finite: Tensor, taken: Sequence[Tensor], otherwise: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Write `taken` into `into` where `finite` ([] bool, on the device) holds, else `otherwise`; what is not chosen may be NaN.

    Small tensors are chosen together: a step of thousands of them would wait for their launches otherwise.
    """
    small = [index for index, value in enumerate(taken) if value.numel() < _LARGE]
    for index in set(range(len(taken))) - set(small):
        into[index].copy_(torch.where(finite, taken[index], otherwise[index]))
    if not small:
        return
    sizes = [taken[index].numel() for index in small]
    new, old = (torch.cat([values[index].reshape(-1) for index in small]) for values in (taken, otherwise))
    chosen = torch.where(finite, new, old).split(sizes)
    targets = [into[index] for index in small]
    torch._foreach_copy_(targets, [part.view(target.shape) for part, target in zip(chosen, targets, strict=True)])

"""bare: a backbone without the memory of its weights, which may lie elsewhere: on other ranks, in files."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

# A whole tensor of the backbone, by its name.
Values = Callable[[str], Tensor]


def bare(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose parameters are fake tensors of one mode on `device`, of the same shapes and strides, tied as in the model.

    Buffers are real, since nothing else says what they hold: the model's own where it lies on `device`. The model is left as it is.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    with mode:
        for own in model.parameters():
            fake = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=device)
            memo[id(own)] = nn.Parameter(fake, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device)
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def lent(model: nn.Module, names: Iterable[str], values: Values | None) -> Iterator[nn.Module]:
    """For a while some parameters of a bare model hold what `values` says; None: the model has its own."""
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    if values is None:
        yield model
        return
    try:
        for name in dict.fromkeys(names):
            place, _, own = name.rpartition(".")
            module = model.get_submodule(place)
            before.append((module, own, module._parameters[own]))
            module._parameters[own] = nn.Parameter(values(name), requires_grad=False)
        yield model
    finally:
        for module, own, parameter in before:
            module._parameters[own] = parameter


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return distinct([*model.parameters(), *model.buffers()])


def distinct(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, what shares memory counted once; they may be fake ones."""
    seen = {(own.untyped_storage()._cdata, own.storage_offset()): own.numel() * own.element_size() for own in tensors}
    return sum(seen.values())

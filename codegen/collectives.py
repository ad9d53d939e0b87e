"""mux::reduce and mux::spread: what tensor parallelism adds to a graph, Megatron's g and f (arXiv 1909.08053, section 3).

Between the two every rank of a group computes with its own features: `spread` stands where they begin, `reduce` where what the
ranks have is summed. The gradient of each is what the other does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.comm import joined


@torch.library.custom_op("mux::reduce", mutates_args=())
def reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x, in the order of the ranks, so that all of them have the same bits.

    Args:
        x: of one shape on all ranks of the group.
        group: its name among this process's `runtime.comm.Ranks`.
    """
    return joined().total(x, group)


@reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mux::spread", mutates_args=())
def spread(x: Tensor, group: str) -> Tensor:
    """x itself, which all ranks of the group have; its gradient is the sum of theirs."""
    return x.clone(memory_format=torch.contiguous_format)


@spread.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _of_reduce(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    # Every rank reads the same sum, and goes on to compute the same loss from it: each has the whole gradient already.
    return dy, None


def _of_spread(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mux.reduce(dy, ctx.group), None


reduce.register_autograd(_of_reduce, setup_context=_setup)
spread.register_autograd(_of_spread, setup_context=_setup)

REDUCE = torch.ops.mux.reduce.default
SPREAD = torch.ops.mux.spread.default

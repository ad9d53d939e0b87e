"""Shares: what a rank has of its tasks' tensors, and what it takes the others of its mesh to have the whole.

Every method is a collective: all ranks call it in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.comm import Ranks
from runtime.tables import Shard

TENSOR, MODEL = "tp", "model"


class Shares:
    """The ranks among which tensors are split; without any, every tensor is whole and nobody is asked.

    Args:
        ranks: of this process; None: it is alone.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks

    def whole(self, tensor: Tensor, shard: Shard | None) -> Tensor:
        """All ranks' pieces as one tensor."""
        if self.ranks is None or shard is None:
            return tensor
        return torch.cat(list(self.ranks.gather(tensor.contiguous(), TENSOR)), shard.dim)

    def total(self, tensor: Tensor, partial: bool) -> Tensor:
        """A gradient, of which this rank may have a part."""
        return self.ranks.total(tensor, TENSOR) if self.ranks is not None and partial else tensor

    def total_(self, tensors: Sequence[Tensor]) -> None:
        """The same in place, of several parts."""
        if self.ranks is not None:
            self.ranks.sum_(tensors, TENSOR)

    def norm(self, gradients: Sequence[Tensor], pieces: Sequence[bool]) -> Tensor:
        """The 2-norm of all ranks' gradients together; those that are no pieces are the same on all of a group, and count once."""
        if self.ranks is None:
            return torch.nn.utils.get_total_norm(list(gradients), foreach=True)
        own = [grad for grad, piece in zip(gradients, pieces, strict=True) if piece or self.ranks.shard == 0]
        norm = torch.nn.utils.get_total_norm(own, foreach=True) if own else torch.zeros((), device=self.ranks.device)
        return torch.linalg.vector_norm(self.ranks.gather(norm, MODEL))

    def agreed(self, flag: Tensor) -> Tensor:
        """[] bool: whether it is so on every rank that holds a part of the model."""
        return flag if self.ranks is None else self.ranks.gather(flag.to(torch.float32), MODEL).min() > 0

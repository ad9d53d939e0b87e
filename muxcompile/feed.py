"""A task's examples in the order it trains on them, a pure function of the seed, the task's name and the epoch."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from muxcompile.data import Example


def order(count: int, seed: int, name: str, purpose: str) -> list[int]:
    """A permutation of range(count). It reads no global random state, so neighbours and their number cannot change it.

    Args:
        purpose: what the permutation is for ("epoch 0", "held out"): each has its own.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()
    indices = list(range(count))
    random.Random(int.from_bytes(digest)).shuffle(indices)
    return indices


def split(examples: list[Example], fraction: float, seed: int, name: str) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out), both in file order; at least one is held out."""
    held = set(order(len(examples), seed, name, "held out")[: max(1, round(len(examples) * fraction))])
    return [i for i in range(len(examples)) if i not in held], sorted(held)


@dataclass(slots=True)
class Feed:
    """Batches of one task, one optimizer step each; an epoch's last one may be smaller, none crosses an epoch.

    Args:
        name, seed: what the order depends on, besides the epoch.
        examples: the training examples.
        step_examples: examples in one step.
        consumed: examples given out so far: the whole state, so that a resumed run goes on with the very next example.
    """

    name: str
    seed: int
    examples: list[Example]
    step_examples: int
    consumed: int = 0
    _epoch: int = -1
    _order: list[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.step_examples)

    @property
    def epoch(self) -> float:
        """Epochs consumed so far."""
        return self.consumed / len(self.examples)

    def take(self) -> list[Example]:
        """The next step's examples."""
        epoch, offset = divmod(self.consumed, len(self.examples))
        if self._order is None or self._epoch != epoch:
            self._epoch, self._order = epoch, order(len(self.examples), self.seed, self.name, f"epoch {epoch}")
        chosen = self._order[offset : offset + self.step_examples]
        self.consumed += len(chosen)
        return [self.examples[index] for index in chosen]

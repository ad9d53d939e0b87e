"""StepResult: what a call that trains or evaluates says of its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one call, by task.

    Args:
        losses: mean negative log-likelihood of the labelled tokens, before the update; 0-dimensional tensors on the device:
            `float()` waits for them, nothing else does. NaN for a task with no labelled token, or in quarantine.
        tokens: labelled tokens.
        grad_norms: 2-norm of the gradients before clipping, for tasks that stepped.
    """

    losses: dict[str, Tensor]
    tokens: dict[str, int]
    grad_norms: dict[str, Tensor]
    _poll: Callable[[], dict[str, str]]

    @property
    def quarantined(self) -> dict[str, str]:
        """Tasks that are stopped and why; reading it waits for this call's work."""
        return self._poll()

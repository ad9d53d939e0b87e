"""unmixed: everything here says its dtypes itself, and keeps its tensors; a script's autocast and inference mode are not for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def unmixed() -> Iterator[None]:
    """No operation inside changes the dtypes it is given, whatever `torch.autocast` surrounds it, and none makes a tensor that is
    of `torch.inference_mode` alone. Also a decorator.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # as inference mode has it
        yield

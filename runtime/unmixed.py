"""unmixed: everything here says its dtypes itself; a script's autocast is for the script's own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def unmixed() -> Iterator[None]:
    """No operation inside changes the dtypes it is given, whatever `torch.autocast` surrounds it. Also a decorator."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield

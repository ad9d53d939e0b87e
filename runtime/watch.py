"""watch: in which action a device stopped.

What a rank launches its device does later, once the ranks that it waits for have come. A device that waits for too long stops, and
the error comes up in whichever call is next, anywhere in the program. So a thread looks now and then which actions are over.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from runtime.program import Action


def shown(action: Action) -> str:
    return f"{action.kind} {action.region} of micro-batch {action.micro}, tasks {', '.join(action.tasks)}"


class Watch:
    """Actions that are launched and not over, as far as was seen.

    Args:
        place: which rank this is.
        tell: is given the line about a device that has stopped, once.
        mark: notes the current stream's place; its `query()` says whether the device has passed it, and raises where that has
            stopped.
        every: seconds between two looks.
    """

    def __init__(
        self,
        place: str,
        tell: Callable[[str], None] | None = None,
        mark: Callable[[], Any] | None = None,
        every: float = 0.2,
    ) -> None:
        self._place, self._tell, self._mark, self._every = place, tell or _to_stderr, mark or _event, every
        self._lock = threading.Lock()
        self._ahead: dict[str, deque[tuple[Any, Action]]] = {}
        self._thread: threading.Thread | None = None
        self.stopped: str | None = None

    def note(self, action: Action) -> None:
        """All of an action is launched, the last of it in the current stream."""
        with self._lock:
            if self.stopped is not None:
                return
            self._ahead.setdefault(action.stream, deque()).append((self._mark(), action))
            if self._thread is None:
                # It ends when all is over, so that none is there when the process ends.
                self._thread = threading.Thread(target=self._look, name="muxcompile watch", daemon=True)
                self._thread.start()

    def where(self) -> str:
        """The first action of each stream that was not over when it was last looked at; "" if all were."""
        with self._lock:
            return self._where()

    def _where(self) -> str:
        return "; ".join(shown(own[0][1]) for own in self._ahead.values() if own)

    def _look(self) -> None:
        while True:
            time.sleep(self._every)
            with self._lock:
                try:
                    for own in self._ahead.values():
                        while own and own[0][0].query():
                            own.popleft()
                except RuntimeError as error:
                    self.stopped = f"{self._place}: the device stopped in {self._where()}: {error}"
                    self._tell(self.stopped)
                    return
                if not any(self._ahead.values()):
                    self._thread = None
                    return


def _event() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

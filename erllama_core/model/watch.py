"""Watching over the time that a step takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.model.request import Request


class Abandoned(Exception):
    """A native call came back after its runner was given up."""


class StepWatch:
    """The step that runs, as its own thread and the one that watches it see it.

    A step is given up only while it runs, and never goes on as if it had not been: the lock
    decides which comes first, its end or its watcher's patience.
    """

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._began: float | None = None
        self.batch: tuple[Request, ...] = ()
        """Those whose rows are being computed."""
        self.count = 0
        """Steps that came to an end."""
        self.over_budget = False
        """The last step was aborted because it took too long."""
        self.is_abandoned = False

    def begin(self, batch: Sequence[Request]) -> None:
        """A native call begins."""
        with self._lock:
            self.batch = tuple(batch)
            self.over_budget = False
            self._began = time.monotonic()

    def end(self) -> None:
        """It is over. Raises Abandoned when nobody waits for it any more."""
        with self._lock:
            self._began = None
            self.batch = ()
            if self.is_abandoned:
                raise Abandoned
            self.count += 1

    def check(self, budget_s: float, abort: Callable[[], None]) -> bool:
        """Abort a step that takes longer than its budget; whether it is given up from now on.

        That is one that takes longer than two.
        """
        with self._lock:
            if self._began is None or self.is_abandoned:
                return False
            seconds = time.monotonic() - self._began
            if seconds > budget_s:
                self.over_budget = True
                abort()
            self.is_abandoned = seconds > 2 * budget_s
            return self.is_abandoned

    def abandon(self) -> None:
        """Give its context up, from the thread that uses it."""
        with self._lock:
            self.is_abandoned = True

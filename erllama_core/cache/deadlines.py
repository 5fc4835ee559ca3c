"""One thread that tells which of many waits have lasted too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")


class Deadlines(Generic[_T]):
    """Calls ``expired`` for what was added and not discarded in time; thread-safe.

    All have the same time, so the one that was added first is due first. The thread is
    started when it is first needed.
    """

    def __init__(self, timeout_s: float, expired: Callable[[_T], None], *, name: str) -> None:
        self._timeout_s: Final = timeout_s
        self._expired: Final = expired
        self._name: Final = name
        self._changed: Final = threading.Condition()
        self._due: dict[_T, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, item: _T) -> None:
        """Begin to wait for an item."""
        with self._changed:
            if self._closed:
                return
            self._due[item] = time.monotonic() + self._timeout_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif len(self._due) == 1:
                self._changed.notify()

    def discard(self, item: _T) -> None:
        """It came in time."""
        with self._changed:
            self._due.pop(item, None)

    def close(self) -> None:
        """Stop; nothing expires any more."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    first = next(iter(self._due.items()), None)
                    left = None if first is None else first[1] - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._closed or first is None:
                    return
                item = first[0]
                del self._due[item]
            self._expired(item)

"""Running one input: within its time and memory, and with every thread's errors."""

from __future__ import annotations

import signal
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from target import Run, Target


class TookTooLong(BaseException):
    """An input took more time than it may. No reader catches it."""


class TookTooMuch(AssertionError):
    """An input took more memory than it may."""


class Watched:
    """A target that is open. Of the main thread."""

    def __init__(self, target: Target, run: Run) -> None:
        self._target: Final = target
        self._run: Final = run
        self._elsewhere: Final[list[BaseException]] = []
        """Errors of other threads, and of finalizers."""

    def run(self, data: bytes, *, timed: bool = True, measured: bool = False) -> None:
        """Raises whatever is a finding. ``measured``: memory as well, at twice the time."""
        self._elsewhere.clear()
        if measured:
            tracemalloc.start()
        try:
            with _alarm(self._target.seconds * (3 if measured else 1) if timed else 0.0):
                self._run(data)
            peak = tracemalloc.get_traced_memory()[1] if measured else 0
        finally:
            if measured:
                tracemalloc.stop()
        most = self._target.base_bytes + self._target.factor * len(data)
        if peak > most:
            raise TookTooMuch(f"{peak} bytes of memory for {len(data)} of input; {most} at most")
        if self._elsewhere:
            raise self._elsewhere[0]

    def _note(self, unhandled: Any) -> None:
        if unhandled.exc_value is not None:
            self._elsewhere.append(unhandled.exc_value)


@contextmanager
def watched(target: Target) -> Iterator[Watched]:
    """Set a target up, and look after its threads."""
    with target.open() as run:
        made = Watched(target, run)
        hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook, sys.unraisablehook = made._note, made._note
        try:
            yield made
        finally:
            threading.excepthook, sys.unraisablehook = hooks


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, in the process's own time: the machine may be busy."""
    if not seconds:
        yield
        return

    def ring(*_: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

"""What signals mean to ``erllama run``.

A handler runs in the main thread between any two of its steps, also in the middle of an engine's
call. So while a reply is on its way none of them raises: they ask for its end, which comes
through the stream like any other.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from erllama_core.stream.stream import Stream

TERMINATED: Final = 128 + signal.SIGTERM
INTERRUPTED: Final = 128 + signal.SIGINT


class Signals:
    """SIGINT ends a reply, or the line being typed; SIGTERM the program, in order; SIGHUP reloads.

    For the main thread. ``reload`` runs on a thread of its own, one at a time.
    """

    def __init__(self, reload: Callable[[], None]) -> None:
        self._reload: Final = reload
        self._wanted: Final[queue.SimpleQueue[bool]] = queue.SimpleQueue()
        self._stream: Stream | None = None
        self._replying = False
        self.interrupted = False
        """The reply was to end."""
        self.terminated = False
        """The program is to end."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals until the end of the block, then leave them as they were."""
        handlers = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._hang_up
        reloader = threading.Thread(target=self._reload_when_asked, name="erllama-reload")
        reloader.start()
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wanted.put(False)
            reloader.join()

    @contextlib.contextmanager
    def replying(self) -> Iterator[None]:
        """A reply is asked for, and comes, within the block: signals end it, and raise nothing.

        Only a second SIGINT does: its KeyboardInterrupt leaves a reply that does not end.
        """
        self.interrupted, self._replying = False, True
        try:
            yield
        finally:
            self._replying, self._stream = False, None

    def watch(self, stream: Stream) -> None:
        """This is the reply; it is cancelled at once when it was to end before it began."""
        self._stream = stream
        if self.interrupted:
            stream.cancel()

    # ---------------------------------------------------------------- handlers

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self._replying:
            raise KeyboardInterrupt
        again, self.interrupted = self.interrupted, True
        if self._stream is not None:
            if again:
                raise KeyboardInterrupt
            self._stream.cancel()

    def _terminate(self, number: int, _frame: FrameType | None) -> None:
        # The next one ends the process at once: a person's patience has an end.
        signal.signal(number, signal.SIG_DFL)
        self.terminated = True
        if not self._replying:
            raise SystemExit(TERMINATED)
        self.interrupted = True
        if self._stream is not None:
            self._stream.cancel()

    def _hang_up(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted.put(True)  # which, alone of all queues, may be interrupted by itself

    def _reload_when_asked(self) -> None:
        while self._wanted.get():
            self._reload()

"""What signals mean to ``erllama run``.

A handler runs in the main thread between any two of its steps, also in the middle of an engine's
call. So while a reply is on its way none of them raises: they ask for its end, which comes
through the stream like any other.

The main thread may be anywhere, and it may have just begun to wait for a line when a signal
comes, which then does not end the wait. So a second thread hears of signals as well, through
the wakeup file of :mod:`signal`: it reloads, and it sees to it that SIGTERM is noticed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from erllama_core.stream.stream import Stream

TERMINATED: Final = 128 + signal.SIGTERM
INTERRUPTED: Final = 128 + signal.SIGINT
_NUDGE: Final = signal.SIGURG
"""Nobody else sends it to a process without such a socket, and it does nothing by itself."""
_NUDGE_S: Final = 0.05


class Signals:
    """SIGINT ends a reply, or the line being typed; SIGTERM the program, in order; SIGHUP reloads.

    For the main thread. ``reload`` runs on a thread of its own, one at a time.
    """

    def __init__(self, reload: Callable[[], None]) -> None:
        self._reload: Final = reload
        self._stream: Stream | None = None
        self._replying = False
        self.interrupted = False
        """The reply was to end."""
        self.terminated = False
        """The program is to end."""
        self._left = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals until the end of the block, then leave them as they were."""
        handlers = {
            signal.SIGINT: self._interrupt,
            signal.SIGTERM: self._terminate,
            signal.SIGHUP: _nothing,
            _NUDGE: _nothing,
        }
        heard, told = os.pipe()
        os.set_blocking(told, False)
        listener = threading.Thread(
            target=self._listen, args=(heard, threading.get_ident()), name="erllama-signals"
        )
        listener.start()
        file_before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(file_before)
            self._left = True
            os.close(told)  # the end of the listener's file
            listener.join()
            os.close(heard)

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

    def _listen(self, heard: int, main_thread: int) -> None:
        """Reload on SIGHUP; wake the main thread until it has taken note of SIGTERM.

        SIGINT, too, may come just before the main thread begins to wait for what is typed.
        """
        while numbers := os.read(heard, 1):
            if numbers[0] == signal.SIGINT:
                time.sleep(_NUDGE_S)
                if not self._left:
                    signal.pthread_kill(main_thread, _NUDGE)
            if numbers[0] == signal.SIGHUP:
                self._reload()
            while numbers[0] == signal.SIGTERM and not (self.terminated or self._left):
                signal.pthread_kill(main_thread, _NUDGE)
                time.sleep(_NUDGE_S)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A signal with a handler, even this one, ends a wait."""

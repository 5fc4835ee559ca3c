"""Threads that do the work of one tier, so that one that hangs keeps no other waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.cache")


@attrs.frozen(eq=False)
class Work:
    """Something that may block. Either ``run`` is called or ``give_up``, and only once."""

    run: Callable[[], None]
    give_up: Callable[[], None]
    """Called instead when the lane was closed before its turn came; does not block."""
    size: int = 0
    """Bytes that were reserved for it."""


class Lane:
    """A queue and the threads behind it, with a bound on bytes under way; thread-safe.

    ``reserve`` before bytes are produced, then ``submit`` or ``unreserve``: what does not fit
    is left out by the caller, who never waits.
    """

    def __init__(self, name: str, *, threads: int, max_bytes: int = 0) -> None:
        self._max_bytes: Final = max_bytes
        self._queue: queue.SimpleQueue[tuple[int, Work] | None] = queue.SimpleQueue()
        self._changed: Final = threading.Condition()
        self._bytes = 0
        self._submitted = 0
        self._undone: dict[int, None] = {}
        """Numbers of what was handed over and is not done yet, in order."""
        self._running: dict[int, float] = {}
        """When each number that is being worked on was begun, on the monotonic clock."""
        self._moved_s = time.monotonic()
        """When something was begun or done last."""
        self._closed = False
        # Daemons: one that hangs in a tier must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._run, name=f"erllama-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def reserve(self, size: int, *, beyond_bound: bool = False) -> bool:
        """Claim room for ``size`` bytes. One object is always let through, however large."""
        with self._changed:
            full = self._bytes and self._bytes + size > self._max_bytes
            if self._closed or (full and not beyond_bound):
                return False
            self._bytes += size
            return True

    def unreserve(self, size: int) -> None:
        """Give room back that nothing was handed over for."""
        with self._changed:
            self._bytes -= size

    def submit(self, work: Work) -> None:
        """Hand over work whose size was reserved. On a closed lane it is given up at once."""
        with self._changed:
            if not self._closed:
                if not self._undone:
                    self._moved_s = time.monotonic()
                self._submitted += 1
                self._undone[self._submitted] = None
                self._queue.put((self._submitted, work))
                return
            self._bytes -= work.size
        work.give_up()

    def wait_done(self, timeout_s: float | None, patience_s: float) -> bool:
        """Wait for what was handed over before this call.

        False when ``timeout_s`` ran out, or when nothing has been begun or done for
        ``patience_s``: then the tier hangs.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            last = self._submitted
            while self._undone and next(iter(self._undone)) <= last:
                until = self._moved_s + patience_s
                if deadline is not None:
                    until = min(until, deadline)
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def hanging(self, seconds: float) -> int:
        """How many threads have been at one piece of work for so long."""
        since = time.monotonic() - seconds
        with self._changed:
            return sum(begun <= since for begun in self._running.values())

    def is_stuck(self, seconds: float) -> bool:
        """Whether no thread is left that does not hang."""
        return self.hanging(seconds) == len(self._threads)

    def close(self, patience_s: float) -> int:
        """Do what was handed over, then stop the threads; how much was given up.

        That is what waits behind work that has hung for ``patience_s``, and this work itself,
        whose thread is left to its tier.
        """
        with self._changed:
            self._closed = True
        done = self.wait_done(None, patience_s)
        given_up = 0 if done else self._give_up()
        for _ in self._threads:
            self._queue.put(None)
        if done:
            for thread in self._threads:
                thread.join()
        return given_up

    def _give_up(self) -> int:
        waiting = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                waiting.append(item)
        for number, work in waiting:
            try:
                work.give_up()
            finally:
                self._is_done(number, work)
        with self._changed:
            return len(waiting) + len(self._running)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            number, work = item
            with self._changed:
                self._moved_s = self._running[number] = time.monotonic()
            try:
                work.run()
            except Exception:
                log.exception("tier.work_failed")
            finally:
                self._is_done(number, work)
            del item, work

    def _is_done(self, number: int, work: Work) -> None:
        with self._changed:
            self._bytes -= work.size
            self._undone.pop(number, None)
            self._running.pop(number, None)
            self._moved_s = time.monotonic()
            self._changed.notify_all()

"""A queue between the worker, which never waits, and a consumer of any kind."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class Mailbox(Generic[T]):
    """Unbounded and ordered. One consumer at a time, blocking or in an event loop."""

    def __init__(self) -> None:
        # Native: an item costs the worker a tenth of what a condition variable costs.
        self._items: Final[queue.SimpleQueue[T]] = queue.SimpleQueue()
        self._waiter: _Waiter | None = None

    def put(self, item: T) -> None:
        """Add an item; wakes the consumer. Never blocks for longer than a lock."""
        self._items.put(item)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the loop was closed with the consumer still waiting
                return

    def get(self, timeout_s: float | None = None) -> T:
        """The next item. Raises TimeoutError, after which the mailbox is as before."""
        if timeout_s is None:
            return self._items.get()
        try:
            return self._items.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError(f"nothing arrived within {timeout_s:g} s") from None

    async def get_async(self) -> T:
        """The next item, for a coroutine. Cancelling the wait loses nothing."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._items.get_nowait()
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waiter = (loop, future)
            # Looked at once more: what came before it was known that somebody waits wakes nobody.
            if self._items.empty():
                await future
            self._waiter = None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

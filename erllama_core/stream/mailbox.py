"""A queue between the worker, which never waits, and a consumer of any kind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Unbounded and ordered. One consumer at a time, blocking or in an event loop."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._arrived = threading.Condition(threading.Lock())
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, item: T) -> None:
        """Add an item; wakes the consumer. Never blocks for longer than a lock."""
        with self._arrived:
            self._items.append(item)
            self._arrived.notify()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the loop was closed with the consumer still waiting
                return

    def get(self, timeout_s: float | None = None) -> T:
        """The next item. Raises TimeoutError, after which the mailbox is as before."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._arrived:
            while not self._items:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"nothing arrived within {timeout_s:g} s")
                self._arrived.wait(left)
            return self._items.popleft()

    async def get_async(self) -> T:
        """The next item, for a coroutine. Cancelling the wait loses nothing."""
        while True:
            with self._arrived:
                if self._items:
                    return self._items.popleft()
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, future)
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

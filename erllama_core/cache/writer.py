"""The threads that write: checksum, then the tiers. Bytes on their way are bounded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.cache.index import Entry
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.cache")


@attrs.frozen(eq=False)
class Draft:
    """An object on its way to the tiers. Owns one reference to its pages."""

    entry: Entry
    pages: PooledPages
    tiers: tuple[TierStore, ...]
    save_reason: str
    align_tokens: int
    after: Entry | None
    """The block that this one goes on from; without it, it would be of no use."""
    absorbs: Entry | None = None
    """A block that this one holds too; it goes when this one is stored."""


class Writer:
    """A bounded queue and the threads behind it; thread-safe.

    ``reserve`` before the bytes are produced, then ``submit`` or ``forgo``: what does not fit
    is dropped by the caller, who never waits.
    """

    def __init__(self, write: Callable[[Draft], None], *, max_bytes: int, threads: int) -> None:
        self._write: Final = write
        self._max_bytes: Final = max_bytes
        self._queue: queue.SimpleQueue[tuple[int, Draft] | None] = queue.SimpleQueue()
        self._changed: Final = threading.Condition()
        self._bytes = 0
        self._submitted = 0
        self._unwritten: set[int] = set()
        """Numbers of the drafts that were handed over and are not written yet."""
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"erllama-writer-{i}", daemon=True)
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
        """Give room back that nothing was written for."""
        with self._changed:
            self._bytes -= size

    def submit(self, draft: Draft) -> None:
        """Hand over a draft whose size was reserved."""
        with self._changed:
            self._submitted += 1
            number = self._submitted
            self._unwritten.add(number)
        self._queue.put((number, draft))

    def wait_written(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed over before this call is written; False on time-out."""
        with self._changed:
            last = self._submitted
            return self._changed.wait_for(
                lambda: all(number > last for number in self._unwritten), timeout_s
            )

    def close(self) -> None:
        """Write what was handed over, then stop the threads."""
        with self._changed:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            number, draft = item
            size = draft.pages.size
            try:
                self._write(draft)
            except Exception:
                log.exception("save.failed", object=str(draft.entry.object_id))
            finally:
                with self._changed:
                    self._bytes -= size
                    self._unwritten.discard(number)
                    self._changed.notify_all()
            del item, draft

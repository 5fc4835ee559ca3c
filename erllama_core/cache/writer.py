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


class Writer:
    """A bounded queue and the threads behind it; thread-safe.

    ``reserve`` before the bytes are produced, then ``submit`` or ``forgo``: what does not fit
    is dropped by the caller, who never waits.
    """

    def __init__(self, write: Callable[[Draft], None], *, max_bytes: int, threads: int) -> None:
        self._write: Final = write
        self._max_bytes: Final = max_bytes
        self._queue: queue.SimpleQueue[Draft | None] = queue.SimpleQueue()
        self._idle: Final = threading.Condition()
        self._bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"erllama-writer-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def inflight_bytes(self) -> int:
        """Reserved and not yet written."""
        return self._bytes

    def reserve(self, size: int) -> bool:
        """Claim room for ``size`` bytes. One object is always let through, however large."""
        with self._idle:
            if self._closed or (self._bytes and self._bytes + size > self._max_bytes):
                return False
            self._bytes += size
            return True

    def submit(self, draft: Draft) -> None:
        """Hand over a draft whose size was reserved."""
        self._queue.put(draft)

    def forgo(self, pages: PooledPages) -> None:
        """Give a reservation and its pages back, unwritten."""
        pages.release()
        self._settle(pages.size)

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is on its way; False when time ran out."""
        with self._idle:
            return self._idle.wait_for(lambda: self._bytes == 0, timeout_s)

    def close(self) -> None:
        """Write what was handed over, then stop the threads."""
        with self._idle:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _settle(self, size: int) -> None:
        with self._idle:
            self._bytes -= size
            if not self._bytes:
                self._idle.notify_all()

    def _run(self) -> None:
        while (draft := self._queue.get()) is not None:
            try:
                self._write(draft)
            except Exception:
                log.exception("save.failed", object=str(draft.entry.object_id))
            finally:
                self._settle(draft.pages.size)
            del draft

"""Page-aligned buffers that state is copied into: anonymous, pre-faulted, counted, reused."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections.abc import Iterable
from typing import Final

_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14 and later (madvise(2)); the mmap module has no name for it."""


_HUGE_PAGE: Final = 2 << 20


def _capacity(size: int) -> int:
    """Whole pages for ``size`` bytes; whole huge pages where that adds an eighth at most."""
    huge = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    if huge - size <= size // 8:
        return huge
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _map(size: int) -> mmap.mmap:
    """Anonymous pages, all present where the system can do that at once.

    Faulting 46 MB in page by page takes 15 ms, in huge pages 2 ms (measured): as long as
    everything else a restore does. Where either is missing, the first write faults.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):
            pages.madvise(_MADV_POPULATE_WRITE)
    return pages


class PooledPages:
    """Some pages of a :class:`PagePool` and the number of their holders; thread-safe.

    Implements ``interfaces.tier.Pages``. Nobody unmaps pages by hand: a view that outlives
    the last holder may see another holder's bytes, but never memory that is gone.
    """

    __slots__ = ("_lock", "_map", "_pool", "_references", "_view", "size")

    def __init__(self, pool: PagePool, pages: mmap.mmap, size: int) -> None:
        self._pool = pool
        self._map = pages
        self._lock = threading.Lock()
        self._references = 1
        self.size: Final = size
        self._view = memoryview(pages)[:size]

    @property
    def view(self) -> memoryview:
        """The ``size`` bytes asked for. Valid while the caller holds a reference."""
        return self._view

    def retain(self) -> None:
        with self._lock:
            if self._references < 1:
                raise ValueError("pages were used after their release")
            self._references += 1

    def release(self) -> None:
        with self._lock:
            if self._references < 1:
                raise ValueError("pages were released twice")
            self._references -= 1
            if self._references:
                return
        self._view.release()
        self._pool._give_back(self._map)  # noqa: SLF001 - the pool's other half


class PagePool:
    """Gives out pages and keeps some of those that come back; thread-safe.

    Pages of the wrong size are not kept: a mapping serves a request for at least half of it,
    and what a cache row used goes back to the system when the pool has ``max_idle_bytes``.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes: Final = max_idle_bytes
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """Mapped and waiting."""
        return self._idle_bytes

    def acquire(self, size: int) -> PooledPages:
        """Writable pages for ``size`` bytes; their contents are arbitrary."""
        needed = _capacity(size)
        pages = self._take(needed)
        return PooledPages(self, _map(needed) if pages is None else pages, size)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Map pages for requests of these sizes ahead of time, as far as the pool keeps them."""
        for size in sizes:
            needed = _capacity(size)
            if self._idle_bytes + needed > self._max_idle_bytes:
                return
            self._give_back(_map(needed))

    def _take(self, needed: int) -> mmap.mmap | None:
        with self._lock:
            best = -1
            for index, pages in enumerate(self._idle):
                if needed <= len(pages) <= 2 * needed and (
                    best < 0 or len(pages) < len(self._idle[best])
                ):
                    best = index
            if best < 0:
                return None
            taken = self._idle.pop(best)
            self._idle_bytes -= len(taken)
            return taken

    def _give_back(self, pages: mmap.mmap) -> None:
        with self._lock:
            if self._idle_bytes + len(pages) <= self._max_idle_bytes:
                self._idle.append(pages)
                self._idle_bytes += len(pages)

    def clear(self) -> None:
        """Return the idle pages to the system."""
        with self._lock:
            self._idle.clear()
            self._idle_bytes = 0

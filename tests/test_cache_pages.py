"""Save buffers: counted, reused, bounded, and never pulled from under a view."""

from __future__ import annotations

import threading

import pytest

from erllama_core.cache.pages import PagePool

MIB = 1 << 20


def test_pages_come_back_to_the_pool() -> None:
    """Released pages serve the next request of about their size, and only that."""
    pool = PagePool(64 * MIB)
    pages = pool.acquire(5 * MIB)
    assert len(pages.view) == 5 * MIB
    pages.view[:3] = b"abc"
    pages.release()
    kept = pool.idle_bytes
    assert kept >= 5 * MIB
    small = pool.acquire(MIB)
    assert pool.idle_bytes == kept, "five megabytes are too much for one"
    again = pool.acquire(5 * MIB - 4096)
    assert pool.idle_bytes == 0
    assert bytes(again.view[:3]) == b"abc", "the same pages"
    small.release()
    again.release()


def test_the_pool_keeps_no_more_than_it_may() -> None:
    """What is beyond the bound goes back to the system."""
    pool = PagePool(3 * MIB)
    held = [pool.acquire(2 * MIB) for _ in range(4)]
    for pages in held:
        pages.release()
    assert pool.idle_bytes == 2 * MIB, "the last ones, not the first"
    pool.prepare([2 * MIB] * 5)
    assert pool.idle_bytes == 2 * MIB
    pool.clear()
    assert pool.idle_bytes == 0


def test_the_last_holder_lets_go() -> None:
    """Pages live until every holder has released them; more is a mistake that is told."""
    pool = PagePool(MIB)
    pages = pool.acquire(100)
    pages.retain()
    pages.release()
    pages.view[:] = b"x" * 100
    pages.release()
    with pytest.raises(ValueError, match="released twice"):
        pages.release()
    with pytest.raises(ValueError, match="after their release"):
        pages.retain()


def test_a_view_keeps_its_memory() -> None:
    """A view that somebody forgot to drop is memory still, even when the pool is gone."""
    pool = PagePool(0)
    pages = pool.acquire(100)
    forgotten = pages.view[10:20]
    forgotten[:] = b"0123456789"
    pages.release()
    del pages, pool
    assert bytes(forgotten) == b"0123456789"


def test_many_threads_share_a_pool() -> None:
    """Nobody ever sees bytes of another holder."""
    pool = PagePool(8 * MIB)
    wrong: list[int] = []

    def use(number: int) -> None:
        for turn in range(200):
            pages = pool.acquire(1000 + 17 * ((number + turn) % 5))
            mark = bytes([number]) * len(pages.view)
            pages.view[:] = mark
            if pages.view != mark:
                wrong.append(number)
            pages.release()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

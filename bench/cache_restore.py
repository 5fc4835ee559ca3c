"""How fast stored state comes back: fetched, verified, and copied as an import copies it."""

from __future__ import annotations

import os
import queue
import tempfile
import time
from pathlib import Path
from typing import Final

from cache_sizes import Sizes
from figure import Figure, median_of

from erllama_core import Cache, NamedTier
from erllama_core.cache.loader import Fetch
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import KVClass
from erllama_tier_disk.options import DiskOptions
from erllama_tier_disk.plugin import open_disk

ALIGN: Final = 256
BLOCK_BYTES: Final = 6_000_000
NAMESPACE: Final = bytes(range(32))


class Restore:
    """A context in one tier, and the buffer that it is restored to."""

    def __init__(self, cache: Cache, tier: str, n_blocks: int) -> None:
        self._space: Final = ModelSpace(
            cache, namespace=NAMESPACE, kv_class=KVClass.SPAN, tiers=(tier,), align_tokens=ALIGN
        )
        tokens = bytearray(os.urandom(4 * ALIGN * n_blocks))
        self._keys: Final = self._space.keys(tokens, None)
        self.n_bytes: Final = n_blocks * BLOCK_BYTES
        self.target: Final = memoryview(bytearray(self.n_bytes))
        content = os.urandom(BLOCK_BYTES)
        position, end = 0, n_blocks * ALIGN
        while block := self._space.next_block(self._keys, position, end):
            pages = self._space.reserve(BLOCK_BYTES, beyond_bound=True)
            assert pages is not None
            pages.view[:] = content
            self._space.submit_block(self._keys, block, pages, "cold")
            position = block.end
        cache.flush()

    def run(self, *, copying: bool = True) -> float:
        """Seconds from the look-up to the last byte."""
        arrived: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
        began = time.perf_counter()
        # All of it: the last block of what ``find`` gives is cut by one token only.
        match = self._space.find(self._keys, may_sample=False)
        fetch = self._space.fetch(match, arrived.put) or arrived.get()
        assert not fetch.failed
        assert fetch.n_bytes == self.n_bytes
        if copying:
            at = 0
            for part in fetch.ranges():
                self.target[at : at + len(part.data)] = part.data
                at += len(part.data)
        seconds = time.perf_counter() - began
        fetch.release()
        return seconds


def measure(sizes: Sizes) -> list[Figure]:
    """Disk, then RAM against a plain copy of as many bytes."""
    runs, blocks = 4 * sizes.runs, sizes.restored_blocks
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
        disk = NamedTier("disk", "disk", open_disk(DiskOptions(root=Path(root))))
        with Cache([disk]) as cache:
            restore = Restore(cache, "disk", blocks)
            loaded = restore.n_bytes / median_of(runs, lambda: restore.run(copying=False))
            imported = restore.n_bytes / median_of(runs, restore.run)
    with Cache([NamedTier("ram", "ram", RamTier(1 << 30))]) as cache:
        restore = Restore(cache, "ram", blocks)
        ram = restore.n_bytes / median_of(runs, restore.run)
        source = memoryview(bytearray(os.urandom(restore.n_bytes)))

        def copy() -> float:
            began = time.perf_counter()
            restore.target[:] = source
            return time.perf_counter() - began

        plain = restore.n_bytes / median_of(runs, copy)
    what = f"{blocks} blocks of {BLOCK_BYTES / 1e6:.0f} MB"
    return [
        Figure(
            name=f"{what} from disk (warm page cache), with checksums",
            measured=loaded / 1e9,
            unit="GB/s",
            target=3.0,
            bound="at least",
            digits=2,
        ),
        Figure(
            name="    and copied out as an import does",
            measured=imported / 1e9,
            unit="GB/s",
            digits=2,
        ),
        Figure(
            name=f"{what} from RAM, copied out, against a memory copy",
            measured=ram / plain,
            target=0.6,
            bound="at least",
            digits=2,
        ),
        Figure(name="    the memory copy alone", measured=plain / 1e9, unit="GB/s", digits=2),
    ]

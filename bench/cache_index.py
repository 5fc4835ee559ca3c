"""Look-ups in large indexes, and what an object costs there."""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from cache_sizes import Sizes
from figure import Figure

from erllama_core import Cache, NamedTier
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind

ALIGN: Final = 256
NAMESPACE: Final = bytes(range(32))
OBJECT_BYTES: Final = 6_000_000


class Filler:
    """Adds contexts to a cache's index, without payloads: no look-up reads one."""

    def __init__(self, cache: Cache, prompt_tokens: int) -> None:
        self._catalog: Final = cache.catalog
        self._store: Final = cache.catalog.store("ram")
        self._rng: Final = random.Random(1)
        self._prompt_bytes: Final = prompt_tokens * TOKEN_BYTES
        self.prompts: Final[list[bytes]] = []

    def fill(self, n_objects: int) -> None:
        """Go on until the index has so many objects."""
        while len(self._catalog.index) < n_objects:
            tokens = self._rng.randbytes(self._prompt_bytes)
            # No more than are asked for: the others would be held twice.
            if len(self.prompts) < 64:
                self.prompts.append(tokens)
            keys = ContextKeys(bytes(bytearray(NAMESPACE)), tokens, ALIGN)
            for start in range(0, len(keys), ALIGN):
                self.add(keys, start, min(start + ALIGN, len(keys)))

    def add(self, keys: ContextKeys, start: int, end: int) -> None:
        """One block."""
        now = time.time_ns()
        entry = new_entry(keys, start, end)
        self._catalog.add_copy(self._store, entry, OBJECT_BYTES, now, "cold")

    def branch(self, n_branches: int) -> bytes:
        """Contexts that part inside one block, half-way; one that goes on from there."""
        trunk = self._rng.randbytes(self._prompt_bytes)
        n_tokens = self._prompt_bytes // TOKEN_BYTES
        segment = n_tokens // 2 // ALIGN * ALIGN
        fork, end = segment + 100, segment + ALIGN
        keys = ContextKeys(NAMESPACE, trunk, ALIGN)
        for start in range(0, segment, ALIGN):
            self.add(keys, start, start + ALIGN)
        self.add(keys, segment, fork)
        self.add(keys, fork, end)
        for _ in range(n_branches - 1):
            tokens = trunk[: fork * TOKEN_BYTES] + self._rng.randbytes((end - fork) * TOKEN_BYTES)
            head = keys.slice(segment, fork)
            entry = Entry(
                ObjectId(ObjectKind.KV, fork, keys.key_with(fork, tokens[fork * TOKEN_BYTES :])),
                end,
                NAMESPACE,
                keys.key(segment),
                head,
                tokens[fork * TOKEN_BYTES :],
            )
            self._catalog.add_copy(self._store, entry, OBJECT_BYTES, time.time_ns(), "cold")
        for start in range(end, n_tokens, ALIGN):
            self.add(keys, start, min(start + ALIGN, n_tokens))
        return trunk


def new_entry(keys: ContextKeys, start: int, end: int) -> Entry:
    """A block as a save makes it."""
    segment = keys.segment_start(end)
    return Entry(
        ObjectId(ObjectKind.KV, start, keys.key(end)),
        end,
        keys.namespace,
        keys.key(segment),
        keys.slice(segment, start),
        keys.slice(start, end),
    )


def measure(sizes: Sizes) -> list[Figure]:
    """What an object costs; then look-ups at every size of the index, and among branches."""
    # A process of its own: what others freed before would hide what is resident now.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        large = process.submit(_large_indexes, sizes).result()
    return [*_memory(sizes), *large, _branching(sizes)]


def _large_indexes(sizes: Sizes) -> list[Figure]:
    empty = _resident_bytes()
    with _new_cache() as cache:
        filler = Filler(cache, sizes.prompt_tokens)
        look_ups = []
        for n_objects in sizes.index_objects:
            filler.fill(n_objects)
            look_ups.append(_lookup(cache, filler.prompts, sizes, f"{n_objects:,} objects"))
        gc.collect()
        count = len(cache.catalog.index)
        each = (_resident_bytes() - empty) / count - ALIGN * TOKEN_BYTES
    return [
        Figure(
            name=f"    resident memory at {count:,} objects, queue included",
            measured=each,
            unit="bytes/object",
            digits=0,
        ),
        *look_ups,
        Figure(
            name="    the largest index against the smallest",
            measured=look_ups[-1].measured / look_ups[0].measured,
            unit="times",
            digits=2,
        ),
    ]


def _branching(sizes: Sizes) -> Figure:
    with _new_cache() as cache:
        prompt = Filler(cache, sizes.prompt_tokens).branch(sizes.branches)
        return _lookup(cache, [prompt], sizes, f"{sizes.branches:,} branches at one point")


def _new_cache() -> Cache:
    return Cache([NamedTier("ram", "ram", RamTier(1 << 60))])


def _lookup(cache: Cache, prompts: list[bytes], sizes: Sizes, where: str) -> Figure:
    """Hashing included: every look-up begins with nothing but the tokens."""
    space = ModelSpace(
        cache, namespace=NAMESPACE, kv_class=KVClass.SPAN, tiers=("ram",), align_tokens=ALIGN
    )
    seconds = []
    for turn in range(8 * sizes.runs):
        tokens = bytearray(prompts[turn % len(prompts)])
        began = time.perf_counter()
        match = space.find(space.keys(tokens, None), may_sample=True)
        seconds.append(time.perf_counter() - began)
        assert match.covered == sizes.prompt_tokens
    return Figure(
        name=f"look-up of {sizes.prompt_tokens:,} tokens, {where}",
        measured=statistics.median(seconds) * 1e3,
        unit="ms",
        target=2.0,
    )


def _memory(sizes: Sizes) -> list[Figure]:
    """Exact, by allocation: the index with its entries and copies; the queue on top."""
    with _new_cache() as cache:
        index, store = cache.catalog.index, cache.catalog.store("ram")
        rng, entries = random.Random(2), []
        tracemalloc.start()
        empty, _ = tracemalloc.get_traced_memory()
        while len(index) < sizes.memory_objects:
            tokens = rng.randbytes(sizes.prompt_tokens * TOKEN_BYTES)
            keys = ContextKeys(bytes(bytearray(NAMESPACE)), tokens, ALIGN)
            for start in range(0, len(keys), ALIGN):
                entry = index.add(new_entry(keys, start, min(start + ALIGN, len(keys))))
                index.place(entry, Copy(store, OBJECT_BYTES + start, time.time_ns(), "cold"))
        del tokens, keys, entry
        full, _ = tracemalloc.get_traced_memory()
        stored_tokens = sum(entry.end - entry.start for entry in index)
        entries = list(index)
        before_queue, _ = tracemalloc.get_traced_memory()
        for entry in entries:
            cache.catalog.queues[store].add(entry, entry.copies[0], time.time_ns())
        queue = tracemalloc.get_traced_memory()[0] - before_queue
        tracemalloc.stop()
    each = (full - empty - TOKEN_BYTES * stored_tokens) / len(entries)
    return [
        Figure(
            name="index memory beside 4 bytes per token",
            measured=each,
            unit="bytes/object",
            target=700,
            digits=0,
        ),
        Figure(
            name="    its place in the eviction queue",
            measured=queue / len(entries),
            unit="bytes/object",
            digits=0,
        ),
    ]


def _resident_bytes() -> int:
    """RSS now; 0 where there is no /proc."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text("ascii").split()[1]) * resource.getpagesize()

"""Recorded requests, replayed against index and eviction.

A trace has one JSON object per line: ``timestamp`` in milliseconds, and ``hash_ids``, equal
for equal blocks with an equal beginning. Here each id is one token, and each token a block, so
that a tier's quota is a number of blocks. Time is the trace's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Final

import attrs
from cache_sizes import Sizes
from figure import Figure
from report import Section
from series import Axis, Plot, Series

from erllama_core import Cache, NamedTier
from erllama_core.cache.entry import Entry
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import CacheError
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.prompt import pack

SAMPLE: Final = Path(__file__).with_name("trace_sample.jsonl")
CAPACITIES: Final = (1_000, 5_000, 10_000, 30_000, 100_000)
NAMESPACE: Final = bytes(32)
PAYLOAD: Final = b"block..."


@attrs.frozen
class Request:
    """One line of a trace."""

    time_ns: int
    blocks: list[int]


def read_trace(path: Path, limit: int | None) -> list[Request]:
    """The first ``limit`` requests."""
    requests: list[Request] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if len(requests) == limit:
                break
            record = json.loads(line)
            requests.append(Request(record["timestamp"] * 1_000_000, record["hash_ids"]))
    return requests


class Replay:
    """Serves requests from a cache of so many blocks."""

    def __init__(self, cache: Cache) -> None:
        self._placement: Final = cache.placement
        self._store: Final = cache.catalog.store("ram")
        self._space: Final = ModelSpace(
            cache, namespace=NAMESPACE, kv_class=KVClass.SPAN, tiers=("ram",), align_tokens=1
        )
        self._now = 0
        cache.catalog.clock = self._tick

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def serve(self, request: Request) -> int:
        """Blocks of the request that were there; the others are there afterwards."""
        self._now = max(self._now, request.time_ns)
        keys = self._space.keys(bytearray(pack(request.blocks)), None)
        n = len(request.blocks)
        covered = self._space.find(keys, may_sample=False).covered
        self._space.touch(keys, n)
        for position in range(covered, n):
            entry = Entry(
                ObjectId(ObjectKind.KV, position, keys.key(position + 1)),
                position + 1,
                NAMESPACE,
                keys.key(position),
                b"",
                keys.slice(position, position + 1),
            )
            try:
                self._placement.put(self._store, entry, b"", memoryview(PAYLOAD), "cold")
            except CacheError:
                break  # the tier is full of what this context itself needs
        return covered


def replay(requests: list[Request], capacity: int | None) -> float:
    """The hit ratio at that many blocks; None: without a limit."""
    quota = len(PAYLOAD) * (1 << 40 if capacity is None else capacity)
    hits = 0
    with Cache([NamedTier("ram", "ram", RamTier(quota))]) as cache:
        server = Replay(cache)
        for request in requests:
            hits += server.serve(request)
    return hits / sum(len(request.blocks) for request in requests)


def plain_lru(requests: list[Request], capacity: int) -> float:
    """What a plain LRU cache of blocks would do, touched in the order of the prompt."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        going_on = True
        for block in request.blocks:
            going_on = going_on and block in cached
            hits += going_on
            cached[block] = None
            cached.move_to_end(block)
            if len(cached) > capacity:
                cached.popitem(last=False)
    return hits / sum(len(request.blocks) for request in requests)


def measure(sizes: Sizes, path: Path) -> Section:
    """The hit ratio at every capacity beside plain LRU's."""
    requests = read_trace(path, sizes.trace_requests)
    limit = replay(requests, None)
    figures = [
        Figure(name=f"{path.name}: requests", measured=len(requests), digits=0),
        Figure(name="    hit ratio without a limit", measured=limit, digits=4),
    ]
    distinct = len({block for request in requests for block in request.blocks})
    capacities = [n for n in CAPACITIES if n < distinct]
    capacities += [n for n in CAPACITIES if n >= distinct][:1]  # more is without a limit
    ours = [replay(requests, capacity) for capacity in capacities]
    lru = [plain_lru(requests, capacity) for capacity in capacities]
    figures += [
        Figure(
            name=f"    hit ratio with {capacity:,} blocks, against plain LRU",
            measured=ratio,
            target=target,
            bound="at least",
            digits=4,
        )
        for capacity, ratio, target in zip(capacities, ours, lru, strict=True)
    ]
    x = tuple(map(float, capacities))
    plot = Plot(
        name="hit_ratio_against_capacity",
        title="Hits on recorded requests",
        x=Axis("capacity", "blocks of 512 tokens", "log"),
        y=Axis("hit ratio"),
        series=(
            Series(who="erllama", x=x, y=tuple(ours)),
            Series(who="plain LRU", x=x, y=tuple(lru)),
            Series(who="without a limit", x=x, y=(limit,) * len(x)),
        ),
    )
    return Section(
        name="trace",
        title="Hit ratio on a public trace",
        figures=tuple(figures),
        plots=(plot,),
    )

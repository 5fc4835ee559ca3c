"""The cache: tiers, an index over them, and the threads that read and write.

It knows no model and no backend, and works without any: ``save`` and ``load`` store payloads
of the caller's own. A model's worker uses it through a :class:`~.space.ModelSpace`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from erllama_core.cache.budget import Hold, MemoryBudget, MemoryUse
from erllama_core.cache.catalog import Catalog
from erllama_core.cache.counters import Counters
from erllama_core.cache.discovery import Discovery, Wanted
from erllama_core.cache.entry import Entry
from erllama_core.cache.evictor import Evicted, Evictor
from erllama_core.cache.flow import Flow
from erllama_core.cache.loader import Fetch, Loader
from erllama_core.cache.lookup import Match
from erllama_core.cache.meta import BlockMeta
from erllama_core.cache.named import NamedObjects
from erllama_core.cache.pages import PagePool
from erllama_core.cache.passage import Route
from erllama_core.cache.pinning import Pinning, not_whole
from erllama_core.cache.pins import Pinned
from erllama_core.cache.placement import MARKS_SHARE, Placement
from erllama_core.cache.report import Row, Usage, rows_of, usage_of
from erllama_core.cache.scan import Scanner
from erllama_core.cache.tiers import NamedTier, TierStore
from erllama_core.cache.upkeep import Upkeep
from erllama_core.errors import (
    BlockNotFound,
    CacheError,
    CorruptBlock,
    EngineClosed,
    unknown_name,
)
from erllama_core.interfaces.block import (
    Bytes,
    Header,
    ObjectId,
    ObjectKind,
    decode_header,
    encode_header,
    verify_object,
)
from erllama_core.interfaces.telemetry import CacheEvent
from erllama_core.prompt import pack
from erllama_core.results import CacheKey

MAX_INFLIGHT_BYTES: Final = 256 << 20
WRITER_THREADS: Final = 1
LOADER_THREADS: Final = 2
READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 30.0
POOL_IDLE_BYTES: Final = 64 << 20
SHIPPED_KINDS: Final = frozenset({"ram", "ram_file", "disk", "redis"})
"""May be named also where there is no tier of that kind: "what is in memory" is the same words
everywhere."""
_PIN_PATIENCE_S: Final = 10.0
"""What is to be pinned may have to be written first, or found by the scan."""


class Cache:
    """Objects in tiers, found by content. Thread-safe; a context manager.

    Opening starts a scan of the tiers in the background. With ``upkeep``, what other processes
    do in shared tiers is followed, and they are kept to their quota. ``memory_budget_bytes``
    bounds state in this process's memory, with what others set aside in :attr:`budget`; beyond
    it what is worth least gives way, and what finds no room then is not saved, or computed
    instead of read. ``on_event`` is told what becomes of objects, on whatever thread it happens;
    it must not wait. After a fork the child must open a cache of its own: what touches the tiers
    or what is known of them raises EngineClosed there, as it does after :meth:`close`.
    """

    def __init__(
        self,
        tiers: Sequence[NamedTier],
        *,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        writer_threads: int = WRITER_THREADS,
        loader_threads: int = LOADER_THREADS,
        read_timeout_s: float = READ_TIMEOUT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        marks_share: float = MARKS_SHARE,
        upkeep: bool = True,
        memory_budget_bytes: int | None = None,
        on_event: Callable[[CacheEvent], None] | None = None,
    ) -> None:
        self._pid: Final = os.getpid()
        self._closing: Final = threading.Lock()
        self._closed = False
        self._replacing: Final = tuple(threading.Lock() for _ in range(16))
        """One for the keys that begin alike: under it an explicit object is replaced."""
        self._write_timeout_s: Final = write_timeout_s
        self.budget: Final = MemoryBudget(memory_budget_bytes, max_inflight_bytes)
        self._quota_holds: Final[dict[str, Hold | None]] = {}
        """By their names, what is set aside for tiers on a tmpfs."""
        self._catalog: Final = Catalog(tiers, PagePool(POOL_IDLE_BYTES, self.budget))
        self._catalog.on_event = on_event
        self._evictor: Final = Evictor(self._catalog)
        self._placement: Final = Placement(self._catalog, self._evictor, marks_share)
        self._set_aside_for_tmpfs()
        self._pinning: Final = Pinning(self._catalog)
        self.loader_threads: Final = loader_threads
        self._loader: Final = Loader(
            self._catalog, self._placement, threads=loader_threads, timeout_s=read_timeout_s
        )
        self._flow: Final = Flow(
            self._catalog,
            self._placement,
            self._evictor,
            max_bytes=max_inflight_bytes,
            threads=writer_threads,
            patience_s=write_timeout_s,
        )
        self._discovery: Final = Discovery(self._catalog)
        self._upkeeps: Final[list[Upkeep]] = []
        self._scanner: Final = Scanner(
            self._catalog, self._pinning, self._start_upkeep if upkeep else lambda _: None
        )

    # -------------------------------------------------------- explicit objects

    def save(self, tier: str, meta: BlockMeta, payload: Bytes) -> tuple[CacheKey, Header, int]:
        """Store a payload of the caller's own; its key, header and size in the tier.

        Blocks until the tier has it. Of two saves of one key the later one stands. No policy
        applies, and no model ever reads it. Raises TierError, TierFull, ValueError for an
        unknown tier.
        """
        store = self._open().store(tier)
        object_id = meta.object_id()
        head = encode_header(
            kind=object_id.kind,
            start=meta.start,
            end=meta.end,
            namespace=meta.namespace,
            key=object_id.key,
            segment_key=bytes(32),
            lead_tokens=b"",
            tokens=pack(meta.tokens),
            align_tokens=0,
            payload=payload,
            info={**meta.info(), "created_ns": time.time_ns()},
        )
        entry = Entry(object_id, meta.end, meta.namespace, b"", b"", b"")
        # One key may be saved with another payload: it names the tokens, not the bytes. Tiers
        # keep what they have under a name, so what is there goes, and nobody comes in between.
        with self._replacing[object_id.key[0] % len(self._replacing)]:
            with contextlib.suppress(CacheError):
                self._catalog.remove(store, object_id)
            with memoryview(payload) as view:
                self._placement.put(store, entry, head, view, meta.save_reason, durable=True)
        self._catalog.counters.add(f"saves_{meta.save_reason}")
        header = decode_header(head)
        return CacheKey(object_id.key), header, header.size_bytes

    def load(self, tier: str, key: CacheKey, *, start: int = 0) -> tuple[Mapping[str, Any], bytes]:
        """What :meth:`save` stored under ``key``: what was said of it, and the payload.

        Finds what other processes stored, too. Raises BlockNotFound, CorruptBlock, TierError,
        ValueError for an unknown tier.
        """
        catalog = self._open()
        store = catalog.store(tier)
        object_id = ObjectId(ObjectKind.KV, start, key)
        started = time.perf_counter_ns()
        try:
            data = store.attempt(
                lambda: store.tier.read(object_id, lambda size: memoryview(bytearray(size))), "read"
            )
            header = verify_object(data, object_id)
            if header.align_tokens:
                raise BlockNotFound(f"{key.hex()} names a model's block, not an explicit save")
        except CorruptBlock as error:
            catalog.counters.add("misses")
            catalog.discard_corrupt(store, object_id, error.reason)
            raise
        except CacheError:
            catalog.counters.add("misses")
            raise
        catalog.counters.add("load_ns", time.perf_counter_ns() - started)
        catalog.counters.add("hits_exact")
        catalog.counters.hit_tier(store.name)
        entry = catalog.get(object_id)
        if entry is not None:
            catalog.touch((entry,))
        return header.info, bytes(data[header.header_bytes :])

    # ------------------------------------------------------------- observation

    def counters(self) -> Counters:
        """A copy of the counters; waits for nothing."""
        return self._catalog.counters.snapshot()

    def dump(self) -> list[Row]:
        """Every known object, one row per tier that has it, and those being written."""
        return rows_of(self._open())

    def usage(self) -> list[Usage]:
        """How full each tier is, and of what."""
        catalog = self._open()
        return [usage_of(catalog, store) for store in catalog.stores.values()]

    def memory(self) -> MemoryUse:
        """What is counted of this process's memory; waits for nothing."""
        return MemoryUse(
            budget_bytes=self.budget.limit_bytes,
            pages_bytes=self.budget.pages_bytes,
            idle_bytes=self._catalog.pool.idle_bytes,
            holders=self.budget.holders(),
        )

    def tier_names(self) -> tuple[str, ...]:
        """The names of the opened tiers."""
        return tuple(self._catalog.stores)

    def can_change_quota(self, tier: str) -> bool:
        """Whether :meth:`set_quota` works for an open tier. Raises ValueError for no tier."""
        return self._open().store(tier).quota is not None

    def set_quota(self, tier: str, quota_bytes: int | None) -> None:
        """Give a tier another quota; what is beyond it is evicted, least worth first.

        None: what the kind makes of a missing ``quota_bytes``. Of a shared tier the janitor
        evicts, which may be another process, and later. Raises ValueError for an unknown tier
        and for one that cannot change its quota.
        """
        catalog = self._open()
        store = catalog.store(tier)
        if store.quota is None:
            raise ValueError(f"the tier {tier!r} cannot change its quota while it is open")
        store.quota.set_quota(quota_bytes)
        if store.name in self._quota_holds:
            self._set_quota_aside(store)
        if store.shared is not None:
            store.upkeep_due.set()
            return
        usage = store.usage()
        if usage.quota_bytes is not None and usage.used_bytes > usage.quota_bytes:
            self._evictor.make_room(store, usage.used_bytes - usage.quota_bytes)

    # ---------------------------------------------------------- pins and eviction

    def pin(self, key: CacheKey | bytes, *, tier: str | None = None) -> Pinned:
        """Keep a context, such as a ``finish_key``, in one tier; what is protected there.

        Its blocks from the start, with the snapshot and the mark at its end, leave that tier
        only when a write needs room and there is nothing else to remove. ``tier=None``: of the
        tiers that have all of it, one that records pins, so that it holds after a restart and
        for other processes; else the first. The pin stays when objects go and come back.

        Blocks while what was handed over is being written. Raises BlockNotFound when the
        context is not stored, TierError when the pin cannot be recorded, ValueError.
        """
        catalog = self._open()
        stores = list(catalog.stores.values()) if tier is None else [catalog.store(tier)]
        pinned = self._pinning.pin(key, stores, self._settle)
        if pinned is None:
            raise not_whole(key, tier)
        return pinned

    def unpin(self, key: CacheKey | bytes) -> None:
        """Let a context be evicted like any other, in all tiers; unknown is a no-op.

        Raises TierError when a tier cannot erase the record of the pin.
        """
        self._open()
        self._pinning.unpin(key)

    def pins(self) -> dict[CacheKey, tuple[Pinned, ...]]:
        """Every pin, with what it protects now in each tier that has it."""
        self._open()
        return self._pinning.listed()

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str] | None = None) -> Evicted:
        """Free at least ``n_bytes``, least worth first, from the tiers named (None: all).

        ``tiers`` holds names or kinds. Frees less when no more can go: what is in use or
        pinned stays. Raises ValueError for a name that is neither a tier's nor a kind's.
        """
        catalog = self._open()
        if isinstance(tiers, str):
            tiers = (tiers,)
        known = {word for store in catalog.stores.values() for word in (store.name, store.kind)}
        known |= SHIPPED_KINDS
        for name in tiers or ():
            if name not in known:
                raise ValueError(unknown_name("tier", name, known))
        return self._evict(n_bytes, tiers, for_good=False)

    def free_memory(self, n_bytes: int, tiers: Sequence[str]) -> Evicted:
        """Give at least ``n_bytes`` back to the system: idle buffers, then objects of these tiers.

        ``tiers`` holds names or kinds, in the order in which they give way; what no tier has is
        passed over. Unlike :meth:`evict_bytes` this hands nothing on to another tier in memory.
        Idle buffers are counted in ``bytes``.
        """
        self._open()
        return self._evictor.free_memory(n_bytes, self._named(tiers))

    def free_pages(self, n_bytes: int) -> Evicted:
        """:meth:`free_memory` of all tiers in this process's memory: those that keep pages."""
        catalog = self._open()
        return self._evictor.free_memory(
            n_bytes, [store for store in catalog.stores.values() if store.keeps is not None]
        )

    def any_lasts(self, tiers: Sequence[str]) -> bool:
        """Whether any of these tiers is no memory of this machine."""
        return any(not store.is_volatile for store in self._named(tiers))

    def held_bytes(self, tiers: Sequence[str]) -> int:
        """What :meth:`free_memory` could free at most."""
        catalog = self._open()
        held = catalog.pool.idle_bytes
        for store in self._named(tiers):
            with contextlib.suppress(CacheError):
                held += store.usage().used_bytes
        return held

    def _named(self, tiers: Sequence[str]) -> list[TierStore]:
        stores = self._open().stores.values()
        return list(
            dict.fromkeys(
                store for name in tiers for store in stores if name in (store.name, store.kind)
            )
        )

    def _evict(self, n_bytes: int, tiers: Sequence[str] | None, *, for_good: bool) -> Evicted:
        catalog = self._open()
        rows = freed = 0
        for store in catalog.stores.values():
            if tiers is None or store.name in tiers or store.kind in tiers:
                evicted = self._evictor.evict(store, n_bytes - freed, for_good=for_good)
                rows += evicted.rows
                freed += evicted.bytes
        return Evicted(rows, freed)

    def gc(self) -> Evicted:
        """Remove every object that is neither in use nor pinned, from all tiers."""
        evicted = self._evict(1 << 62, None, for_good=True)
        self._catalog.pool.clear()
        return evicted

    # --------------------------------------------------------------- lifecycle

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed over before is written; False when time ran out.

        A tier that hangs is waited for no longer than ``write_timeout_s``, with a warning.
        """
        self._open()
        return self._flow.flush(timeout_s)

    def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """Wait until what the tiers held at opening is known; False when time ran out."""
        return self._scanner.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, stop the threads, close the tiers. Idempotent.

        Returns when that is done, also to a second thread that closes. A tier that hangs is
        left behind after ``write_timeout_s``, with a warning and what it has not written.
        """
        self._check_fork()
        with self._closing:
            if self._closed:
                return
            hanging: list[TierStore] = []
            try:
                self._scanner.close(self._write_timeout_s)
                for upkeep in self._upkeeps:
                    upkeep.close()
                self._discovery.close()
                hanging += self._flow.close()
                hanging += self._loader.close()
            finally:
                self._closed = True
                self._catalog.close(hanging)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------- for a model's space

    @property
    def catalog(self) -> Catalog:
        """The shared inside: index, tiers, counters."""
        return self._catalog

    @property
    def evictor(self) -> Evictor:
        """What makes room in tiers."""
        return self._evictor

    @property
    def placement(self) -> Placement:
        """What puts objects into tiers."""
        return self._placement

    @property
    def flow(self) -> Flow:
        """The way of objects into the tiers, and from one to the next."""
        return self._flow

    def fetch(
        self,
        match: Match,
        tiers: tuple[TierStore, ...],
        promote_to: TierStore | None,
        done: Callable[[Fetch], None],
    ) -> Fetch | None:
        """See :meth:`Loader.fetch`."""
        return self._loader.fetch(match, tiers, promote_to, done)

    def named_objects(self, route: Route) -> NamedObjects:
        """Objects under names of the caller's own, in the tiers of a route."""
        return NamedObjects(self._catalog, self._flow, self._loader, route)

    def disown(self, entry: Entry, reason: str) -> None:
        """Forget an object at once, and have its tiers delete it, on a thread that may do I/O."""
        catalog = self._catalog
        with catalog.lock:
            copies = list(entry.copies)
            for copy in copies:
                catalog.forget_copy(copy.tier, entry)
        for copy in copies:
            catalog.note_corrupt(copy.tier, entry.object_id, copy, reason)
            self._flow.delete_soon(copy.tier, entry.object_id)

    def is_scanned(self, tiers: Sequence[TierStore]) -> bool:
        """Whether what these tiers held at opening is known."""
        return self._scanner.has_scanned(tiers)

    def when_scanned(self, tiers: Sequence[TierStore], then: Callable[[], None]) -> None:
        """Call ``then`` on another thread when these are scanned, or have taken too long."""
        self._scanner.when_scanned(tiers, then)

    def discover(
        self, wanted: Wanted, tiers: Sequence[TierStore], then: Callable[[], None]
    ) -> bool:
        """See :meth:`Discovery.start`."""
        return self._discovery.start(wanted, tiers, then)

    # ------------------------------------------------------------------- inside

    def _set_aside_for_tmpfs(self) -> None:
        """Files on a tmpfs are memory, and any process may fill a tier's quota with them."""
        for store in self._catalog.stores.values():
            if store.is_volatile and store.keeps is None:
                self._set_quota_aside(store)

    def _set_quota_aside(self, store: TierStore) -> None:
        with contextlib.suppress(CacheError):
            quota = store.usage().quota_bytes or 0
            hold = self.budget.hold(f"tier {store.name!r}", quota, beyond=True)
            before, self._quota_holds[store.name] = self._quota_holds.get(store.name), hold
            if before is not None:
                before.release()

    def _settle(self) -> None:
        self.flush(_PIN_PATIENCE_S)
        self.wait_scanned(_PIN_PATIENCE_S)

    def _open(self) -> Catalog:
        self._check_fork()
        if self._closed:
            raise EngineClosed("the cache is closed")
        return self._catalog

    def _start_upkeep(self, store: TierStore) -> None:
        if store.shared is not None:
            self._upkeeps.append(
                Upkeep(self._catalog, self._evictor, store, store.shared, self._pinning.learn)
            )

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed(
                "this cache was opened before the process forked, and its threads are the "
                "parent's; open one after the fork"
            )

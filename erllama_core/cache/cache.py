"""The cache: tiers, an index over them, and the threads that read and write.

It knows no model and no backend, and works without any: ``save`` and ``load`` store payloads
of the caller's own. A model's worker uses it through a :class:`~.space.ModelSpace`.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import attrs

from erllama_core.cache.catalog import Catalog, Evicted
from erllama_core.cache.counters import Counters
from erllama_core.cache.discovery import Discovery, Wanted
from erllama_core.cache.index import Entry
from erllama_core.cache.loader import Fetch, Loader
from erllama_core.cache.lookup import Match
from erllama_core.cache.meta import BlockMeta
from erllama_core.cache.pages import PagePool, PooledPages
from erllama_core.cache.scan import Scanner
from erllama_core.cache.tiers import NamedTier, TierStore
from erllama_core.cache.upkeep import Upkeep
from erllama_core.cache.writer import Draft, Writer
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
from erllama_core.interfaces.log import get_logger
from erllama_core.prompt import pack
from erllama_core.results import CacheKey

log = get_logger("erllama.cache")

MAX_INFLIGHT_BYTES: Final = 256 << 20
POOL_IDLE_BYTES: Final = 64 << 20


@attrs.frozen(kw_only=True)
class Row:
    """A stored object as :meth:`Cache.dump` shows it."""

    kind: str
    key: CacheKey
    tier: str
    """Empty while the object is only in a save buffer."""
    start: int
    end: int
    size_bytes: int
    last_used_ns: int
    refcount: int
    status: str
    """``stored``, or ``writing``."""
    hits: int
    save_reason: str
    location: str


class Cache:
    """Objects in tiers, found by content. Thread-safe; a context manager.

    Opening starts a scan of the tiers in the background. With ``upkeep``, what other processes
    do in shared tiers is followed, and they are kept to their quota. After a fork the child must
    open a cache of its own: every use of the parent's raises EngineClosed there.
    """

    def __init__(
        self,
        tiers: Sequence[NamedTier],
        *,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        writer_threads: int = 1,
        loader_threads: int = 2,
        upkeep: bool = True,
    ) -> None:
        self._pid: Final = os.getpid()
        self._closing: Final = threading.Lock()
        self._closed = False
        self._catalog: Final = Catalog(tiers, PagePool(POOL_IDLE_BYTES))
        self._loader: Final = Loader(self._catalog, threads=loader_threads)
        self._writer: Final = Writer(
            self._write, max_bytes=max_inflight_bytes, threads=writer_threads
        )
        self._discovery: Final = Discovery(self._catalog)
        self._upkeeps: Final[list[Upkeep]] = []
        self._scanner: Final = Scanner(
            self._catalog, self._start_upkeep if upkeep else lambda _: None
        )

    # -------------------------------------------------------- explicit objects

    def save(self, tier: str, meta: BlockMeta, payload: Bytes) -> tuple[CacheKey, Header, int]:
        """Store a payload of the caller's own; its key, header and size in the tier.

        Blocks until the tier has it. No policy applies, and no model ever reads it. Raises
        TierError, TierFull, ValueError for an unknown tier.
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
        # One key may be saved with another payload: it names the tokens, not the bytes.
        self._catalog.remove(store, object_id)
        with memoryview(payload) as view:
            self._catalog.put(store, entry, head, view, meta.save_reason, durable=True)
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
        catalog = self._open()
        with catalog.lock:
            return [row for entry in catalog.index for row in _rows(entry)]

    def tier_names(self) -> tuple[str, ...]:
        """The names of the opened tiers."""
        return tuple(self._catalog.stores)

    # ---------------------------------------------------------------- eviction

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str] | None = None) -> Evicted:
        """Free at least ``n_bytes``, least worth first, from the tiers named (None: all).

        ``tiers`` holds names or kinds. Frees less when no more can go. Raises ValueError for
        a name that no tier has.
        """
        catalog = self._open()
        if isinstance(tiers, str):
            tiers = (tiers,)
        known = {word for store in catalog.stores.values() for word in (store.name, store.kind)}
        for name in tiers or ():
            if name not in known:
                raise ValueError(unknown_name("tier", name, known))
        rows = freed = 0
        for store in catalog.stores.values():
            if tiers is None or store.name in tiers or store.kind in tiers:
                evicted = catalog.evict(store, n_bytes - freed)
                rows += evicted.rows
                freed += evicted.bytes
        return Evicted(rows, freed)

    def gc(self) -> Evicted:
        """Remove every object that is not in use, from all tiers."""
        evicted = self.evict_bytes(1 << 62)
        self._catalog.pool.clear()
        return evicted

    # --------------------------------------------------------------- lifecycle

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed over before is written; False when time ran out."""
        self._open()
        return self._writer.wait_written(timeout_s)

    def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """Wait until what the tiers held at opening is known; False when time ran out."""
        return self._scanner.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, stop the threads, close the tiers. Idempotent.

        Returns when that is done, also to a second thread that closes.
        """
        self._check_fork()
        with self._closing:
            if self._closed:
                return
            try:
                self._scanner.close()
                for upkeep in self._upkeeps:
                    upkeep.close()
                self._discovery.close()
                self._writer.close()
                self._loader.close()
            finally:
                self._closed = True
                self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------- for a model's space

    @property
    def catalog(self) -> Catalog:
        """The shared inside: index, tiers, counters."""
        return self._catalog

    def fetch(
        self,
        match: Match,
        tiers: tuple[TierStore, ...],
        promote_to: TierStore | None,
        done: Callable[[Fetch], None],
    ) -> Fetch | None:
        """See :meth:`Loader.fetch`."""
        return self._loader.fetch(match, tiers, promote_to, done)

    def disown(self, entry: Entry, reason: str) -> None:
        """Forget an object at once, and have its tiers delete it, on a thread that may do I/O."""
        catalog = self._catalog
        with catalog.lock:
            stores = [copy.tier for copy in entry.copies]
            for store in stores:
                catalog.forget_copy(store, entry)
        for store in stores:
            catalog.counters.add("corrupt")
            log.warning(
                "object.corrupt", tier=store.name, object=str(entry.object_id), reason=reason
            )
            self._loader.submit(functools.partial(catalog.delete_forgotten, store, entry.object_id))

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

    def reserve(self, size: int, *, beyond_bound: bool = False) -> PooledPages | None:
        """Pages for an object to be saved; None, and counted, when there is no room for it."""
        if self._writer.reserve(size, beyond_bound=beyond_bound):
            try:
                return self._catalog.pool.acquire(size)
            except BaseException as error:
                self._writer.unreserve(size)
                if not isinstance(error, OSError):
                    raise
        self._catalog.counters.add("saves_dropped")
        return None

    def forgo(self, pages: PooledPages) -> None:
        """Give back what ``reserve`` gave, unsaved."""
        pages.release()
        self._writer.unreserve(pages.size)

    def submit(self, draft: Draft) -> None:
        """Make a new object findable, and hand it and its pages to the writer."""
        with self._catalog.lock:
            entry = self._catalog.index.add(draft.entry)
            missing = tuple(
                tier
                for tier in draft.tiers
                if tier not in entry.writing and entry.copy_in(tier) is None
            )
            entry.writing += missing
            if missing and entry.pages is None:
                entry.pages = draft.pages
        if not missing:  # the same content is there, or on its way
            self.forgo(draft.pages)
            return
        self._catalog.counters.add(f"saves_{draft.save_reason}")
        self._writer.submit(attrs.evolve(draft, entry=entry, tiers=missing))

    # ------------------------------------------------------------------- inside

    def _open(self) -> Catalog:
        self._check_fork()
        if self._closed:
            raise EngineClosed("the cache is closed")
        return self._catalog

    def _start_upkeep(self, store: TierStore) -> None:
        if store.shared is not None:
            self._upkeeps.append(Upkeep(self._catalog, store, store.shared))

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed(
                "this cache was opened before the process forked, and its threads are the "
                "parent's; open one after the fork"
            )

    def _write(self, draft: Draft) -> None:
        """On a writer thread: checksum, then every tier of the draft."""
        entry, pages, catalog = draft.entry, draft.pages, self._catalog
        stored = 0
        try:
            if self._is_reachable(draft):
                stored = self._write_to_tiers(draft)
        finally:
            if not stored:
                catalog.counters.add("saves_dropped")
            with catalog.lock:
                entry.writing = tuple(t for t in entry.writing if t not in draft.tiers)
                if entry.pages is pages:
                    entry.pages = None
                catalog.drop_if_gone(entry)
            pages.release()

    def _is_reachable(self, draft: Draft) -> bool:
        """Whether the block that this one goes on from is still there.

        A context that is larger than its tiers loses its end, not its beginning.
        """
        with self._catalog.lock:
            after = draft.after
            return after is None or bool(after.copies) or after.pages is not None

    def _write_to_tiers(self, draft: Draft) -> int:
        entry, pages = draft.entry, draft.pages
        head = encode_header(
            kind=entry.object_id.kind,
            start=entry.start,
            end=entry.end,
            namespace=entry.namespace,
            key=entry.object_id.key,
            segment_key=entry.segment_key,
            lead_tokens=entry.lead,
            tokens=entry.tokens,
            align_tokens=draft.align_tokens,
            payload=pages.view,
            info={"save_reason": draft.save_reason, "created_ns": time.time_ns()},
        )
        durable = draft.save_reason in {"finish", "shutdown"}
        stored = 0
        for store in draft.tiers:
            try:
                self._catalog.put(store, entry, head, pages, draft.save_reason, durable=durable)
                if draft.absorbs is not None:
                    self._catalog.remove_unused(store, draft.absorbs)
                stored += 1
            except CacheError:
                continue  # counted and logged where it was raised
        return stored


def _rows(entry: Entry) -> list[Row]:
    def row(
        tier: str, size: int, used_ns: int, users: int, status: str, hits: int, why: str, where: str
    ) -> Row:
        return Row(
            kind=entry.object_id.kind.value,
            key=CacheKey(entry.object_id.key),
            tier=tier,
            start=entry.start,
            end=entry.end,
            size_bytes=size,
            last_used_ns=used_ns,
            refcount=users,
            status=status,
            hits=hits,
            save_reason=why,
            location=where,
        )

    if not entry.copies and entry.pages is not None:
        size = len(entry.pages.view)
        return [row("", size, time.time_ns(), 1, "writing", 0, "", "a save buffer")]
    return [
        row(
            copy.tier.name,
            copy.size_bytes,
            copy.last_used_ns,
            copy.users,
            "stored",
            copy.hits,
            copy.save_reason,
            copy.tier.tier.location(entry.object_id),
        )
        for copy in entry.copies
    ]

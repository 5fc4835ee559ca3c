"""How objects get to the tiers: the way down, from a save buffer to the last tier of a model.

Every tier has a lane of its own, so one that is slow or hangs keeps back what it was to store
itself and nothing else. An object stays in memory, and findable, until the last tier that it
is on its way to has it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.durability import Unsynced
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import Use, score_ns
from erllama_core.cache.lanes import Lane, Work
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.reading import read_object
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound, CacheError, MemoryBudgetExceeded
from erllama_core.interfaces.block import KEY_BYTES, ObjectId, encode_header
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Pages

log = get_logger("erllama.cache")

DURABLE_REASONS: Final = frozenset({"finish", "shutdown"})
_MAX_ROUTES: Final = 1 << 16
"""Namespaces whose tiers are remembered; every salt makes one."""


@attrs.frozen
class Route:
    """A model's tiers, nearest first, and how its objects are spread over them."""

    tiers: tuple[TierStore, ...]
    write_back: bool
    """The first tier that takes an object has it; the next one when it leaves that."""
    align_tokens: int

    @functools.cached_property
    def lasting(self) -> tuple[TierStore, ...]:
        """The tiers that a restart leaves alone; of the process, if no other is there."""
        tiers = tuple(store for store in self.tiers if not store.is_volatile)
        return tiers or tuple(store for store in self.tiers if store.keeps is None)

    def below(self, store: TierStore) -> tuple[TierStore, ...]:
        """The tiers that are further away."""
        return self.tiers[self.tiers.index(store) + 1 :] if store in self.tiers else ()


@attrs.frozen(eq=False)
class SaveBuffer:
    """Pages for one object, and the tiers that have room for it on its way."""

    pages: PooledPages
    tiers: tuple[TierStore, ...]

    @property
    def view(self) -> memoryview:
        """The bytes to write the payload to."""
        return self.pages.view


@attrs.frozen(eq=False)
class Draft:
    """A new object. Owns its buffer."""

    entry: Entry
    buffer: SaveBuffer
    route: Route
    save_reason: str
    after: Entry | None
    """The block that this one goes on from; without it, it would be of no use."""
    absorbs: Entry | None = None
    """A block that this one holds too; it goes when this one is stored."""


@attrs.define(eq=False)
class _Passage:
    """An object on its way to one or more tiers, each of which holds its pages."""

    entry: Entry
    pages: Pages
    size: int
    """As it was reserved on every lane."""
    save_reason: str
    align_tokens: int
    waiting: int
    """Tiers that have not got it yet."""
    durable: bool = False
    after: Entry | None = None
    absorbs: Entry | None = None
    use: Use | None = None
    """Of the copy that it is made of; it is stored only in place of what is worth less."""
    otherwise: tuple[TierStore, ...] = ()
    """Where it goes when the tier does not take it."""
    is_stored: bool = False
    _head: bytes = b""
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def head(self) -> bytes:
        """The header; its checksum is computed once, by the first tier's thread."""
        entry = self.entry
        with self._lock:
            if not self._head:
                self._head = encode_header(
                    kind=entry.object_id.kind,
                    start=entry.start,
                    end=entry.end,
                    namespace=entry.namespace,
                    key=entry.object_id.key,
                    segment_key=entry.segment_key or bytes(KEY_BYTES),
                    lead_tokens=entry.lead,
                    tokens=entry.tokens,
                    # What stands in no tree of blocks was not cut anywhere.
                    align_tokens=self.align_tokens if entry.segment_key else 0,
                    payload=self.pages.view,
                    info=self._info(),
                )
            return self._head

    def _info(self) -> dict[str, Any]:
        """What is written of the object beside its names."""
        info: dict[str, Any] = {"save_reason": self.save_reason, "created_ns": time.time_ns()}
        if self.entry.anchors:
            info["anchors"] = self.entry.anchors.hex()
        return info


class Flow:
    """Writes, passes down and makes durable; thread-safe. No call but ``flush`` and ``close``
    blocks: the lanes' threads do what does.
    """

    def __init__(
        self, catalog: Catalog, *, max_bytes: int, threads: int, patience_s: float
    ) -> None:
        self._catalog: Final = catalog
        self._patience_s: Final = patience_s
        stores = tuple(catalog.stores.values())
        self._lanes: Final = {
            store: Lane(f"writer-{store.name}", threads=threads, max_bytes=max_bytes)
            for store in stores
        }
        self._unsynced: Final = {
            store: Unsynced(store, store.durable) for store in stores if store.durable is not None
        }
        self._routes: Final[dict[bytes, tuple[Route, ...]]] = {}
        """Of every namespace that may pass objects down; the catalog's lock guards it."""
        catalog.before_deletion = self._demote

    def register(self, namespace: bytes, route: Route) -> None:
        """Have objects of a namespace passed down along a route when they are evicted."""
        if not route.write_back:
            return
        with self._catalog.lock:
            known = self._routes.pop(namespace, ())
            self._routes[namespace] = known if route in known else (*known, route)
            if len(self._routes) > _MAX_ROUTES:
                del self._routes[next(iter(self._routes))]

    # --------------------------------------------------------------------- saves

    def reserve(self, size: int, route: Route, *, beyond_bound: bool) -> SaveBuffer | None:
        """Pages for an object to be saved; None, and counted, when no tier has room for it."""
        tiers = []
        for store in route.tiers:
            if self._lanes[store].reserve(size, beyond_bound=beyond_bound):
                tiers.append(store)
                if route.write_back:
                    break
            else:
                self._catalog.counters.drop_in_tier(store.name)
        if tiers:
            try:
                return SaveBuffer(self._catalog.pool.acquire(size), tuple(tiers))
            except BaseException as error:
                self._unreserve(tiers, size)
                if isinstance(error, MemoryBudgetExceeded):
                    self._catalog.counters.add("saves_over_budget")
                elif not isinstance(error, OSError):
                    raise
        self._catalog.counters.add("saves_dropped")
        return None

    def forgo(self, buffer: SaveBuffer) -> None:
        """Give back what ``reserve`` gave, unsaved."""
        size = buffer.pages.size
        buffer.pages.release()
        self._unreserve(buffer.tiers, size)

    def submit(self, draft: Draft) -> None:
        """Make a new object findable, and hand it to the tiers that it was reserved for."""
        pages, reason = draft.buffer.pages, draft.save_reason
        size = pages.size
        with self._catalog.lock:
            entry = self._catalog.index.add(draft.entry)
            missing = tuple(store for store in draft.buffer.tiers if not _is_in(entry, store))
            self._send(
                missing,
                _Passage(
                    entry,
                    pages,
                    size,
                    reason,
                    draft.route.align_tokens,
                    len(missing),
                    durable=reason in DURABLE_REASONS,
                    after=draft.after,
                    absorbs=draft.absorbs,
                    otherwise=draft.route.below(missing[0])
                    if missing and draft.route.write_back
                    else (),
                ),
            )
        pages.release()
        self._unreserve([store for store in draft.buffer.tiers if store not in missing], size)
        if missing:  # else the same content is there, or on its way
            self._catalog.counters.add(f"saves_{reason}")

    def make_durable(self, entries: Iterable[Entry], route: Route) -> None:
        """See to it that a tier that lasts has these objects, and that no power cut takes them.

        What none has yet, because it was written back or dropped on its way, is handed over.
        """
        if not route.lasting:
            return
        late: dict[TierStore, list[ObjectId]] = {}
        with self._catalog.lock:
            for entry in entries:
                there = [store for store in route.lasting if _is_in(entry, store)]
                if not there:
                    self._copy_later(route.lasting[0], entry, route)
                for store in there:
                    if store in self._unsynced:
                        late.setdefault(store, []).append(entry.object_id)
        for store, object_ids in late.items():
            sync = functools.partial(self._unsynced[store].sync, object_ids)
            self._lanes[store].submit(Work(sync, _nothing))

    def delete_soon(self, store: TierStore, object_id: ObjectId) -> None:
        """Delete what was forgotten, on the tier's own thread."""
        delete = functools.partial(self._catalog.delete_forgotten, store, object_id)
        self._lanes[store].submit(Work(functools.partial(_quietly, delete), _nothing))

    # ----------------------------------------------------------------- lifecycle

    def flush(self, timeout_s: float | None) -> bool:
        """Wait until all that was handed over is written; False when time ran out.

        A tier that hangs is waited for no longer than the cache's patience.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waited_for = set(self._lanes)
        for _ in self._lanes:  # what one tier does not take may go to the next one
            for store in self._lanes:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if store in waited_for and not self._lanes[store].wait_done(left, self._patience_s):
                    if deadline is not None and time.monotonic() >= deadline:
                        return False
                    waited_for.discard(store)
                    log.warning("tier.hangs", tier=store.name, doing="write")
        return len(waited_for) == len(self._lanes)

    def close(self) -> list[TierStore]:
        """Write what waits and what only this process's memory holds; the tiers that hang."""
        self._rescue()
        self.flush(None)
        hanging = []
        for store, lane in self._lanes.items():
            given_up = lane.close(self._patience_s)
            if given_up:
                hanging.append(store)
                log.warning("tier.abandoned", tier=store.name, unwritten=given_up)
        return hanging

    def _rescue(self) -> None:
        """Hand down what write-back has left in memory alone, worth most first.

        Of a context its beginning comes before what hangs on it.
        """
        until_s = time.monotonic() + self._patience_s
        found: list[tuple[int, Entry, Route, TierStore]] = []
        with self._catalog.lock:
            for entry in self._catalog.index:
                if any(copy.tier.keeps is None for copy in entry.copies):
                    continue
                for copy in entry.copies:
                    route, lower = self._way_down(copy.tier, entry)
                    target = next((store for store in lower if store.keeps is None), None)
                    if route is not None and target is not None:
                        found.append((score_ns(copy), entry, route, target))
                        break
            found.sort(key=lambda item: item[0], reverse=True)
            for _, entry, route, target in found:
                self._copy_later(target, entry, route, until_s)

    # -------------------------------------------------------------- the way down

    def _way_down(self, store: TierStore, entry: Entry) -> tuple[Route | None, Sequence[TierStore]]:
        """The tiers below ``store`` for an object that none of them has. Under the lock."""
        for route in self._routes.get(entry.namespace, ()):
            lower = route.below(store)
            if lower and not any(_is_in(entry, other) for other in lower):
                return route, lower
        return None, ()

    def _demote(
        self, store: TierStore, victims: Sequence[tuple[Entry, Copy]], out_of_memory: bool
    ) -> list[Callable[[], None]]:
        """Pass evicted objects to the tier below, as far as it has room for them on their way.

        ``out_of_memory``: to one that is no memory. Called under the catalog's lock, before they
        are deleted. What must be read first is returned, to be done without the lock.
        """
        reads: list[Callable[[], None]] = []
        for entry, copy in victims:
            route, lower = self._way_down(store, entry)
            target = next((one for one in lower if not (out_of_memory and one.is_volatile)), None)
            if route is None or target is None:
                continue
            if not self._lanes[target].reserve(copy.size_bytes):
                self._drop(target)
                continue
            if store.keeps is None:
                reads.append(functools.partial(self._read_and_send, target, entry, copy, route))
                continue
            try:
                pages = store.keeps.borrow(entry.object_id)
            except BlockNotFound:
                self._lanes[target].unreserve(copy.size_bytes)
                continue
            self._catalog.counters.add("demotions")
            self._send((target,), _remade(entry, pages, copy, route))
            pages.release()
        return reads

    def _read_and_send(
        self,
        target: TierStore,
        entry: Entry,
        copy: Copy,
        route: Route,
        *,
        durable: bool = False,
    ) -> None:
        """Hand over what has to be read first; room was reserved. Blocks."""
        try:
            _, pages = read_object(self._catalog, copy.tier, entry)
        except (CacheError, OSError):
            self._lanes[target].unreserve(copy.size_bytes)
            self._drop(target)
            return
        with self._catalog.lock:
            entry = self._catalog.index.add(entry)
            if _is_in(entry, target):
                self._lanes[target].unreserve(copy.size_bytes)
            else:
                if not durable:
                    self._catalog.counters.add("demotions")
                self._send((target,), _remade(entry, pages, copy, route, durable=durable))
        pages.release()

    def _copy_later(
        self, target: TierStore, entry: Entry, route: Route, until_s: float | None = None
    ) -> None:
        """Have a further tier store an object that is in a nearer one. Under the lock.

        It is looked for when its turn comes, so however much waits takes up no memory.
        """
        copy = functools.partial(self._copy, target, entry, route, until_s)
        self._lanes[target].submit(Work(copy, _nothing))

    def _copy(self, target: TierStore, entry: Entry, route: Route, until_s: float | None) -> None:
        """On a thread of the target's lane. ``until_s``: when it is too late, and for a
        finished context, which is made durable, None.
        """
        durable = until_s is None
        with self._catalog.lock:
            there = _is_in(entry, target)
            pages = None if there else _in_memory(entry)
            copy = next(iter(entry.copies), None)
            if pages is not None:
                passage = _remade(entry, pages, copy, route, durable=durable)
                passage.pages = entry.pages = pages
                entry.writing += (target,)
        if there:  # by another way, meanwhile
            if durable and target in self._unsynced:
                self._unsynced[target].sync((entry.object_id,))
        elif pages is not None:
            if until_s is None or time.monotonic() < until_s:
                self._write(target, passage)
            else:
                self._is_over(target, passage, stored=False)
        elif copy is not None and self._lanes[target].reserve(copy.size_bytes):
            # The other tier may hang: its own threads wait for it.
            self._lanes[copy.tier].submit(
                Work(
                    functools.partial(
                        self._read_and_send, target, entry, copy, route, durable=durable
                    ),
                    functools.partial(self._lanes[target].unreserve, copy.size_bytes),
                )
            )
        else:
            self._catalog.counters.drop_in_tier(target.name)

    # -------------------------------------------------------------------- inside

    def _send(self, stores: tuple[TierStore, ...], passage: _Passage) -> None:
        """Mark an object as being written to tiers, and hand it to them. Under the lock.

        Each tier holds the pages until it is done, ``Entry.pages`` for as long as any does.
        """
        entry = passage.entry
        if entry.pages is not None:
            passage.pages = entry.pages
        for store in stores:
            passage.pages.retain()
            entry.pages = passage.pages
            entry.writing += (store,)
            self._hand_over(store, passage)

    def _hand_over(self, store: TierStore, passage: _Passage) -> None:
        if store in self._unsynced and not passage.durable:
            self._unsynced[store].expect(passage.entry.object_id)
        self._lanes[store].submit(
            Work(
                functools.partial(self._write, store, passage),
                functools.partial(self._is_over, store, passage, stored=False),
                passage.size,
            )
        )

    def _write(self, store: TierStore, passage: _Passage) -> None:
        """On a thread of the tier's lane."""
        stored = False
        try:
            if not self._is_reachable(passage):
                passage.otherwise = ()
                return
            self._catalog.put(
                store,
                passage.entry,
                passage.head(),
                passage.pages,
                passage.save_reason,
                durable=passage.durable,
                use=passage.use,
            )
            stored = True
            if passage.absorbs is not None:
                self._catalog.remove_unused(store, passage.absorbs)
        except CacheError:
            return  # counted and logged where it was raised
        finally:
            self._is_over(store, passage, stored=stored)

    def _is_reachable(self, passage: _Passage) -> bool:
        """Whether the block that this one goes on from is still there.

        A context that is larger than its tiers loses its end, not its beginning.
        """
        with self._catalog.lock:
            after = passage.after
            return after is None or bool(after.copies) or after.pages is not None

    def _is_over(self, store: TierStore, passage: _Passage, *, stored: bool) -> None:
        """A tier has the object, or will not have it."""
        entry = passage.entry
        if store in self._unsynced and not passage.durable:
            self._unsynced[store].settle(entry.object_id, stored=stored)
        if not stored:
            self._catalog.counters.drop_in_tier(store.name)
            self._catalog.report(
                "dropped", store, entry.object_id, passage.size, passage.save_reason
            )
        with self._catalog.lock:
            entry.writing = tuple(other for other in entry.writing if other is not store)
            passage.is_stored |= stored
            if not stored and self._try_next(passage):
                return  # with these pages
            passage.waiting -= 1
            if not (passage.waiting or passage.is_stored or entry.copies or entry.writing):
                self._catalog.counters.add("saves_dropped")
            if not entry.writing:
                entry.pages = None
            self._catalog.drop_if_gone(entry)
        passage.pages.release()

    def _try_next(self, passage: _Passage) -> bool:
        """Hand an object that a tier did not take to one further down."""
        while passage.otherwise:
            store, *further = passage.otherwise
            passage.otherwise = tuple(further)
            if _is_in(passage.entry, store):
                passage.is_stored = True
                return False
            if self._lanes[store].reserve(passage.size):
                passage.entry.writing += (store,)
                self._hand_over(store, passage)
                return True
        return False

    def _drop(self, store: TierStore) -> None:
        self._catalog.counters.drop_in_tier(store.name)
        self._catalog.counters.add("saves_dropped")

    def _unreserve(self, stores: Iterable[TierStore], size: int) -> None:
        for store in stores:
            self._lanes[store].unreserve(size)


def _is_in(entry: Entry, store: TierStore) -> bool:
    return store in entry.writing or entry.copy_in(store) is not None


def _in_memory(entry: Entry) -> Pages | None:
    """The pages of an object, retained, where memory has them."""
    if entry.pages is not None:
        entry.pages.retain()
        return entry.pages
    for copy in entry.copies:
        if copy.tier.keeps is not None:
            try:
                return copy.tier.keeps.borrow(entry.object_id)
            except BlockNotFound:
                continue
    return None


def _remade(
    entry: Entry, pages: Pages, copy: Copy | None, route: Route, *, durable: bool = False
) -> _Passage:
    """The passage of an object that is stored, or on its way, to one more tier."""
    return _Passage(
        entry,
        pages,
        len(pages.view) if copy is None else copy.size_bytes,
        "finish" if copy is None else copy.save_reason,
        route.align_tokens,
        1,
        durable=durable,
        use=None if durable or copy is None else Use(copy.last_used_ns, copy.hits),
    )


def _quietly(act: Callable[[], object]) -> None:
    try:
        act()
    except CacheError:
        return  # counted and logged where it was raised


def _nothing() -> None:
    """What giving up takes where nothing is held."""

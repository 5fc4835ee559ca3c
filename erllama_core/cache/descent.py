"""The way down: what is evicted, or is to last, goes from one tier to the next."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import Use, score_ns
from erllama_core.cache.evictor import Evictor
from erllama_core.cache.passage import Passage, Route, is_in
from erllama_core.cache.reading import read_object
from erllama_core.cache.tiers import TierStore
from erllama_core.cache.writer import Writer
from erllama_core.errors import BlockNotFound, CacheError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import Pages

_MAX_ROUTES: Final = 1 << 16
"""Namespaces whose tiers are remembered; every salt makes one."""


class Descent:
    """Passes objects from tier to tier. Thread-safe; nothing blocks but on the writer's threads."""

    def __init__(self, catalog: Catalog, evictor: Evictor, writer: Writer) -> None:
        self._catalog: Final = catalog
        self._writer: Final = writer
        self._routes: Final[dict[bytes, tuple[Route, ...]]] = {}
        """Of every namespace that may pass objects down; the catalog's lock guards it."""
        evictor.before_deletion = self._demote

    def register(self, namespace: bytes, route: Route) -> None:
        """Have objects of a namespace passed down along a route when they are evicted."""
        if not route.write_back:
            return
        with self._catalog.lock:
            known = self._routes.pop(namespace, ())
            self._routes[namespace] = known if route in known else (*known, route)
            if len(self._routes) > _MAX_ROUTES:
                del self._routes[next(iter(self._routes))]

    def make_durable(self, entries: Iterable[Entry], route: Route) -> None:
        """See to it that a tier that lasts has these objects, and that no power cut takes them.

        What none has yet, because it was written back or dropped on its way, is handed over.
        """
        if not route.lasting:
            return
        late: dict[TierStore, list[ObjectId]] = {}
        with self._catalog.lock:
            for entry in entries:
                there = [store for store in route.lasting if is_in(entry, store)]
                if not there:
                    self._copy_later(route.lasting[0], entry, route)
                for store in there:
                    if self._writer.has_unsynced(store):
                        late.setdefault(store, []).append(entry.object_id)
        for store, object_ids in late.items():
            self._writer.run(store, functools.partial(self._writer.sync, store, object_ids))

    def rescue(self) -> None:
        """Hand down what write-back has left in memory alone, worth most first.

        Of a context its beginning comes before what hangs on it.
        """
        until_s = time.monotonic() + self._writer.patience_s
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

    def _way_down(self, store: TierStore, entry: Entry) -> tuple[Route | None, Sequence[TierStore]]:
        """The tiers below ``store`` for an object that none of them has. Under the lock."""
        for route in self._routes.get(entry.namespace, ()):
            lower = route.below(store)
            if lower and not any(is_in(entry, other) for other in lower):
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
            if not self._writer.reserve(target, copy.size_bytes):
                self._writer.drop(target)
                continue
            if store.keeps is None:
                reads.append(functools.partial(self._read_and_send, target, entry, copy, route))
                continue
            try:
                pages = store.keeps.borrow(entry.object_id)
            except BlockNotFound:
                self._writer.unreserve(target, copy.size_bytes)
                continue
            self._catalog.counters.add("demotions")
            self._writer.send((target,), _remade(entry, pages, copy, route))
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
            self._writer.unreserve(target, copy.size_bytes)
            self._writer.drop(target)
            return
        with self._catalog.lock:
            entry = self._catalog.index.add(entry)
            if is_in(entry, target):
                self._writer.unreserve(target, copy.size_bytes)
            else:
                if not durable:
                    self._catalog.counters.add("demotions")
                self._writer.send((target,), _remade(entry, pages, copy, route, durable=durable))
        pages.release()

    def _copy_later(
        self, target: TierStore, entry: Entry, route: Route, until_s: float | None = None
    ) -> None:
        """Have a further tier store an object that is in a nearer one. Under the lock.

        It is looked for when its turn comes, so however much waits takes up no memory.
        """
        copy = functools.partial(self._copy, target, entry, route, until_s)
        self._writer.run(target, copy)

    def _copy(self, target: TierStore, entry: Entry, route: Route, until_s: float | None) -> None:
        """On a thread of the target's lane. ``until_s``: when it is too late, and for a
        finished context, which is made durable, None.
        """
        durable = until_s is None
        with self._catalog.lock:
            there = is_in(entry, target)
            pages = None if there else _in_memory(entry)
            copy = next(iter(entry.copies), None)
            if pages is not None:
                passage = _remade(entry, pages, copy, route, durable=durable)
                passage.pages = entry.pages = pages
                entry.writing += (target,)
        if there:  # by another way, meanwhile
            if durable:
                self._writer.sync(target, (entry.object_id,))
        elif pages is not None:
            if until_s is None or time.monotonic() < until_s:
                self._writer.write(target, passage)
            else:
                self._writer.is_over(target, passage, stored=False)
        elif copy is not None and self._writer.reserve(target, copy.size_bytes):
            # The other tier may hang: its own threads wait for it.
            self._writer.run(
                copy.tier,
                functools.partial(self._read_and_send, target, entry, copy, route, durable=durable),
                functools.partial(self._writer.unreserve, target, copy.size_bytes),
            )
        else:
            self._catalog.counters.drop_in_tier(target.name)


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
) -> Passage:
    """The passage of an object that is stored, or on its way, to one more tier."""
    return Passage(
        entry,
        pages,
        len(pages.view) if copy is None else copy.size_bytes,
        "finish" if copy is None else copy.save_reason,
        route.align_tokens,
        1,
        durable=durable,
        use=None if durable or copy is None else Use(copy.last_used_ns, copy.hits),
    )

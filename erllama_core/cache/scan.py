"""Learning at start what the tiers hold, in the background."""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.cache.anchors import read_anchors
from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Entry
from erllama_core.cache.pinning import Pinning
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CorruptBlock, UnknownFormat
from erllama_core.interfaces.block import Header, decode_header
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import ScanFailure, ScannedObject

log = get_logger("erllama.cache")

PATIENCE_S: Final = 2.0
"""From opening on, a miss waits no longer than this for the scan."""
_PREPARED_BUFFERS: Final = 64


class Scanner:
    """One pass over every tier, each on a thread of its own, which then calls ``scanned``.

    Afterwards it has the pool map pages for what is read next, most likely: a restart is
    followed by requests for what was used last, and mapping fresh pages can take as long as
    reading them (3 to 50 ms for 46 MB, as the kernel, or a hypervisor below it, has them at
    hand or not).
    """

    def __init__(
        self, catalog: Catalog, pinning: Pinning, scanned: Callable[[TierStore], None]
    ) -> None:
        self._catalog: Final = catalog
        self._pinning: Final = pinning
        self._scanned: Final = scanned
        self._latest: list[tuple[int, int]] = []
        """Time of last use and size of the objects used last; a heap."""
        self._stopping = False
        self._lock: Final = threading.Lock()
        self._unscanned: set[TierStore] = {
            store for store in catalog.stores.values() if store.keeps is None
        }
        self._waiting: list[tuple[Sequence[TierStore], Callable[[], None]]] = []
        self._impatient = False
        self._done: Final = threading.Event()
        self._timer: Final = threading.Timer(PATIENCE_S, self._lose_patience)
        self._timer.daemon = True
        self._timer.name = "erllama-scan-timer"
        self._threads: Final = [
            threading.Thread(
                target=self._run, args=(store,), name=f"erllama-scan-{store.name}", daemon=True
            )
            for store in self._unscanned
        ]
        self._running = len(self._threads)
        if self._threads:
            self._timer.start()
        else:
            self._done.set()
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything that was stored before the start is known."""
        return self._done.wait(timeout_s)

    def has_scanned(self, stores: Sequence[TierStore]) -> bool:
        """Whether these are known, or have taken so long that nobody waits any more."""
        return self._impatient or self._unscanned.isdisjoint(stores)

    def when_scanned(self, stores: Sequence[TierStore], then: Callable[[], None]) -> None:
        """Call ``then`` once these are known, or patience is lost; on some thread, or now."""
        with self._lock:
            if not self.has_scanned(stores):
                self._waiting.append((stores, then))
                return
        then()

    def close(self, timeout_s: float) -> None:
        """Stop early and wait for the threads; nobody waits for the scan afterwards.

        A thread whose tier hangs is left behind.
        """
        self._stopping = True
        self._timer.cancel()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("scan.abandoned", thread=thread.name)
        self._lose_patience()
        if self._timer.is_alive():
            self._timer.join()

    def _lose_patience(self) -> None:
        with self._lock:
            self._impatient = True
        self._call_those_that_need_not_wait()

    def _call_those_that_need_not_wait(self) -> None:
        with self._lock:
            ready = [item for item in self._waiting if self.has_scanned(item[0])]
            self._waiting = [item for item in self._waiting if item not in ready]
        for _, then in ready:
            then()

    def _run(self, store: TierStore) -> None:
        try:
            self._scan(store)
        finally:
            with self._lock:
                self._unscanned.discard(store)
                self._running -= 1
                last = not self._running
            self._call_those_that_need_not_wait()
            try:
                if not self._stopping:
                    self._scanned(store)
            finally:
                if last:
                    self._timer.cancel()
                    self._done.set()
        if last and not self._stopping:
            with contextlib.suppress(OSError):
                self._catalog.pool.prepare(size for _, size in sorted(self._latest, reverse=True))

    def _scan(self, store: TierStore) -> None:
        started = time.perf_counter()
        learned = skipped = 0
        # Before what they protect is known, so that room for a new object is not made of it.
        self._pinning.learn(store)
        try:
            for found in store.tier.scan():
                if self._stopping:
                    return
                reason = (
                    f"{found.location}: {found.reason}"
                    if isinstance(found, ScanFailure)
                    else self._learn(store, found)
                )
                if reason is None:
                    learned += 1
                else:
                    skipped += 1
                    log.debug("scan.skipped", tier=store.name, reason=reason)
        except Exception as error:  # noqa: BLE001 - a tier's own code; the cache goes on without
            log.warning("scan.failed", tier=store.name, error=str(error))
        if learned or skipped:
            seconds = round(time.perf_counter() - started, 3)
            log.info(
                "tier.scanned", tier=store.name, objects=learned, skipped=skipped, seconds=seconds
            )

    def _learn(self, store: TierStore, found: ScannedObject) -> str | None:
        reason = learn(self._catalog, store, found)
        if reason is None:
            full = len(self._latest) >= _PREPARED_BUFFERS
            keep = heapq.heappushpop if full else heapq.heappush
            with self._lock:
                keep(self._latest, (found.last_used_ns, found.size_bytes))
        return reason


def learn(catalog: Catalog, store: TierStore, found: ScannedObject) -> str | None:
    """Add an object to the index; why not, when its header does not allow that."""
    try:
        header = decode_header(found.head)
        if header.object_id != found.object_id or header.size_bytes != found.size_bytes:
            raise CorruptBlock("its name or its size is not what its header says")
    except UnknownFormat as error:
        # Another erllama may read it. Here it is only something that can be evicted.
        entry = Entry(found.object_id, found.object_id.start, b"", b"", b"", b"")
        catalog.add_copy(store, entry, found.size_bytes, found.last_used_ns, "")
        return f"{found.object_id}: {error.reason}"
    except CorruptBlock as error:
        catalog.discard_corrupt(store, found.object_id, error.reason)
        return f"{found.object_id}: {error.reason}"
    reason = header.info.get("save_reason")
    # After the clock was set back, what lies in the future would be kept for as long.
    used_ns = min(found.last_used_ns, catalog.clock())
    catalog.add_copy(store, entry_of(header), found.size_bytes, used_ns, str(reason or ""))
    return None


def entry_of(header: Header) -> Entry:
    """An object as the index keeps it."""
    in_tree = header.align_tokens > 0
    return Entry(
        header.object_id,
        header.end,
        header.namespace,
        header.segment_key if in_tree else b"",
        header.lead_tokens,
        header.tokens if in_tree else b"",
        read_anchors(header.info.get("anchors")),
    )

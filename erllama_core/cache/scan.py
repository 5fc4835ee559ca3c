"""Learning at start what the tiers hold, in the background."""

from __future__ import annotations

import heapq
import threading
import time
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.index import Entry
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.block import decode_header
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import ScanFailure, ScannedObject

log = get_logger("erllama.cache")

_PREPARED_BUFFERS: Final = 64


class Scanner:
    """One pass over every tier, on a thread of its own.

    Afterwards it has the pool map pages for what is read next, most likely: a restart is
    followed by requests for what was used last, and mapping fresh pages can take as long as
    reading them (3 to 50 ms for 46 MB, as the kernel, or a hypervisor below it, has them at
    hand or not).
    """

    def __init__(self, catalog: Catalog) -> None:
        self._latest: list[tuple[int, int]] = []
        """Time of last use and size of the objects used last; a heap."""
        self._catalog: Final = catalog
        self._stopping = False
        self._done: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="erllama-scan", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether everything that was stored before the start is known."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._done.wait(timeout_s)

    def close(self) -> None:
        """Stop early and wait for the thread."""
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        try:
            for store in self._catalog.stores.values():
                self._scan(store)
        finally:
            self._done.set()
        self._catalog.pool.prepare(size for _, size in sorted(self._latest, reverse=True))

    def _scan(self, store: TierStore) -> None:
        started = time.perf_counter()
        learned = skipped = 0
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
        """Add an object to the index; why not, when its header does not allow that."""
        try:
            header = decode_header(found.head)
        except CorruptBlock as error:
            self._catalog.counters.add("corrupt")
            return f"{found.object_id}: {error.reason}"
        if header.object_id != found.object_id or header.size_bytes != found.size_bytes:
            self._catalog.counters.add("corrupt")
            return f"{found.object_id}: name or size differ from the header"
        in_tree = header.align_tokens > 0
        entry = Entry(
            header.object_id,
            header.end,
            header.namespace,
            header.segment_key if in_tree else b"",
            header.lead_tokens,
            header.tokens if in_tree else b"",
        )
        keep = heapq.heappush if len(self._latest) < _PREPARED_BUFFERS else heapq.heappushpop
        keep(self._latest, (found.last_used_ns, found.size_bytes))
        reason = header.info.get("save_reason")
        self._catalog.add_copy(
            store, entry, found.size_bytes, found.last_used_ns, str(reason or "")
        )
        return None

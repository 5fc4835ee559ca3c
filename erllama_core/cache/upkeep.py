"""Keeping step with other processes that use a tier's store at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.evictor import Evictor
from erllama_core.cache.scan import learn
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Gone, ScanFailure, Shared

log = get_logger("erllama.cache")

_PAUSE_S: Final = 5.0
"""Between two passes at least, whatever asks for one: a pass over a store in which everything
changed takes a part of a second."""
_CLOSE_S: Final = 5.0
"""How long closing waits for a pass that hangs in a tier."""


class Upkeep:
    """One shared tier's upkeep, on a thread of its own, from its first scan on.

    A pass learns what other processes stored and pinned, forgets what they removed and, in the
    process that is the store's janitor, evicts down to the quota. Whatever goes wrong in one is the
    tier's trouble, counted and logged as such; the next pass tries again.
    """

    def __init__(
        self,
        catalog: Catalog,
        evictor: Evictor,
        store: TierStore,
        shared: Shared,
        learn_pins: Callable[[TierStore], None],
    ) -> None:
        self._catalog: Final = catalog
        self._evictor: Final = evictor
        self._learn_pins: Final = learn_pins
        self._store: Final = store
        self._shared: Final = shared
        self._stopped: Final = threading.Event()
        self._thread: Final = threading.Thread(
            target=self._run, name=f"erllama-upkeep-{store.name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the thread unless its tier hangs."""
        self._stopped.set()
        self._store.upkeep_due.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("upkeep.abandoned", tier=self._store.name, waited_s=_CLOSE_S)

    def _run(self) -> None:
        try:
            self._keep_to_quota()  # which may be a smaller one than in the last run
            rescan_s = min(self._shared.rescan_interval_s, threading.TIMEOUT_MAX)
            pause_s = min(_PAUSE_S, rescan_s) if rescan_s else _PAUSE_S
            while not self._stopped.wait(pause_s):
                # Without rescans there is the quota alone to keep, when it changes.
                self._store.upkeep_due.wait(rescan_s - pause_s if rescan_s else None)
                if self._stopped.is_set():
                    return
                self._store.upkeep_due.clear()
                if rescan_s:
                    self._pass()
                else:
                    self._keep_to_quota()
        except Exception:
            log.exception("upkeep.failed", tier=self._store.name)

    def _pass(self) -> None:
        started = time.perf_counter()
        self._learn_pins(self._store)
        try:
            came, gone = self._store.attempt(self._rescan, "rescan")
        except CacheError:
            return
        if came or gone:
            seconds = round(time.perf_counter() - started, 3)
            log.debug(
                "tier.rescanned", tier=self._store.name, came=came, gone=gone, seconds=seconds
            )
        self._keep_to_quota()

    def _rescan(self) -> tuple[int, int]:
        """How many objects came and went."""
        came = gone = 0
        for found in self._shared.rescan():
            if self._stopped.is_set():
                break
            if isinstance(found, Gone):
                self._catalog.forget_gone(self._store, found.object_id)
                gone += 1
                continue
            reason = (
                f"{found.location}: {found.reason}"
                if isinstance(found, ScanFailure)
                else learn(self._catalog, self._store, found)
            )
            came += reason is None
            if reason is not None:
                log.debug("scan.skipped", tier=self._store.name, reason=reason)
        return came, gone

    def _keep_to_quota(self) -> None:
        if self._stopped.is_set() or not self._store.leads():
            return
        try:
            usage = self._store.usage()
            if usage.quota_bytes is not None and usage.used_bytes > usage.quota_bytes:
                self._evictor.make_room(self._store, usage.used_bytes - usage.quota_bytes)
        except CacheError:
            return  # counted and logged where it was raised

"""A tier as the cache uses it: opened, named, and watched for trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import attrs

from erllama_core.cache.counters import CounterSet
from erllama_core.cache.gate import ReadCosts
from erllama_core.errors import (
    BlockNotFound,
    CacheError,
    MemoryBudgetExceeded,
    TierError,
    TierFull,
)
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger, told
from erllama_core.interfaces.tier import (
    ChangesQuota,
    KeepsPages,
    MakesDurable,
    RecordsPins,
    Shared,
    Tier,
    TierUsage,
)

log = get_logger("erllama.cache")

CALM_S: Final = 60.0
"""Trouble is over when an operation succeeds and none has failed for so long. One file that
cannot be read, among many that can, is one trouble and not one for every request."""

_T = TypeVar("_T")


@attrs.frozen
class NamedTier:
    """An opened tier under the name that models and configurations call it by."""

    name: str
    kind: str
    tier: Tier


class TierStore:
    """One tier of a cache, its errors in one shape. Thread-safe."""

    def __init__(self, named: NamedTier, counters: CounterSet) -> None:
        self.name: Final = named.name
        self.kind: Final = named.kind
        self.tier: Final = named.tier
        self.keeps: Final = named.tier if isinstance(named.tier, KeepsPages) else None
        self.records: Final = named.tier if isinstance(named.tier, RecordsPins) else None
        self.quota: Final = named.tier if isinstance(named.tier, ChangesQuota) else None
        self.reads: Final = ReadCosts()
        durable = named.tier if isinstance(named.tier, MakesDurable) else None
        self.is_volatile: Final = self.keeps is not None or (
            durable is not None and not durable.outlives_power
        )
        """Whether a restart loses what it holds."""
        self.durable: Final = None if self.is_volatile else durable
        self.rests_until_s = 0.0
        """After a read that hung, on the monotonic clock: nothing is read from it until then."""
        self.shared: Final = named.tier if isinstance(named.tier, Shared) else None
        self.upkeep_due: Final = threading.Event()
        """Other processes are at work here, or there is no room: upkeep should not wait."""
        self._counters: Final = counters
        self._lock = threading.Lock()
        self._in_trouble = False
        self._failed_at_s = 0.0
        self._changing: Final = tuple(threading.Lock() for _ in range(64))

    def changing(self, object_id: ObjectId) -> threading.Lock:
        """The lock under which an object is written or deleted.

        A deletion that was decided before the object was written again must not come after.
        """
        return self._changing[object_id.key[0] % len(self._changing)]

    def attempt(self, operation: Callable[[], _T], what: str) -> _T:
        """Run a tier operation; whatever it raises becomes a CacheError.

        Trouble is logged when it starts and when it is over, not once per operation.
        """
        result = self._run(operation, what)
        if self._in_trouble and time.monotonic() - self._failed_at_s >= CALM_S:
            with self._lock:
                over, self._in_trouble = self._in_trouble, False
            if over:
                log.info("tier.recovered", tier=self.name)
        return result

    def leads(self) -> bool:
        """Whether it is this process that keeps the tier to its quota; may do I/O."""
        if self.shared is None:
            return True
        try:
            return self.attempt(self.shared.lead, "become the janitor")
        except CacheError:
            return False

    def usage(self) -> TierUsage:
        """The tier's usage. Raises CacheError; that it answers does not end trouble."""
        return self._run(self.tier.usage, "tell its usage")

    def note_hanging(self) -> None:
        """A read got no answer in time: trouble, until the tier answers again."""
        self._note_trouble("read", TierError("no answer in time"))

    def _run(self, operation: Callable[[], _T], what: str) -> _T:
        try:
            return operation()
        except (BlockNotFound, MemoryBudgetExceeded):
            raise  # an answer, or this process's want of a buffer: not trouble
        except TierFull as error:
            if isinstance(error.__cause__, OSError):  # not the quota: the device
                self._note_trouble(what, error)
            raise
        except CacheError as error:
            self._note_trouble(what, error)
            raise
        except Exception as error:
            self._note_trouble(what, error)
            raise TierError(f"tier {self.name!r} could not {what}: {error}") from error

    def _note_trouble(self, what: str, error: Exception) -> None:
        self._counters.add("tier_errors")
        with self._lock:
            first, self._in_trouble = not self._in_trouble, True
            self._failed_at_s = time.monotonic()
        if first:
            log.warning("tier.failed", tier=self.name, doing=what, error=told(error))

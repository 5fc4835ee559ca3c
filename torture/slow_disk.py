"""A tier that is slow, fails, and hangs: the disk's, behind something that delays it."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from erllama_core import Engine, PluginHost, load_config
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.block import Bytes, ObjectId
from erllama_core.interfaces.tier import Allocate, FoundObject
from erllama_core.providers import TierProvider
from erllama_tier_disk.store import FileTier
from stub_engine import KV_CLASSES, load_stub
from torture.callers import Caller, Mix, answers_of, check_at_rest, join_callers
from torture.fault import Setup
from torture.store import check_whole
from torture.tally import Tally

CALLERS: Final = 3
REQUESTS: Final = 50
READ_TIMEOUT_MS: Final = 150


class Mood:
    """How an operation fares. Thread-safe."""

    def __init__(self, chance: random.Random, tally: Tally) -> None:
        self._chance, self._tally = chance, tally
        self._lock = threading.Lock()
        self._calm = threading.Event()
        self.slow_s: Final = chance.choice([0.0, 0.002, 0.02])
        self.fails: Final = chance.choice([0.0, 0.02, 0.2])
        self.hangs: Final = chance.choice([0.0, 0.01, 0.05])

    def weigh(self) -> None:
        """Wait, raise, or do nothing of the kind."""
        with self._lock:
            lot, slow = self._chance.random(), self._chance.uniform(0.0, 2 * self.slow_s)
        if self._calm.is_set():
            return
        if lot < self.hangs:
            self._tally.note("operations that hung")
            self._calm.wait(3 * READ_TIMEOUT_MS / 1000)
        elif lot < self.hangs + self.fails:
            self._tally.note("operations that failed")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif slow:
            self._calm.wait(slow)

    def calm_down(self) -> None:
        """From now on all is well."""
        self._calm.set()


class MoodyTier(FileTier):
    """The disk's tier in a mood."""

    def __init__(self, mood: Mood, root: Path) -> None:
        super().__init__(root, rescan_interval_s=0.05)
        self._mood = mood

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        self._mood.weigh()
        super().put(object_id, parts, durable=durable)

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        self._mood.weigh()
        return super().read(object_id, allocate)

    def delete(self, object_id: ObjectId) -> int:
        self._mood.weigh()
        return super().delete(object_id)

    def find(self, object_id: ObjectId) -> FoundObject | None:
        self._mood.weigh()
        return super().find(object_id)

    def lead(self) -> bool:
        self._mood.weigh()
        return super().lead()


class MoodyPlugin:
    """Tells of the kind ``moody``."""

    def __init__(self, open_tier: Callable[[Any], FileTier]) -> None:
        self._open = open_tier

    @hookimpl
    def erllama_tiers(self) -> list[TierProvider]:
        """The kind."""
        return [TierProvider("moody", "A disk in a mood.", self._open)]


def moody_engine(root: Path, mood: Mood) -> Engine:
    """An engine with a tier named ``disk`` in that mood, and a small one in RAM before it."""
    host = PluginHost()
    host.register(MoodyPlugin(lambda _: MoodyTier(mood, root)))
    table: dict[str, Any] = {
        "cache": {"read_timeout_ms": READ_TIMEOUT_MS, "write_timeout_ms": READ_TIMEOUT_MS},
        "tiers": [
            {"name": "ram", "kind": "ram", "quota_bytes": 20_000},
            {"name": "disk", "kind": "moody"},
        ],
    }
    return Engine(load_config(table, environ={}), plugins=host)


class SlowDisk:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve on the moody disk; what it stored must be whole."""
        kv_class = chance.choice(KV_CLASSES)
        answers = answers_of(kv_class)
        tally = Tally()
        mood = Mood(random.Random(chance.random()), tally)
        with moody_engine(folder / "root", mood) as engine:
            model = load_stub(
                engine, tier=chance.choice([["disk"], ["ram", "disk"]]), kv_class=kv_class
            )
            callers = [
                Caller(
                    model,
                    answers,
                    tally,
                    seed=f"{chance.random()} {number}",
                    count=self._setup.times(REQUESTS),
                    streams=4,
                    mix=Mix(cancels=0.05),
                )
                for number in range(CALLERS)
            ]
            for caller in callers:
                caller.start()
            whole = join_callers(callers, tally)
            mood.calm_down()
            if whole:
                tally.check("the engine came to no rest", holds=self._comes_to_rest(engine))
                check_at_rest(model, tally)
            counters = engine.cache.counters()
            tally.note("reads given up", counters.reads_given_up)
            tally.note("objects not saved", counters.saves_dropped)
        check_whole(folder / "root", tally)
        return tally

    def _comes_to_rest(self, engine: Engine) -> bool:
        # What hung until now is waited for no longer than write_timeout_ms, as it should be: ask
        # again, now that it goes on.
        until = time.monotonic() + 60
        while not engine.flush(60):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Nothing is kept."""


def open_fault(setup: Setup) -> SlowDisk:
    """See ``Known.module``."""
    return SlowDisk(setup)

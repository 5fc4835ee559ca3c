"""Memory pressure that swings between none and all, and evictions from all sides, under load."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from erllama_core import Engine, Model
from erllama_core.errors import CacheError, EngineClosed
from erllama_core.interfaces.pressure import PressureReading
from pressure_gauge import Gauge, gauged_engine
from stub_engine import KV_CLASSES, load_stub
from torture.callers import PROMPTS, Caller, Mix, answers_of, check_at_rest, join_callers
from torture.fault import Setup
from torture.store import check_whole
from torture.tally import Tally

CALLERS: Final = 4
REQUESTS: Final = 200
INTERVAL_MS: Final = 5
_TOTAL: Final = 1_000_000


class Swing(Gauge):
    """A memory that is anything between empty and full at each reading."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(total=_TOTAL)
        self._chance = chance

    def sample(self) -> tuple[PressureReading, ...]:
        """Rather at the ends than between them."""
        self.used = self._chance.choice([0, self._chance.randrange(_TOTAL), _TOTAL])
        return super().sample()


class Evictor(threading.Thread):
    """Takes from the cache what it can, in every way that its users have."""

    def __init__(self, engine: Engine, tally: Tally, chance: random.Random) -> None:
        super().__init__(daemon=True, name="evictor")
        self._engine, self._tally, self._chance = engine, tally, chance
        self._over = threading.Event()
        self._ways: Final[tuple[Callable[[], object], ...]] = (
            self._evict,
            self._evict,
            self._evict,
            engine.cache.gc,
            engine.pressure.force_check,
            engine.pressure.force_check,
            self._change_quota,
            self._pin,
            self._unpin,
            engine.cache.dump,
        )

    def run(self) -> None:
        try:
            while not self._over.wait(self._chance.choice([0.0, 0.001, 0.01])):
                way = self._chance.choice(self._ways)
                way()
                self._tally.note(f"{way.__name__.strip('_')} under load")
        except BaseException as error:  # noqa: BLE001 - told by the tally
            self._tally.accuse(f"evicting raised {error!r}")

    def _evict(self) -> None:
        tiers = self._chance.choice([None, ["ram"], ["disk"]])
        self._engine.cache.evict_bytes(self._chance.randrange(1, 200_000), tiers)

    def _change_quota(self) -> None:
        tier = self._chance.choice(["ram", "disk"])
        self._engine.cache.set_quota(tier, self._chance.randrange(10_000, 500_000))

    def _pin(self) -> None:
        rows = self._engine.cache.dump()
        if rows:
            try:
                self._engine.cache.pin(self._chance.choice(rows).key)
            except CacheError:
                self._tally.note("pins of what was just evicted")

    def _unpin(self) -> None:
        for key in self._engine.cache.pins():
            self._engine.cache.unpin(key)

    def stop(self) -> None:
        """Return when it has ended, with nothing pinned."""
        self._over.set()
        self.join()
        self._unpin()


class PressureStorm:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve under it; what is left in the tiers is whole, and of use."""
        kv_class = chance.choice(KV_CLASSES)
        answers_of(kv_class)  # learnt before anything fails
        tally = Tally()
        root = folder / "root"
        tiers = [
            {"name": "ram", "kind": "ram", "quota_bytes": 300_000},
            {"name": "disk", "kind": "disk", "root": str(root), "quota_bytes": 500_000},
        ]
        pressure: dict[str, Any] = {
            "enabled": True,
            "interval_ms": INTERVAL_MS,
            "evict_tiers": chance.choice([["ram"], ["ram", "disk"]]),
            "unload_idle_models": chance.random() < 0.15,
        }
        with gauged_engine(
            Swing(random.Random(chance.random())), tiers=tiers, pressure=pressure
        ) as engine:
            model = load_stub(
                engine,
                tier=["ram", "disk"],
                kv_class=kv_class,
                max_block_tokens=chance.choice([None, 16]),
                decode_us=chance.choice([0.0, 500.0]),  # time for the storm to be one
                context_opts={
                    "n_ctx": chance.choice([300, 600, 2000]),
                    "n_seq_max": 8,
                    "kv_unified": chance.random() < 0.7,
                    "resident_cells_max": chance.choice([0, 400]),
                },
            )
            mix = Mix(cancels=0.05, explained=(EngineClosed,))
            callers = [
                Caller(
                    model,
                    answers_of(kv_class),
                    tally,
                    seed=f"{chance.random()} {number}",
                    count=self._setup.times(REQUESTS),
                    mix=mix,
                )
                for number in range(CALLERS)
            ]
            evictor = Evictor(engine, tally, random.Random(chance.random()))
            for thread in (*callers, evictor):
                thread.start()
            whole = join_callers(callers, tally)
            evictor.stop()
            engine.pressure.set_thresholds(unload_idle_models=False)
            engine.pressure.disable()
            engine.pressure.force_check()  # it comes after a check that is under way
            status = engine.pressure.status()
            tally.note("releases", status.releases)
            tally.note("evictions", engine.cache.counters().evictions)
            if whole and not engine.models():
                tally.note("models unloaded")
            elif whole:
                tally.check("the engine came to no rest", holds=engine.flush(60))
                check_at_rest(model, tally)
                tally.note("preemptions", model.info().preemptions)
                self._save_again(engine, model, tally)
        check_whole(root, tally)
        return tally

    def _save_again(self, engine: Engine, model: Model, tally: Tally) -> None:
        """In peace, what is computed is stored and found again."""
        for tier in ("ram", "disk"):
            engine.cache.set_quota(tier, 500_000)
        for _ in range(2):
            done = model.complete(max(PROMPTS, key=len), response_tokens=4, cache_salt="after")
            tally.check("the engine came to no rest", holds=engine.flush(60))
        if done.cache_hit_kind == "exact":
            tally.survive()
        else:
            tally.accuse(f"after the storm, a prompt was {done.cache_hit_kind}, not stored")

    def close(self) -> None:
        """Nothing is kept."""


def open_fault(setup: Setup) -> PressureStorm:
    """See ``Known.module``."""
    return PressureStorm(setup)

"""Requests that are cancelled in every phase, from other threads than their callers'."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Final

from erllama_core import Engine
from stub_engine import KV_CLASSES, load_stub, make_engine
from torture.callers import (
    SESSIONS,
    Caller,
    Mix,
    answers_of,
    check_at_rest,
    join_callers,
)
from torture.fault import Setup
from torture.tally import Tally

CALLERS: Final = 4
REQUESTS: Final = 150
CANCELLERS: Final = 2
MIX: Final = Mix(timeouts=0.15, cancels=0.2, late_cancels=0.1, session_ends=0.1)


class Canceller(threading.Thread):
    """Cancels somebody's request, in one of the ways there are, again and again."""

    def __init__(
        self, engine: Engine, callers: list[Caller], tally: Tally, chance: random.Random
    ) -> None:
        super().__init__(daemon=True, name="canceller")
        self._engine, self._callers, self._tally, self._chance = engine, callers, tally, chance
        self._over = threading.Event()

    def run(self) -> None:
        chance = self._chance
        try:
            # Sometimes at once, sometimes when a request is some steps further.
            while not self._over.wait(chance.choice([0.0, 0.0005, 0.003])):
                running = chance.choice(self._callers).running
                if not running:
                    continue
                self._tally.note(f"cancelled while the model was {self._engine.phase('stub')}")
                lot = chance.random()
                stream = chance.choice(running)
                if lot < 0.45:
                    stream.cancel()
                elif lot < 0.9:
                    self._engine.cancel(stream.request_id)
                elif lot < 0.95:
                    self._engine.reset_session("stub", chance.choice(SESSIONS))
                else:
                    self._engine.end_session("stub", chance.choice(SESSIONS))
        except BaseException as error:  # noqa: BLE001 - told by the tally
            self._tally.accuse(f"cancelling raised {error!r}")

    def stop(self) -> None:
        """Return when it has ended."""
        self._over.set()
        self.join()


class CancelStorm:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve in a storm, then ask in peace."""
        kv_class = chance.choice(KV_CLASSES)
        answers_of(kv_class)  # learnt before anything fails
        tally = Tally()
        tiers = [
            {"name": "ram", "kind": "ram", "quota_bytes": 60_000},
            {"name": "disk", "kind": "disk", "root": str(folder), "quota_bytes": 300_000},
        ]
        streams = chance.choice([2, 4, 16])
        with make_engine(tiers=tiers) as engine:
            model = load_stub(
                engine,
                tier=chance.choice([["ram"], ["disk"], ["ram", "disk"]]),
                kv_class=kv_class,
                max_block_tokens=chance.choice([None, 16]),
                # Slow enough to be met in the middle of a prompt and of a reply.
                prefill_us_per_token=chance.choice([0.0, 10.0]),
                decode_us=chance.choice([0.0, 300.0]),
                context_opts={
                    "n_ctx": chance.choice([300, 600, 2000]),
                    "n_seq_max": streams,
                    "kv_unified": chance.random() < 0.7,
                    "resident_cells_max": chance.choice([0, 300]),
                },
                policy={"prefill_chunk_size": 64},
            )
            callers = self._callers(model, kv_class, tally, chance, REQUESTS, MIX)
            storm = [
                Canceller(engine, callers, tally, random.Random(chance.random()))
                for _ in range(CANCELLERS)
            ]
            for thread in (*callers, *storm):
                thread.start()
            whole = join_callers(callers, tally)
            for thread in storm:
                thread.stop()
            if whole:
                tally.check("the engine came to no rest", holds=engine.flush(60))
                for session in SESSIONS:
                    model.end_session(session)
                tally.check("the engine came to no rest", holds=engine.flush(60))
                check_at_rest(model, tally)
                tally.note("preemptions", model.info().preemptions)
                peace = Mix(timeouts=0.0, cancels=0.0, late_cancels=0.0, session_ends=0.0)
                again = self._callers(model, kv_class, tally, chance, 20, peace)
                for thread in again:
                    thread.start()
                join_callers(again, tally)
        return tally

    def _callers(
        self,
        model: object,
        kv_class: str,
        tally: Tally,
        chance: random.Random,
        count: int,
        mix: Mix,
    ) -> list[Caller]:
        return [
            Caller(
                model,  # type: ignore[arg-type]
                answers_of(kv_class),
                tally,
                seed=f"{chance.random()} {number}",
                count=self._setup.times(count),
                mix=mix,
            )
            for number in range(CALLERS)
        ]

    def close(self) -> None:
        """Nothing is kept."""


def open_fault(setup: Setup) -> CancelStorm:
    """See ``Known.module``."""
    return CancelStorm(setup)

"""Everything a little, for long: one engine serves round after round, and must not grow."""

from __future__ import annotations

import gc
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import psutil

from erllama_core.errors import DecodeFailed, DecodeTimeout
from stub_engine import load_stub, make_engine
from torture.callers import Answers, Caller, Mix, check_at_rest, join_callers
from torture.fault import Setup
from torture.random_faults import RandomFaults, failing
from torture.tally import Tally

STREAMS: Final = 64
CALLERS: Final = 8
REQUESTS: Final = 100
"""Of each caller, in a round."""
SETTLED: Final = 4
"""Rounds after which everything has been opened once, and buffers are as large as they get."""
MOST_GROWTH_BYTES: Final = 32 << 20
_FAILS_ONE_IN: Final = 400


def descriptors() -> int:
    """Open files of this process; 0 where that cannot be told."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


class Soak:
    """The fault. The engine lives as long as the fault does."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._answers = Answers()
        self._process = psutil.Process()
        self._rounds = 0
        self._requests = 0
        self._settled: dict[str, float] = {}
        self._root = tempfile.TemporaryDirectory(prefix="erllama-soak-")
        self._engine = make_engine(
            tiers=[
                {"name": "ram", "kind": "ram", "quota_bytes": 400_000},
                {"name": "disk", "kind": "disk", "root": self._root.name, "quota_bytes": 1_000_000},
            ]
        )
        self._model = load_stub(
            self._engine,
            tier=["ram", "disk"],
            context_opts={
                "n_ctx": 4000,
                "n_seq_max": STREAMS,
                "n_batch": 512,
                "resident_cells_max": 400,
            },
            policy={"min_tokens": 48, "cold_min_tokens": 48, "prefill_chunk_size": 64},
        )

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve some hundred requests, come to rest, and measure what there is."""
        del folder
        tally = Tally()
        faults = RandomFaults(random.Random(chance.random()), _FAILS_ONE_IN, lambda _: False)
        mix = Mix(explained=(DecodeFailed, DecodeTimeout))
        callers = [
            Caller(
                self._model,
                self._answers,
                tally,
                seed=f"{chance.random()} {number}",
                count=self._setup.times(REQUESTS),
                streams=STREAMS // CALLERS,
                mix=mix,
            )
            for number in range(CALLERS)
        ]
        started = time.monotonic()
        with failing(faults):
            for caller in callers:
                caller.start()
            whole = join_callers(callers, tally)
        seconds = time.monotonic() - started
        tally.note("calls that failed", faults.failed)
        if whole:
            tally.check("the engine came to no rest", holds=self._engine.flush(60))
            check_at_rest(self._model, tally)
            self._measure([wait for caller in callers for wait in caller.waits_s], seconds, tally)
        return tally

    def _measure(self, waits_s: list[float], seconds: float, tally: Tally) -> None:
        gc.collect()
        self._rounds += 1
        self._requests += len(waits_s)
        waits_s.sort()
        tally.point = point = {
            "requests": float(self._requests),
            "resident MiB": self._process.memory_info().rss / 2**20,
            "open files": float(descriptors()),
            "threads": float(threading.active_count()),
            "requests per s": len(waits_s) / seconds,
            "median wait ms": 1000 * waits_s[len(waits_s) // 2],
            "99th percentile ms": 1000 * waits_s[len(waits_s) * 99 // 100],
        }
        if self._rounds == SETTLED:
            self._settled = dict(point)
        if self._rounds > SETTLED:
            before = self._settled
            self._compare("threads", before["threads"], point["threads"], 0, tally)
            self._compare("open files", before["open files"], point["open files"], 2, tally)
            most = MOST_GROWTH_BYTES / 2**20
            self._compare("MiB", before["resident MiB"], point["resident MiB"], most, tally)

    def _compare(self, what: str, before: float, now: float, most: float, tally: Tally) -> None:
        tally.check(
            f"{now:.0f} {what} after {self._requests} requests, {before:.0f} in the beginning",
            holds=now - before <= most,
        )

    def close(self) -> None:
        """The engine ends."""
        self._engine.close()
        self._root.cleanup()


def open_fault(setup: Setup) -> Soak:
    """See ``Known.module``."""
    return Soak(setup)

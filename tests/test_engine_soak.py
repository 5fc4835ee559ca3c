"""Many streams for a long time: everybody is answered once, and nothing is left of it."""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from erllama_core.errors import DecodeFailed, DecodeTimeout
from stub_engine import load_stub, make_engine
from torture.callers import Answers, Caller, Mix, check_at_rest, run_callers
from torture.random_faults import RandomFaults, failing
from torture.soak import descriptors
from torture.tally import Tally

STREAMS = 64
CALLERS = 8
MIX = Mix(explained=(DecodeFailed, DecodeTimeout))


def run_soak(root: Path, requests: int, hangs: int, most_bytes: int) -> dict[str, Any]:
    """Serve so many requests; what came of them. Fails when anything is left behind."""
    before_threads = set(threading.enumerate())
    process = psutil.Process()
    answers = Answers()
    hang_steps = frozenset(requests // (20 * (hangs + 1)) * (n + 1) for n in range(hangs))
    faults = RandomFaults(random.Random(400), 400, hang_steps.__contains__)
    tally = Tally()
    started = time.monotonic()
    tiers = [
        {"name": "ram", "kind": "ram", "quota_bytes": 400_000},
        {"name": "disk", "kind": "disk", "root": str(root), "quota_bytes": 1_000_000},
    ]
    gates: list[Any] = []
    sizes: list[int] = []
    with capture_logs() as logs, failing(faults):
        engine = make_engine(tiers=tiers)
        try:
            model = load_stub(
                engine,
                tier=["ram", "disk"],
                context_opts={
                    "n_ctx": 2600,
                    "n_seq_max": STREAMS,
                    "n_batch": 512,
                    "resident_cells_max": 400,
                    "decode_budget_ms": 1500,
                },
                policy={"min_tokens": 48, "cold_min_tokens": 48, "prefill_chunk_size": 64},
            )
            gates.append(model._backend.gate)  # type: ignore[attr-defined]
            rounds = 10
            settled = (0, 0)
            for number in range(rounds):
                callers = [
                    Caller(
                        model,
                        answers,
                        tally,
                        seed=f"{number} {n}",
                        count=requests // rounds // CALLERS,
                        streams=STREAMS // CALLERS,
                        mix=MIX,
                    )
                    for n in range(CALLERS)
                ]
                run_callers(callers, tally)
                assert not tally.wrong, tally.wrong[:5]
                logs.clear()
                assert engine.flush(60)
                for caller in callers:
                    for stream in caller.answered:
                        assert stream._events._items.empty(), "answered twice"
                gc.collect()
                sizes.append(process.memory_info().rss)
                if number == 2:  # everything has been opened once by then
                    settled = (threading.active_count(), descriptors())
            expected = requests // rounds // CALLERS * CALLERS * rounds
            assert tally.tried == sum(tally.notes.values()) == expected
            info = model.info()
            check_at_rest(model, tally)
            assert not tally.wrong, tally.wrong[:5]
            quarantined = model._worker.quarantined
            for gate in gates:
                gate.open()
            hung = [t for t in threading.enumerate() if "erllama-worker" in t.name]
            for thread in hung[:-1]:
                thread.join(20)
            left = (threading.active_count(), descriptors())
            assert left[0] <= settled[0], (left, settled)
            assert left[1] <= settled[1] + 2, (left, settled)
            with engine.cache.catalog.lock:
                copies = [copy for entry in engine.cache.catalog.index for copy in entry.copies]
                assert [copy for copy in copies if copy.users] == []
            preemptions = info.preemptions
        finally:
            for gate in gates:
                gate.open()
            engine.close()
    assert set(threading.enumerate()) <= before_threads
    growth = sizes[-1] - sizes[2]
    assert growth < most_bytes, f"{growth} bytes more after {requests} requests: {sizes}"
    return {
        "seconds": round(time.monotonic() - started, 1),
        "ends": dict(tally.notes),
        "hung": len(faults.hung),
        "quarantined": quarantined,
        "preemptions": preemptions,
        "rss_bytes": sizes,
        "growth_bytes": growth,
    }


def test_a_while(tmp_path: Path) -> None:
    """Some hundred requests, with cancels, timeouts, sessions, faults and a step that hangs."""
    figures = run_soak(tmp_path, 800, hangs=1, most_bytes=48 << 20)
    assert figures["hung"] == 1
    assert figures["quarantined"] >= 1
    assert {"length", "cancelled", "TimeoutExceeded"} <= figures["ends"].keys()


@pytest.mark.soak
def test_a_long_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred thousand requests leave what ten thousand leave."""
    figures = run_soak(tmp_path, 100_000, hangs=4, most_bytes=8 << 20)
    with capsys.disabled():
        for name, value in figures.items():
            print(f"  {name}: {value}")  # noqa: T201 - the figures are what a soak is run for
    assert figures["quarantined"] >= 4

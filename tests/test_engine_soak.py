"""Many streams for a long time: everybody is answered once, and nothing is left of it."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
from structlog.testing import capture_logs

from erllama_backend_stub.faults import Fault, FaultPlan
from erllama_core import Done, Model, Stream
from erllama_core.errors import (
    DecodeFailed,
    DecodeTimeout,
    EngineReset,
    StickyBusy,
    TimeoutExceeded,
)
from erllama_core.interfaces.backend import SamplingParams
from erllama_core.prompt import pack
from stub_alone import sampled
from stub_engine import load_stub, make_engine

STREAMS = 64
CALLERS = 8
ERRORS = (DecodeFailed, DecodeTimeout, EngineReset, TimeoutExceeded)
TALE = "It was told of a miller that he had three sons, a mill, a donkey and a cat, and no more. "
PROMPTS = tuple(TALE[: 3 + 7 * (n % 12)] + "abcdef"[n % 6] * (n % 4) for n in range(60))
SESSIONS = tuple(range(24))


class RandomFaults:
    """Makes calls of a stub fail now and then, and a step hang until the end."""

    def __init__(self, patch: pytest.MonkeyPatch, every: int, hangs_at: frozenset[int]) -> None:
        self._chance = random.Random(every)
        self._every = every
        self._hangs_at = hangs_at
        self._steps = 0
        self.hung: set[int] = set()
        # A function, so that it is given the plan.
        patch.setattr(FaultPlan, "next_step", lambda plan: self._step(plan))  # noqa: PLW0108
        patch.setattr(FaultPlan, "next_export", lambda _: Fault(0, fails=self._one_in(every)))
        patch.setattr(FaultPlan, "next_import", lambda _: Fault(0, fails=self._one_in(every)))

    def _one_in(self, every: int) -> bool:
        return self._chance.randrange(every) == 0

    def _step(self, plan: FaultPlan) -> Fault:
        self._steps += 1
        hangs = self._steps in self._hangs_at
        if hangs:
            self.hung.add(self._steps)
            plan.hang_deaf = True  # type: ignore[misc]
        return Fault(self._steps, fails=self._one_in(self._every), hangs=hangs)


def right_answer(prompt: str, params: SamplingParams) -> tuple[int, ...]:
    """What a context of its own says; remembered."""
    return sampled("span", pack(prompt.encode()), 12, params)


def learn_right_answers() -> None:
    """Have all of them remembered: once faults are set, a context of its own would meet them."""
    for prompt in PROMPTS:
        right_answer(prompt, SamplingParams())
        for seed in range(3):
            right_answer(prompt, SamplingParams(temperature=0.9, seed=seed))


@attrs.define
class Tally:
    """What callers saw. Locked by its owner."""

    ends: Counter[str] = attrs.field(factory=Counter)
    wrong: list[str] = attrs.field(factory=list)
    lock: threading.Lock = attrs.field(factory=threading.Lock)
    answered: list[Stream] = attrs.field(factory=list)
    """The last ones of each caller, to see that nothing came after their end."""

    def note(self, end: str) -> None:
        with self.lock:
            self.ends[end] += 1


class Caller(threading.Thread):
    """Keeps some streams going until it has had its number of answers."""

    def __init__(self, model: Model, tally: Tally, seed: int, count: int) -> None:
        super().__init__(daemon=True, name=f"caller-{seed}")
        self._model, self._tally, self._count = model, tally, count
        self._chance = random.Random(seed)
        self._open: deque[tuple[Stream, dict[str, Any], str]] = deque()
        self._last: deque[Stream] = deque(maxlen=20)

    def run(self) -> None:
        try:
            for _ in range(self._count):
                while len(self._open) >= STREAMS // CALLERS:
                    self._finish(*self._open.popleft())
                self._begin()
            while self._open:
                self._finish(*self._open.popleft())
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            with self._tally.lock:
                self._tally.wrong.append(f"{self.name}: {error!r}")
        with self._tally.lock:
            self._tally.answered.extend(self._last)

    def _begin(self) -> None:
        chance, model = self._chance, self._model
        prompt = chance.choice(PROMPTS)
        options: dict[str, Any] = {"response_tokens": chance.choice([1, 1, 2, 4, 12])}
        lot = chance.random()
        if lot < 0.1:
            options["timeout_s"] = chance.choice([0.0, 0.005, 0.05])
        elif lot < 0.2:
            options["cache_salt"] = chance.choice(["one", "two"])
        elif lot < 0.3:
            options |= {"temperature": 0.9, "seed": chance.randrange(3)}
        try:
            if chance.random() < 0.2:
                session = chance.choice(SESSIONS)
                stream = model.infer(prompt, session_id=session, **options)
            elif chance.random() < 0.1:
                stream = model.start_prefill(prompt)
                options = {}
            else:
                stream = model.infer(prompt, **options)
        except StickyBusy:
            self._tally.note("StickyBusy")
            return
        if chance.random() < 0.15:
            stream.cancel()
        if chance.random() < 0.01:
            session = chance.choice(SESSIONS)
            (model.end_session if chance.random() < 0.5 else model.reset_session)(session)
        self._open.append((stream, options, prompt))

    def _finish(self, stream: Stream, options: dict[str, Any], prompt: str) -> None:
        if self._chance.random() < 0.02:
            stream.cancel()
        events = 0
        try:
            while not isinstance(stream.next_event(120), Done):
                events += 1
        except ERRORS as error:
            self._tally.note(type(error).__name__)
        else:
            done = stream.result()
            self._check(done, options, prompt)
            self._tally.note(done.finish_reason)
        assert stream._events._items.empty(), "something came after the end"
        self._last.append(stream)

    def _check(self, done: Any, options: dict[str, Any], prompt: str) -> None:
        assert done.committed_tokens == len(done.context_tokens)
        if not done.generated:
            return
        params = SamplingParams(
            temperature=options.get("temperature", 0.0), seed=options.get("seed", 0)
        )
        if done.generated != right_answer(prompt, params)[: len(done.generated)]:
            with self._tally.lock:
                self._tally.wrong.append(f"{prompt!r} {options}: {done.generated}")


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def run_soak(root: Path, requests: int, hangs: int, most_bytes: int) -> dict[str, Any]:
    """Serve so many requests; what came of them. Fails when anything is left behind."""
    before_threads = set(threading.enumerate())
    process = psutil.Process()
    learn_right_answers()
    patch = pytest.MonkeyPatch()
    hang_steps = frozenset(requests // (20 * (hangs + 1)) * (n + 1) for n in range(hangs))
    faults = RandomFaults(patch, 400, hang_steps)
    tally = Tally()
    started = time.monotonic()
    tiers = [
        {"name": "ram", "kind": "ram", "quota_bytes": 400_000},
        {"name": "disk", "kind": "disk", "root": str(root), "quota_bytes": 1_000_000},
    ]
    gates: list[Any] = []
    sizes: list[int] = []
    with capture_logs() as logs:
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
                    Caller(model, tally, 100 * number + n, requests // rounds // CALLERS)
                    for n in range(CALLERS)
                ]
                for caller in callers:
                    caller.start()
                for caller in callers:
                    caller.join(1800)
                    assert not caller.is_alive(), "a caller never got its answer"
                assert not tally.wrong, tally.wrong[:5]
                logs.clear()
                assert engine.flush(60)
                for stream in tally.answered:
                    assert stream._events._items.empty(), "answered twice"
                tally.answered.clear()
                gc.collect()
                sizes.append(process.memory_info().rss)
                if number == 2:  # everything has been opened once by then
                    settled = (threading.active_count(), descriptors())
            expected = requests // rounds // CALLERS * CALLERS * rounds
            assert sum(tally.ends.values()) == expected
            info = model.info()
            assert (info.available_seqs, model.pending_len(), model.queue_depth()) == (
                STREAMS,
                0,
                0,
            )
            assert not model._worker._unfinished
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
            patch.undo()
    assert set(threading.enumerate()) <= before_threads
    growth = sizes[-1] - sizes[2]
    assert growth < most_bytes, f"{growth} bytes more after {requests} requests: {sizes}"
    return {
        "seconds": round(time.monotonic() - started, 1),
        "ends": dict(tally.ends),
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

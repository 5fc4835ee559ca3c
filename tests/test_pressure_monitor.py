"""The monitor by itself: when it has memory given back, how much, and what sources may do to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from erllama_core.errors import ConfigError, ConfigProblem, EngineClosed, PluginMissing
from erllama_core.interfaces.pressure import (
    PressureReading,
    PressureSource,
    Reading,
    StallReading,
)
from erllama_core.interfaces.telemetry import PressureSampled
from erllama_core.pressure.monitor import CONFIRM_AFTER_S, Monitor
from erllama_core.pressure.noop import NoopPressure
from erllama_core.pressure.sampler import Question, Sampler
from erllama_core.pressure.status import Release
from erllama_core.pressure.thresholds import Thresholds, tightest

LIMITS = Thresholds(
    interval_ms=60_000,
    high_watermark=0.8,
    low_watermark=0.5,
    min_evict_bytes=10,
    evict_tiers=("ram",),
    unload_idle_models=False,
)


def host(used: int, total: int = 1000) -> PressureReading:
    return PressureReading("host", used, total)


class Script:
    """A source that answers what it was given, one answer after another; the last one goes on."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.closed = threading.Event()

    def sample(self) -> tuple[Reading, ...]:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer = answer()
        return answer if isinstance(answer, tuple) else (answer,)

    def close(self) -> None:
        self.closed.set()


class Stock:
    """Memory that can be given back: what was asked for is kept."""

    def __init__(self, held: int = 10_000) -> None:
        self.held = held
        self.asked: list[tuple[int, bool]] = []

    def problems(self, thresholds: Thresholds) -> list[ConfigProblem]:
        unknown = [name for name in thresholds.evict_tiers if name not in {"ram", "disk"}]
        return [ConfigProblem("pressure.evict_tiers", name) for name in unknown]

    def held_bytes(self, thresholds: Thresholds) -> int:
        return self.held

    def release(self, n_bytes: int, thresholds: Thresholds, *, of_tiers: bool) -> Release:
        self.asked.append((n_bytes, of_tiers))
        freed = min(n_bytes, self.held)
        self.held -= freed
        return Release(wanted_bytes=n_bytes, freed_bytes=freed, rows=1 if freed else 0)


class Clock:
    """The samplers' clock: it says these times, one after another, and then stands still.

    So what hangs is found to hang without waiting, and what does not has all the time it needs.
    """

    def __init__(self, *times_s: float) -> None:
        self._times_s = list(times_s)

    def monotonic(self) -> float:
        return self._times_s.pop(0) if self._times_s else 0.0


class Watch:
    """A monitor over scripted sources, whose pauses are counted and take no time."""

    def __init__(self, *sources: Any, limits: Thresholds = LIMITS, **options: Any) -> None:
        self.stock = Stock()
        self.pauses: list[float] = []
        self.told: list[PressureSampled] = []
        self.sources = dict(enumerate(sources))
        self.monitor = Monitor(
            limits,
            lambda: {f"s{number}": _opener(source) for number, source in self.sources.items()},
            self.stock,
            tell=self.told.append,
            pause=self.pauses.append,
            **options,
        )

    def check(self) -> int:
        """One check; the bytes that it asked for."""
        before = len(self.stock.asked)
        self.monitor.force_check()
        return sum(n_bytes for n_bytes, _ in self.stock.asked[before:])


def _opener(source: Any) -> Callable[[], PressureSource]:
    return source if callable(source) else lambda: source


@pytest.fixture
def watch() -> Iterator[Callable[..., Watch]]:
    made: list[Watch] = []

    def make(*sources: Any, **options: Any) -> Watch:
        made.append(Watch(*sources, **options))
        return made[-1]

    yield make
    for one in made:
        one.monitor.close()


# ------------------------------------------------------------------- watermarks


def test_below_the_high_watermark_nothing_happens(watch: Callable[..., Watch]) -> None:
    """Below the high watermark a check is one reading, and nothing is given back."""
    one = watch(Script(host(799)))
    assert one.check() == 0
    assert one.pauses == []
    assert one.told == [PressureSampled(readings=(host(799),), usage=0.799, released_bytes=0)]


def test_from_the_high_watermark_down_to_the_low_one(watch: Callable[..., Watch]) -> None:
    """At the high watermark, confirmed, what is above the low one is given back."""
    one = watch(Script(host(800)))
    assert one.check() == 300
    assert one.pauses == [CONFIRM_AFTER_S]
    assert one.told == [PressureSampled(readings=(host(800),), usage=0.8, released_bytes=300)]


def test_a_peak_is_not_confirmed(watch: Callable[..., Watch]) -> None:
    """A high reading that is not there a moment later gives nothing back."""
    source = Script(host(990), host(700), host(990), host(991))
    one = watch(source)
    assert one.check() == 0
    assert source.asked == 2
    assert one.check() == 491, "what the second reading asks for"


def test_another_memory_does_not_confirm(watch: Callable[..., Watch]) -> None:
    """The reading that confirms is one of the same memory."""
    gpu = PressureReading("gpu:0", 99, 100)
    one = watch(Script((host(900), attrs.evolve(gpu, used_bytes=1)), (host(100), gpu)))
    assert one.check() == 0


def test_the_tightest_source_counts(watch: Callable[..., Watch]) -> None:
    """Of several memories the one that asks for most decides."""
    one = watch(Script(host(850)), Script((PressureReading("cgroup", 90, 100), host(900))))
    assert one.check() == 400
    status = one.monitor.status()
    assert status.tightest is not None
    assert (status.tightest.resource, status.tightest.usage) == ("cgroup", 0.9)


def test_the_least_that_is_given_back(watch: Callable[..., Watch]) -> None:
    """Less than ``min_evict_bytes`` is not worth it: then so much is given back."""
    one = watch(Script(host(850)), limits=attrs.evolve(LIMITS, min_evict_bytes=5000))
    assert one.check() == 5000


def test_stalls_ask_for_a_part_of_what_there_is(watch: Callable[..., Watch]) -> None:
    """A stall, which has no bytes in it, asks for a part of what can be given back."""
    one = watch(Script(StallReading("psi:host", 0.08, 0.08)))
    assert one.check() == 5000, "half of it, as usage is twice the low watermark"


@given(
    used=st.integers(0, 1 << 50),
    total=st.integers(1, 1 << 50),
    marks=st.lists(
        st.floats(0.0, 1.0, exclude_min=True, allow_subnormal=False),
        min_size=2,
        max_size=2,
        unique=True,
    ),
    least=st.integers(0, 1 << 40),
)
def test_the_arithmetic_of_watermarks(
    used: int, total: int, marks: list[float], least: int
) -> None:
    """What is asked for is at least the least, and brings usage to the low watermark, no lower."""
    low, high = sorted(marks)
    limits = attrs.evolve(LIMITS, high_watermark=high, low_watermark=low, min_evict_bytes=least)
    assert limits.problems() == []
    reading = host(used, total)
    assert limits.is_high(reading) is (used / total >= high)
    wanted = limits.excess_bytes(reading, 0)
    assert wanted >= least
    if wanted > least:
        after = used - wanted
        rounding = used * 1e-12 + 1
        assert after <= low * total + rounding
        assert after >= low * total - rounding


@given(
    stalled=st.floats(0.001, 1.0),
    limit=st.floats(0.001, 1.0),
    held=st.integers(0, 1 << 50),
)
def test_the_arithmetic_of_stalls(stalled: float, limit: float, held: int) -> None:
    """A stall never asks for more than there is, and for more the worse it is."""
    reading = StallReading("psi:host", stalled, limit)
    assert 0.0 <= reading.usage <= 1.0
    if LIMITS.is_high(reading):
        wanted = LIMITS.excess_bytes(reading, held)
        assert wanted <= max(held, LIMITS.min_evict_bytes)
        worse = StallReading("psi:host", 1.0, limit)
        assert LIMITS.excess_bytes(worse, held) >= wanted


def test_tightest() -> None:
    """The reading of the highest usage; an unknown total is no usage at all."""
    assert tightest([]) is None
    readings: list[Reading] = [host(5), PressureReading("x", 7, 0), StallReading("psi", 0.5, 1.0)]
    assert tightest(readings) is readings[2]


# ------------------------------------------------------------------- devices


def test_tiers_are_tried_once_for_a_device(watch: Callable[..., Watch]) -> None:
    """A device's memory that does not follow the tiers costs them nothing from then on."""
    gpu = PressureReading("gpu:0", 900, 1000, is_device=True)
    source = Script(gpu)
    one = watch(source)
    one.check()
    one.check()
    one.check()
    assert [of_tiers for _, of_tiers in one.stock.asked] == [True, False, False]
    source.answers = [attrs.evolve(gpu, used_bytes=880)]
    one.check()
    assert one.stock.asked[-1][1], "it has come down: perhaps it does follow"
    source.answers = [attrs.evolve(gpu, used_bytes=100)]
    one.check()
    source.answers = [attrs.evolve(gpu, used_bytes=950)]
    one.check()
    assert one.stock.asked[-1][1], "it was low in between"


def test_the_host_counts_beside_a_device(watch: Callable[..., Watch]) -> None:
    """Tiers give way for the host's memory, whatever a device does."""
    gpu = PressureReading("gpu:0", 900, 1000, is_device=True)
    source = Script(gpu)
    one = watch(source)
    one.check()
    source.answers = [(gpu, host(900))]
    one.check()
    assert [of_tiers for _, of_tiers in one.stock.asked] == [True, True]


# ------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"low_watermark": 0.8}, ["low_watermark"]),
        ({"high_watermark": 0.4}, ["low_watermark"]),
        ({"high_watermark": 1.5, "low_watermark": 0.0}, ["high_watermark", "low_watermark"]),
        ({"high_watermark": float("nan")}, ["high_watermark"]),
        ({"high_watermark": "0.9", "interval_ms": 1.5}, ["interval_ms", "high_watermark"]),
        ({"interval_ms": 0}, ["interval_ms"]),
        ({"min_evict_bytes": -1}, ["min_evict_bytes"]),
        ({"evict_tiers": ["ram", "ram"]}, ["evict_tiers"]),
        ({"evict_tiers": [1]}, ["evict_tiers"]),
        ({"evict_tiers": "rom"}, ["evict_tiers"]),
        ({"unload_idle_models": 1}, ["unload_idle_models"]),
    ],
)
def test_bad_thresholds_are_refused(
    watch: Callable[..., Watch], changes: dict[str, Any], names: list[str]
) -> None:
    """What makes no sense is refused with every mistake of it, and the old values stay."""
    one = watch(Script(host(0)))
    with pytest.raises(ConfigError) as caught:
        one.monitor.set_thresholds(**changes)
    assert sorted(p.path for p in caught.value.problems) == sorted(f"pressure.{n}" for n in names)
    assert isinstance(caught.value, ValueError)
    assert one.monitor.status().thresholds == LIMITS


def test_bad_thresholds_are_refused_at_the_start() -> None:
    """A monitor with crossed watermarks cannot be made."""
    with pytest.raises(ConfigError, match=r"low_watermark: 0\.9 is not below high_watermark"):
        Watch(limits=attrs.evolve(LIMITS, low_watermark=0.9))


def test_thresholds_at_run_time(watch: Callable[..., Watch]) -> None:
    """Changed thresholds hold from the next check on; those not named stay."""
    one = watch(Script(host(700)))
    assert one.check() == 0
    changed = one.monitor.set_thresholds(high_watermark=0.7, evict_tiers="disk")
    assert changed == attrs.evolve(LIMITS, high_watermark=0.7, evict_tiers=("disk",))
    assert one.check() == 200
    with pytest.raises(TypeError, match="hihg_watermark"):
        one.monitor.set_thresholds(hihg_watermark=0.9)


# ------------------------------------------------------------------- bad sources


def test_a_source_that_raises_is_skipped(watch: Callable[..., Watch]) -> None:
    """A source that raises is reported, and the others count; it is asked again."""
    bad = Script(OSError("no such device"), ZeroDivisionError(), SystemExit(3), host(950))
    one = watch(bad, Script(host(850)))
    with capture_logs() as logs:
        assert one.check() == 350
    status = one.monitor.status()
    assert [source.state for source in status.sources] == ["failing", "ok"]
    assert status.sources[0].error == "ZeroDivisionError()", "of the second reading"
    assert {"error": "OSError: no such device", "source": "s0"}.items() <= logs[0].items()
    one.check()  # SystemExit, then the reading
    assert one.monitor.status().sources[0].state == "ok"
    assert one.check() == 450


def test_a_source_that_hangs_is_skipped(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that hangs delays others once, is waited for no more, and comes back."""
    # The sources are asked, then the first one's time is over; the clock is not asked for it again.
    monkeypatch.setattr("erllama_core.pressure.sampler.time", Clock(0.0, 61.0))
    gate, entered = threading.Event(), threading.Event()

    def hang() -> PressureReading:
        entered.set()
        assert gate.wait(60)
        return host(900)

    bad = Script(hang, host(950))
    one = watch(bad, Script(host(850)), answer_within_s=60)
    with capture_logs() as logs:
        assert one.check() == 350
        assert one.check() == 350
    assert entered.wait(60)
    assert bad.asked == 1, "it is not asked again before it has answered"
    assert [source.state for source in one.monitor.status().sources] == ["hanging", "ok"]
    skipped = [entry for entry in logs if entry["event"] == "pressure.source_skipped"]
    assert len(skipped) == 1, "and that is said once"
    gate.set()
    # The late answer counts as soon as it is there; from then on the source is like any other.
    while one.monitor.status().sources[0].state != "ok":
        one.monitor.force_check()
    assert one.check() == 450


def test_a_question_that_was_late_is_not_waited_for_again() -> None:
    """A source is waited for once; while it owes that answer, its turn takes no time."""

    class Counted(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            self.waits: list[float | None] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.append(timeout)
            return False

    sampler = Sampler("s", lambda: Script(host(1)))
    question = Question(answered=Counted())
    for _ in range(3):
        assert sampler.take(question, time.monotonic() + 3600) == ()
    assert isinstance(question.answered, Counted)
    first, *rest = question.answered.waits
    assert first is not None
    assert first > 3000
    assert rest == [0.0, 0.0]


def test_closing_does_not_wait_for_a_source_that_hangs(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs is left behind with a warning; others are closed, and it too when it is back."""
    monkeypatch.setattr("erllama_core.pressure.sampler.time", Clock(0.0, 0.0, 61.0))
    asked, gate = threading.Event(), threading.Event()

    def hanging() -> PressureReading:
        asked.set()
        gate.wait(60)
        return host(1)

    good, bad = Script(host(1)), Script(hanging)
    one = watch(good, bad, answer_within_s=60)
    one.check()
    assert asked.wait(60)
    with capture_logs() as logs:
        one.monitor.close()
    assert good.closed.is_set()
    assert not bad.closed.is_set()
    assert [entry["source"] for entry in logs] == ["s1"]
    gate.set()
    assert bad.closed.wait(60)


def test_a_question_is_dropped_when_closing_overtakes_it() -> None:
    """Nobody waits for an answer that a closed source will not give, nor for one asked later."""
    opened = Script(host(1))
    sampler = Sampler("s", lambda: opened)
    sampler._thread = threading.Thread(target=sampler._run)
    question = sampler.ask()
    sampler.close()
    sampler._thread.start()
    assert sampler.join(60)
    for dropped in (question, sampler.ask()):
        assert dropped.answered.is_set()
        assert sampler.take(dropped, time.monotonic() + 60) == ()
    assert opened.asked == 0
    assert sampler.status.state == "new"


@pytest.mark.parametrize("answer", ["text", 5, None, (1, 2), ((host(1), "x"),)])
def test_a_source_that_returns_nonsense_is_skipped(
    watch: Callable[..., Watch], answer: Any
) -> None:
    """What is no tuple of readings is the source's failure, and nothing else's."""

    class Odd:
        def sample(self) -> Any:
            return answer

        def close(self) -> None:
            raise RuntimeError("not even that")

    one = watch(Odd(), Script(host(850)))
    assert one.check() == 350
    assert one.monitor.status().sources[0].state == "failing"
    with capture_logs() as logs:
        one.monitor.close()
    assert [entry["event"] for entry in logs] == ["pressure.source_not_closed"]


@pytest.mark.parametrize(
    "reading",
    [PressureReading("x", -5, 10), StallReading("x", float("nan"), 0.1)],
    ids=["negative", "nan"],
)
def test_readings_without_sense_are_refused(watch: Callable[..., Watch], reading: Any) -> None:
    """A usage below zero, or of no number, is the source's failure."""
    one = watch(Script(reading))
    assert one.check() == 0
    assert "has a usage of" in str(one.monitor.status().sources[0].error)


def test_a_source_that_cannot_be_opened_is_tried_again(watch: Callable[..., Watch]) -> None:
    """Opening happens on the source's own thread, and again in every check until it works."""
    attempts: list[str] = []

    def opening() -> PressureSource:
        attempts.append(threading.current_thread().name)
        if len(attempts) < 2:
            raise OSError("no driver yet")
        return Script(host(850))

    one = watch(opening, Script(host(1)))
    one.check()
    assert one.monitor.status().sources[0].error == "OSError: no driver yet"
    assert one.check() == 350
    assert attempts == ["erllama-pressure-s0"] * 2


def test_no_readings(watch: Callable[..., Watch]) -> None:
    """With nothing but the noop source nothing is read, and nothing given back."""
    one = watch(NoopPressure())
    assert one.check() == 0
    assert one.told == [PressureSampled(readings=(), usage=0.0, released_bytes=0)]
    assert one.monitor.status().tightest is None


# ------------------------------------------------------------------- running


def test_enabled_it_checks_by_itself() -> None:
    """An enabled monitor checks at once, then in every interval; disabled it stops."""
    sampled = threading.Semaphore(0)

    def reading() -> PressureReading:
        sampled.release()
        return host(900)

    released = threading.Event()

    class Noted(Stock):
        def release(self, *args: Any, **options: Any) -> Release:
            released.set()
            return super().release(*args, **options)

    monitor = Monitor(
        attrs.evolve(LIMITS, interval_ms=1),
        lambda: {"s": lambda: Script(reading)},
        Noted(),
        pause=lambda _: None,
    )
    assert not monitor.status().enabled
    monitor.enable()
    monitor.enable()
    for _ in range(6):
        assert sampled.acquire(timeout=60)
    assert released.wait(60)
    assert monitor.status().enabled
    monitor.disable()
    assert not monitor.status().enabled
    monitor.set_thresholds(interval_ms=60_000)
    monitor.force_check()  # one that was under way has ended
    checks = monitor.status().checks
    monitor.enable()
    monitor.close()
    monitor.close()
    status = monitor.status()
    assert checks <= status.checks <= checks + 1
    assert status.releases > 0
    assert status.last_release is not None
    assert status.freed_bytes <= 10_000
    for use in (monitor.enable, monitor.force_check):
        with pytest.raises(EngineClosed):
            use()


def test_a_new_interval_holds_at_once() -> None:
    """A monitor that waits for a long interval does not sit it out when it becomes short."""
    sampled = threading.Semaphore(0)

    def reading() -> PressureReading:
        sampled.release()
        return host(1)

    monitor = Monitor(LIMITS, lambda: {"s": lambda: Script(reading)}, Stock())
    monitor.enable()
    assert sampled.acquire(timeout=60)
    monitor.set_thresholds(interval_ms=1)
    for _ in range(3):
        assert sampled.acquire(timeout=50)
    monitor.close()


def test_a_check_that_fails_is_not_the_last() -> None:
    """Whatever giving memory back raises, the monitor goes on."""
    failed = threading.Semaphore(0)

    class Broken(Stock):
        def release(self, *_: Any, **__: Any) -> Release:
            failed.release()
            raise RuntimeError("a bug")

    monitor = Monitor(
        attrs.evolve(LIMITS, interval_ms=1),
        lambda: {"s": lambda: Script(host(900))},
        Broken(),
        pause=lambda _: None,
    )
    with capture_logs() as logs:
        monitor.enable()
        for _ in range(3):
            assert failed.acquire(timeout=60)
        monitor.close()
    assert {entry["event"] for entry in logs} == {"pressure.check_failed"}


def test_closing_ends_a_check_between_its_readings() -> None:
    """A monitor that is closed while it waits for the second reading gives nothing back."""
    waiting, gate = threading.Event(), threading.Event()
    stock = Stock()

    def pause(_: float) -> None:
        waiting.set()
        assert gate.wait(60)

    monitor = Monitor(
        LIMITS, lambda: {"s": lambda: Script(host(900))}, stock, pause=pause, patience_s=60
    )
    monitor.enable()
    assert waiting.wait(60)
    closing = threading.Thread(target=monitor.close)
    closing.start()
    with contextlib.suppress(EngineClosed):
        while True:
            monitor.enable()
    gate.set()
    closing.join()
    assert stock.asked == []


def test_sources_are_looked_up_when_they_are_needed() -> None:
    """A disabled monitor needs no source; what the look-up raises comes from ``enable``."""

    def missing() -> Mapping[str, Callable[[], PressureSource]]:
        raise PluginMissing("the pressure source 'x' is not installed: pip install y")

    monitor = Monitor(LIMITS, missing, Stock())
    for use in (monitor.enable, monitor.force_check):
        with pytest.raises(PluginMissing, match="pip install y"):
            use()
    assert not monitor.status().enabled
    monitor.close()

"""The monitor: reads the sources, and has memory given back when one of them is too high."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from erllama_core.errors import ConfigError, ConfigProblem, EngineClosed
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.pressure import PressureReading, PressureSource, Reading
from erllama_core.interfaces.telemetry import PressureSampled
from erllama_core.pressure.sampler import Sampler, sample_all
from erllama_core.pressure.status import PressureStatus, Release
from erllama_core.pressure.thresholds import Thresholds, tightest

log = get_logger("erllama.pressure")

ANSWER_WITHIN_S: Final = 5.0
"""A source that takes longer hangs, and is waited for no more before it has answered. Opening one
may mean to start a driver."""
CONFIRM_AFTER_S: Final = 0.2
"""How long after a high reading it is read again: a moment's peak is over by then, and memory
that goes on filling has not gone far."""
PATIENCE_S: Final = 5.0
"""How long closing waits for a check that is under way, and for sources to close."""

OpenSources = Callable[[], Mapping[str, Callable[[], PressureSource]]]


class Releases(Protocol):
    """Who has memory to give back. Called by one thread at a time."""

    def problems(self, thresholds: Thresholds) -> list[ConfigProblem]:
        """What of the thresholds does not fit what there is."""
        ...

    def held_bytes(self, thresholds: Thresholds) -> int:
        """What could be given back without unloading anything."""
        ...

    def release(self, n_bytes: int, thresholds: Thresholds, *, of_tiers: bool) -> Release:
        """Give back ``n_bytes``; ``of_tiers``: by eviction first."""
        ...


class Monitor:
    """``engine.pressure``. Thread-safe.

    ``open_sources`` gives what opens each source, by its name; it is called when the sources are
    first needed, and what it raises is raised by :meth:`enable` and :meth:`force_check`. ``tell``
    is told of every check. ``pause`` waits so many seconds, or until the monitor is closed.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        open_sources: OpenSources,
        releases: Releases,
        *,
        tell: Callable[[PressureSampled], None] | None = None,
        pause: Callable[[float], object] | None = None,
        answer_within_s: float = ANSWER_WITHIN_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._open_sources: Final = open_sources
        self._releases: Final = releases
        self._tell: Final = tell
        self._closed: Final = threading.Event()
        self._pause: Final = self._closed.wait if pause is None else pause
        self._answer_within_s: Final = answer_within_s
        self._patience_s: Final = patience_s
        self._changed: Final = threading.Condition()
        """Guards what follows; never held while a source is asked, or memory is given back."""
        self._thresholds = thresholds
        self._enabled = False
        self._samplers: tuple[Sampler, ...] | None = None
        self._thread: threading.Thread | None = None
        self._tightest: Reading | None = None
        self._checks = self._n_releases = self._freed_bytes = 0
        self._last_release: tuple[Release, float] | None = None
        self._checking: Final = threading.Lock()
        """Held during a check: one at a time."""
        self._unmoved: Final[dict[tuple[str, str], int]] = {}
        """What of a device's memory was in use when tiers last gave way for it."""
        self._refuse(thresholds)

    # ------------------------------------------------------------------- for users

    def status(self) -> PressureStatus:
        """The monitor as it is now; waits for nothing."""
        with self._changed:
            release, at = (None, None) if self._last_release is None else self._last_release
            return PressureStatus(
                enabled=self._enabled,
                thresholds=self._thresholds,
                sources=tuple(sampler.status for sampler in self._samplers or ()),
                tightest=self._tightest,
                checks=self._checks,
                releases=self._n_releases,
                freed_bytes=self._freed_bytes,
                last_release=release,
                last_release_at=at,
            )

    def force_check(self) -> PressureStatus:
        """Check now, without waiting for the interval; the status after it.

        Also while the monitor is disabled. Blocks while the sources answer and memory is given
        back. Raises what :meth:`enable` raises.
        """
        self._open()
        self._check()
        return self.status()

    def set_thresholds(self, **changes: Any) -> Thresholds:
        """Change fields of :class:`Thresholds`, from the next check on; all of them, as they are.

        Raises ConfigError, with everything that is wrong, and changes nothing then; TypeError for
        a field that there is not.
        """
        if isinstance(changes.get("evict_tiers"), str):
            changes["evict_tiers"] = (changes["evict_tiers"],)
        elif "evict_tiers" in changes:
            changes["evict_tiers"] = tuple(changes["evict_tiers"])
        with self._changed:
            thresholds = attrs.evolve(self._thresholds, **changes)
            self._refuse(thresholds)
            self._thresholds = thresholds
            self._changed.notify_all()
        return thresholds

    def enable(self) -> None:
        """Check from now on, first at once, then in every interval. Idempotent.

        Raises PluginMissing for a source that is not installed, which says what to install,
        other PluginErrors and ConfigError; EngineClosed.
        """
        self._open()
        with self._changed:
            self._enabled = True
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="erllama-pressure", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def disable(self) -> None:
        """Check no more, until it is enabled again. Idempotent; what is under way is not undone."""
        with self._changed:
            self._enabled = False
            self._changed.notify_all()

    # ------------------------------------------------------------------ for the engine

    def close(self) -> None:
        """Stop, and close the sources. Idempotent.

        A source that hangs, or a check that does, is left behind with a warning.
        """
        with self._changed:
            self._closed.set()
            self._enabled = False
            self._changed.notify_all()
            samplers = self._samplers or ()
        for sampler in samplers:
            sampler.close()
        deadline = time.monotonic() + self._patience_s

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(left())
            if thread.is_alive():
                log.warning("pressure.check_left_behind")
        for sampler in samplers:
            # What hangs already has had its time.
            if not sampler.join(0.0 if sampler.status.state == "hanging" else left()):
                log.warning("pressure.source_left_behind", source=sampler.name)

    # ---------------------------------------------------------------------- inside

    def _refuse(self, thresholds: Thresholds) -> None:
        problems = [
            ConfigProblem(f"pressure.{name}", text) for name, text in thresholds.problems()
        ] or self._releases.problems(thresholds)
        if problems:
            raise ConfigError(problems)

    def _open(self) -> Sequence[Sampler]:
        with self._changed:
            if self._closed.is_set():
                raise EngineClosed("the engine is closed")
            if self._samplers is None:
                self._samplers = tuple(
                    Sampler(name, opener) for name, opener in self._open_sources().items()
                )
            return self._samplers

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._enabled or self._closed.is_set())
                if self._closed.is_set():
                    return
            try:
                self._check()
            except EngineClosed:
                return
            except Exception:
                log.exception("pressure.check_failed")
            with self._changed:
                due = time.monotonic()
                # A new interval counts from the last check on, and so takes effect at once.
                while self._enabled and not self._closed.is_set():
                    left = due + self._thresholds.interval_ms / 1000 - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)

    def _check(self) -> None:
        with self._checking:
            samplers = self._open()
            thresholds = self._thresholds
            readings = sample_all(samplers, self._answer_within_s)
            if self._closed.is_set():
                return
            high = self._high(readings, thresholds)
            release = None
            if high:
                self._pause(CONFIRM_AFTER_S)
                if self._closed.is_set():
                    return
                readings = sample_all(samplers, self._answer_within_s)
                still = self._high(readings, thresholds)
                confirmed = {key: reading for key, reading in still.items() if key in high}
                if confirmed:
                    release = self._release(confirmed, thresholds)
            self._forget_moved(readings, thresholds)
            self._note([reading for _, reading in readings], release)

    @staticmethod
    def _high(
        readings: Sequence[tuple[str, Reading]], thresholds: Thresholds
    ) -> dict[tuple[str, str], Reading]:
        """Readings that ask for memory, by source and resource."""
        return {
            (source, reading.resource): reading
            for source, reading in readings
            if thresholds.is_high(reading)
        }

    def _release(
        self, confirmed: Mapping[tuple[str, str], Reading], thresholds: Thresholds
    ) -> Release:
        held = self._releases.held_bytes(thresholds)
        wanted = max(thresholds.excess_bytes(reading, held) for reading in confirmed.values())
        follow = [self._follows(key, reading) for key, reading in confirmed.items()]
        top = tightest(confirmed.values())
        assert top is not None
        release = self._releases.release(wanted, thresholds, of_tiers=any(follow))
        tell = log.info if release else log.debug
        tell(
            "pressure.released" if release else "pressure.nothing_to_release",
            resource=top.resource,
            usage=round(top.usage, 3),
            wanted_bytes=release.wanted_bytes,
            freed_bytes=release.freed_bytes,
            rows=release.rows,
            residents=release.residents,
            unloaded=release.unloaded,
        )
        return release

    def _follows(self, key: tuple[str, str], reading: Reading) -> bool:
        """Whether tiers that give way may bring a reading down.

        The host's memory: always. A device's, where that is the host's: it is tried, and tried
        again once the reading has come down. On a device with memory of its own every check would
        otherwise cost some of the cache, for nothing.
        """
        if not (isinstance(reading, PressureReading) and reading.is_device):
            return True
        before = self._unmoved.get(key)
        if before is None or reading.used_bytes < before:
            self._unmoved[key] = reading.used_bytes
            return True
        return False

    def _forget_moved(
        self, readings: Sequence[tuple[str, Reading]], thresholds: Thresholds
    ) -> None:
        for source, reading in readings:
            if not thresholds.is_high(reading):
                self._unmoved.pop((source, reading.resource), None)

    def _note(self, readings: Sequence[Reading], release: Release | None) -> None:
        top = tightest(readings)
        with self._changed:
            self._checks += 1
            self._tightest = top
            if release:
                self._n_releases += 1
                self._freed_bytes += release.freed_bytes
                self._last_release = (release, time.time())
        if self._tell is not None:
            self._tell(
                PressureSampled(
                    readings=tuple(readings),
                    usage=0.0 if top is None else top.usage,
                    released_bytes=0 if release is None else release.freed_bytes,
                )
            )

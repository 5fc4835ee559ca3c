"""Whether a pressure source keeps its promises: see :mod:`erllama_core.interfaces.pressure`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest

from erllama_core.conformance.kit import ConformanceKit, no_leaks
from erllama_core.errors import ErllamaError
from erllama_core.interfaces.pressure import PressureReading, PressureSource, StallReading


@attrs.frozen(kw_only=True)
class PressureSubject:
    """A pressure source to be tested."""

    make: Callable[[], PressureSource] = attrs.field(kw_only=False)
    """Makes a source that can be read here. The test closes what it has made."""
    is_silent: bool = False
    """Whether it never has anything to say."""
    broken: Callable[[], PressureSource] | None = None
    """Makes one whose readings fail, as when a device is lost; without one, what it does then is
    not tested."""


class PressureConformance(ConformanceKit, abc.ABC):
    """Derive, and say with a fixture ``subject`` what is tested."""

    @pytest.fixture
    @abc.abstractmethod
    def subject(self) -> PressureSubject:
        """What is tested."""

    @pytest.fixture
    def source(self, subject: PressureSubject) -> Iterator[PressureSource]:
        source = subject.make()
        yield source
        source.close()

    def test_readings_are_a_tuple_of_readings(
        self, subject: PressureSubject, source: PressureSource
    ) -> None:
        """A sample is a tuple of readings, empty only for a source that says so.

        If this fails: the monitor skips the source at every interval, and nothing is released.
        """
        readings = source.sample()
        assert isinstance(readings, tuple)
        assert all(isinstance(reading, PressureReading | StallReading) for reading in readings)
        assert bool(readings) is not subject.is_silent

    def test_readings_can_be_true(self, source: PressureSource) -> None:
        """No memory is used beyond its total, or less than not at all; no stall lasts longer
        than the time.

        If this fails: usage is above 1.0, negative or unknown, and the watermarks mean nothing.
        """
        for reading in source.sample():
            if isinstance(reading, StallReading):
                assert 0.0 <= reading.stalled <= 1.0, reading
                assert 0.0 < reading.limit <= 1.0, reading
            else:
                assert isinstance(reading.used_bytes, int), reading
                assert isinstance(reading.total_bytes, int), reading
                assert reading.total_bytes > 0, reading
                assert 0 <= reading.used_bytes <= reading.total_bytes, reading
            assert 0.0 <= reading.usage <= 1.0, reading

    def test_resources_have_names_that_stay(self, source: PressureSource) -> None:
        """Each memory has a name of its own, and the same one in the next sample.

        If this fails: a second reading cannot confirm the first, and two devices look like one.
        """
        names = [reading.resource for reading in source.sample()]
        assert all(names)
        assert len(set(names)) == len(names)
        assert [reading.resource for reading in source.sample()] == names

    def test_another_thread_samples(self, source: PressureSource) -> None:
        """A source is sampled by another thread than the one that made it.

        If this fails: the monitor, which has a thread of its own, never gets a reading.
        """
        with ThreadPoolExecutor(1) as thread:
            readings = thread.submit(source.sample).result()
        assert [r.resource for r in readings] == [r.resource for r in source.sample()]

    def test_sampling_leaks_nothing(self, source: PressureSource) -> None:
        """Sampling again and again opens no descriptor that stays open, and starts no thread.

        If this fails: a server that runs for a week has no descriptors left.
        """
        source.sample()
        with no_leaks():
            for _ in range(50):
                source.sample()

    def test_closing_twice_is_harmless(self, subject: PressureSubject) -> None:
        """``close`` is idempotent, works without a sample, and another source can follow.

        If this fails: pressure cannot be switched off and on again at run time.
        """
        with no_leaks():
            for sampled in (False, True, True):
                source = subject.make()
                if sampled:
                    source.sample()
                source.close()
                source.close()

    def test_sources_do_not_depend_on_each_other(self, subject: PressureSubject) -> None:
        """Closing one source leaves another one of the kind as it was.

        If this fails: two engines in one process take each other's source away.
        """
        one, other = subject.make(), subject.make()
        try:
            names = [reading.resource for reading in other.sample()]
            one.sample()
            one.close()
            assert [reading.resource for reading in other.sample()] == names
        finally:
            one.close()
            other.close()

    def test_a_reading_that_fails_raises_what_is_expected(self, subject: PressureSubject) -> None:
        """Without a reading ``sample`` raises OSError or ErllamaError, or leaves it out.

        If this fails: an exception that nobody expects ends the monitor's sample, or a lost
        device looks like a memory that is empty.
        """
        if subject.broken is None:
            pytest.skip("the subject has no source whose readings fail")
        source = subject.broken()
        try:
            for _ in range(3):
                try:
                    readings = source.sample()
                except (OSError, ErllamaError):
                    continue
                memories = [r for r in readings if isinstance(r, PressureReading)]
                assert all(reading.total_bytes > 0 for reading in memories)
        finally:
            source.close()

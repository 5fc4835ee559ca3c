"""One pressure source on a thread of its own, so that one which hangs keeps no other waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs

from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.pressure import (
    PressureReading,
    PressureSource,
    Reading,
    StallReading,
)
from erllama_core.pressure.status import SourceState, SourceStatus

log = get_logger("erllama.pressure")


@attrs.define(eq=False)
class Question:
    """What a sampler was asked, and its answer once ``answered`` is set."""

    answered: threading.Event = attrs.field(factory=threading.Event)
    readings: tuple[Reading, ...] = ()
    error: str | None = None
    is_dropped: bool = False

    def drop(self) -> None:
        """Answer that nobody answers any more, so that who waits for it goes on."""
        self.is_dropped = True
        self.answered.set()


class Sampler:
    """Opens a source when it is first asked, and asks it. For one monitor thread at a time.

    ``open_source`` may raise, and is then called again for the next question.
    """

    def __init__(self, name: str, open_source: Callable[[], PressureSource]) -> None:
        self.name: Final = name
        self._open_source: Final = open_source
        self._source: PressureSource | None = None
        self._questions: Final[queue.SimpleQueue[Question | None]] = queue.SimpleQueue()
        self._last: Question | None = None
        self._late: Question | None = None
        """One that was not answered in time."""
        self._thread: threading.Thread | None = None
        self._lock: Final = threading.Lock()
        """Nothing is asked after the end was: held while one of both is put into the queue."""
        self._closed = False
        self._status = SourceStatus(name=name, state="new", error=None, readings=())

    @property
    def status(self) -> SourceStatus:
        """How it answered last. Any thread."""
        return self._status

    def ask(self) -> Question:
        """Have the source sampled; while it still owes an answer, that question again."""
        if self._last is None or self._last.answered.is_set():
            self._last = Question()
            with self._lock:
                if self._closed:
                    self._last.drop()
                    return self._last
                if self._thread is None:
                    # A daemon: one that hangs must not keep the process from ending.
                    self._thread = threading.Thread(
                        target=self._run, name=f"erllama-pressure-{self.name}", daemon=True
                    )
                    self._thread.start()
                self._questions.put(self._last)
        return self._last

    def take(self, question: Question, deadline_s: float) -> tuple[Reading, ...]:
        """The answer; no readings when the source raised, or is too late for the deadline.

        That is on the monotonic clock. What hung before is not waited for again.
        """
        left = 0.0 if question is self._late else max(0.0, deadline_s - time.monotonic())
        if not question.answered.wait(left):
            self._late = question
            self._note("hanging", "it does not answer")
        elif question.is_dropped:
            return ()
        elif question.error is not None:
            self._note("failing", question.error)
        else:
            self._note("ok", None, question.readings)
        return self._status.readings

    def _note(
        self, state: SourceState, error: str | None, readings: tuple[Reading, ...] = ()
    ) -> None:
        before, self._status = (
            self._status,
            SourceStatus(name=self.name, state=state, error=error, readings=readings),
        )
        if (before.state, before.error) == (state, error):
            return
        if error is not None:
            log.warning("pressure.source_skipped", source=self.name, state=state, error=error)
        elif before.error is not None:
            log.info("pressure.source_recovered", source=self.name)

    def close(self) -> None:
        """Have the source closed, by its own thread, when it has answered. Does not wait.

        What it was asked and has not begun to answer is dropped.
        """
        with self._lock:
            self._closed = True
            self._questions.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait until the source is closed; False when it took longer, and is left behind."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            if self._closed:
                question.drop()
                continue
            try:
                question.readings = self._sample()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's own code
                question.error = f"{type(error).__name__}: {error}" if str(error) else repr(error)
            question.answered.set()
        if self._source is not None:
            try:
                self._source.close()
            except (Exception, SystemExit):
                log.exception("pressure.source_not_closed", source=self.name)

    def _sample(self) -> tuple[Reading, ...]:
        if self._source is None:
            self._source = self._open_source()
        return _checked(self._source.sample())


def _checked(answer: Iterable[object]) -> tuple[Reading, ...]:
    """What a source returned, if it is what a source may return."""
    readings: list[Reading] = []
    for reading in answer:
        if not isinstance(reading, PressureReading | StallReading):
            raise TypeError(
                f"it returned a {type(reading).__name__}, neither a PressureReading nor a "
                f"StallReading"
            )
        if not 0.0 <= reading.usage < float("inf"):
            raise ValueError(f"{reading.resource} has a usage of {reading.usage}")
        readings.append(reading)
    return tuple(readings)


def sample_all(samplers: Sequence[Sampler], timeout_s: float) -> list[tuple[str, Reading]]:
    """What all sources say, each reading with its source's name.

    All are asked at once, and after ``timeout_s`` those that have not answered are passed over.
    """
    asked = [(sampler, sampler.ask()) for sampler in samplers]
    deadline_s = time.monotonic() + timeout_s
    return [
        (sampler.name, reading)
        for sampler, question in asked
        for reading in sampler.take(question, deadline_s)
    ]

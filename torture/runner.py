"""Runs a fault's rounds in processes of their own, and sees to it that each of them ends."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import attrs

from torture.environment import ROOT, environment
from torture.fault import Known
from torture.record import Record
from torture.tally import Tally

_ENDS_WITHIN_S: Final = 60.0
"""A worker that has said its last line, or was told to end."""


@attrs.frozen(kw_only=True)
class Limits:
    """How long a fault goes on: until either is reached, counting what earlier calls did."""

    seconds: float
    rounds: int = 1_000_000

    def left(self, record: Record, fault: str) -> Limits:
        """What earlier calls left to do."""
        done = record.rounds(fault)
        return Limits(
            seconds=self.seconds - sum(one.seconds for one in done),
            rounds=self.rounds - len(done),
        )

    @property
    def are_reached(self) -> bool:
        """Whether nothing is left to do."""
        return self.seconds <= 0 or self.rounds <= 0


def run_fault(
    known: Known,
    record: Record,
    limits: Limits,
    *,
    scale: float = 1.0,
    model_path: Path | None = None,
    tell: Callable[[Tally], None] = lambda _: None,
) -> None:
    """Bring a fault to its limits. A worker that dies or hangs is a round that went wrong.

    ``tell`` is called after each round.
    """
    while not (left := limits.left(record, known.name)).are_reached:
        rounds = record.rounds(known.name)
        first = 1 + max((one.number for one in rounds), default=-1)
        with _Worker(known, record, left, first, scale, model_path) as worker:
            number, started = first, time.monotonic()
            while (values := worker.next_round(known.most_s)) is not None:
                record.add(known.name, values)
                tell(Tally.from_json(values))
                number, started = values["round"] + 1, time.monotonic()
            fate = worker.fate()
        if fate is not None:
            tally = Tally()
            tally.accuse(f"{fate}; {record.words_file(known.name)} has what it said")
            seconds = time.monotonic() - started
            record.add(known.name, {"round": number, "seconds": seconds, **tally.as_json()})
            tell(tally)
            if number == first:
                return  # it will fail again


class _Worker:
    """A process that runs rounds; a context manager, which ends it."""

    def __init__(
        self,
        known: Known,
        record: Record,
        limits: Limits,
        first: int,
        scale: float,
        model_path: Path | None,
    ) -> None:
        command = [sys.executable, "-m", "torture.worker", known.name]
        command += ["--module", known.module, *(["--unprivileged"] * known.unprivileged)]
        command += ["--folder", str(record.work_folder(known.name).absolute())]
        command += ["--seed", str(record.seed), "--first", str(first)]
        command += ["--rounds", str(limits.rounds), "--seconds", str(limits.seconds)]
        command += ["--scale", str(scale)]
        if model_path is not None:
            command += ["--model", str(model_path.absolute())]
        self._words = record.words_file(known.name).open("ab")
        self._process = subprocess.Popen(
            command,
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._hangs: str | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._words.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next_round(self, most_s: float) -> dict[str, Any] | None:
        """What the worker says of its next round; None when it says no more."""
        try:
            line = self._lines.get(timeout=most_s)
        except queue.Empty:
            self._hangs = f"no end of a round within {most_s:.0f} s"
            self._process.send_signal(signal.SIGABRT)  # it tells where its threads are
            return None
        if line is None:
            return None
        values: dict[str, Any] = json.loads(line)
        return values

    def fate(self) -> str | None:
        """How the worker ended, if not as it should have."""
        try:
            code = self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            return "the process did not end after its last round"
        if self._hangs is not None:
            return self._hangs
        if code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return f"the process ended with {code}" if code else None

"""Calls of a stub backend that fail or hang now and then."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from erllama_backend_stub.faults import Fault, FaultPlan


class RandomFaults:
    """Which call of a stub fails. Thread-safe.

    One call in ``every`` fails; steps whose number ``hangs`` says yes to hang until the model's
    gate is opened, and with ``deaf`` hear of no abort before.
    """

    def __init__(
        self, chance: random.Random, every: int, hangs: Callable[[int], bool], *, deaf: bool = True
    ) -> None:
        self._chance = chance
        self._every: Final = every
        self._hangs: Final = hangs
        self._deaf: Final = deaf
        self._lock = threading.Lock()
        self._steps = 0
        self.hung: set[int] = set()
        """Numbers of the steps that hung."""
        self.failed = 0
        """Calls."""

    def _fails(self) -> bool:
        with self._lock:
            fails = self._chance.randrange(self._every) == 0
            self.failed += fails
        return fails

    def step(self, plan: FaultPlan) -> Fault:
        """For ``FaultPlan.next_step``."""
        with self._lock:
            self._steps += 1
            number = self._steps
            hangs = self._hangs(number)
            if hangs:
                self.hung.add(number)
                plan.hang_deaf = self._deaf  # type: ignore[misc]
        return Fault(number, fails=self._fails(), hangs=hangs)

    def export(self) -> Fault:
        """For ``FaultPlan.next_export``: it fails, or what it gives lacks a cell."""
        return Fault(0, fails=self._fails(), short=self._fails())

    def load(self) -> Fault:
        """For ``FaultPlan.next_import``."""
        return Fault(0, fails=self._fails())


@contextmanager
def failing(faults: RandomFaults) -> Iterator[RandomFaults]:
    """All stub models of this process fail so meanwhile."""
    kept = {name: getattr(FaultPlan, name) for name in ("next_step", "next_export", "next_import")}
    # The first is a function, so that it is given the plan.
    replaced = {
        "next_step": lambda plan: faults.step(plan),  # noqa: PLW0108
        "next_export": faults.export,
        "next_import": faults.load,
    }
    for name, function in replaced.items():
        setattr(FaultPlan, name, function)
    try:
        yield faults
    finally:
        for name, method in kept.items():
            setattr(FaultPlan, name, method)

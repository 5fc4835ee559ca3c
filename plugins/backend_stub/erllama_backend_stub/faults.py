"""Injected faults: which call fails, and the gate at which a step hangs."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Final

import attrs

from erllama_backend_stub.options import StubFaults


class HangGate:
    """Where a step hangs, until the gate is opened or the step aborted. Thread-safe.

    ::

        gate.wait_reached(10.0)    # the step is inside and waits
        gate.open()                # it goes on, and computes what it always would have
    """

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._changed = threading.Condition()
        self._is_open = False

    @property
    def reached(self) -> bool:
        """Whether a step has come to the gate."""
        return self._reached.is_set()

    def wait_reached(self, timeout_s: float) -> bool:
        """Wait until a step has come to the gate; False when none did in time."""
        return self._reached.wait(timeout_s)

    def open(self) -> None:
        """Let every step through, now and later. Idempotent."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Let a step that hangs look whether it was aborted."""
        with self._changed:
            self._changed.notify_all()

    def pass_through(self, aborted: threading.Event) -> None:
        """What the step calls: returns once the gate is open, or ``aborted`` is set."""
        self._reached.set()
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or aborted.is_set())


_gates: Final[weakref.WeakValueDictionary[str, HangGate]] = weakref.WeakValueDictionary()
_gates_lock: Final = threading.Lock()


def gate(name: str) -> HangGate:
    """The gate that a model with ``faults.hang_gate = name`` hangs at.

    For tests that load the model through an engine. It may be asked for before the model
    exists; hold on to it, for a gate that nobody holds is forgotten.
    """
    with _gates_lock:
        return _gates.setdefault(name, HangGate())


@attrs.frozen
class Fault:
    """What is wrong with one call."""

    ordinal: int
    fails: bool = False
    hangs: bool = False
    short: bool = False


class FaultPlan:
    """Counts a model's calls and says which of them fail. Thread-safe."""

    def __init__(self, faults: StubFaults) -> None:
        self._faults = faults
        # next() on these is one bytecode into C: two contexts never see one number.
        self._steps = itertools.count(1)
        self._exports = itertools.count(1)
        self._imports = itertools.count(1)
        self.gate: Final = gate(faults.hang_gate) if faults.hang_gate else HangGate()
        self.hang_deaf: Final = faults.hang_deaf

    def next_step(self) -> Fault:
        ordinal = next(self._steps)
        return Fault(
            ordinal,
            fails=ordinal == self._faults.fail_step,
            hangs=ordinal == self._faults.hang_step,
        )

    def next_export(self) -> Fault:
        ordinal = next(self._exports)
        return Fault(
            ordinal,
            fails=ordinal == self._faults.fail_export,
            short=ordinal == self._faults.short_export,
        )

    def next_import(self) -> Fault:
        ordinal = next(self._imports)
        return Fault(ordinal, fails=ordinal == self._faults.fail_import)

"""Models whose workers have no thread: a test takes their turns, one by one, on its own.

What happens between which two ticks is then the test's choice, and the same every time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import Fault
from erllama_core import Model
from erllama_core.model.request import Request
from erllama_core.model.runner import Runner
from erllama_core.model.watch import Abandoned
from erllama_core.model.worker import Worker

T = TypeVar("T")


@contextmanager
def by_hand() -> Iterator[None]:
    """Models that are loaded meanwhile get their turns from :class:`Hand`, closing included."""

    def launch(worker: Worker, runner: Runner) -> None:
        if not worker._open(runner):
            worker._free(runner, None)

    def close(worker: Worker) -> None:
        if worker._finished.is_set():
            return
        with worker._lock:
            worker._accepts = False
        runner = worker._runner
        runner.stop()
        heir = worker._serve(runner)
        worker._free(runner, heir)
        worker._closed.set()
        if worker._watchdog is not None:
            worker._watchdog.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_launch", launch)
        patch.setattr(Worker, "close", close)
        yield


class Hand:
    """Takes the turns of a stub model's worker, and breaks its context where it is told to."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.worker = model._worker
        self.faults = Faults()
        self.reads_held = False
        """A tier does not answer: a request that waits for it waits."""
        self._arrivals = threading.Condition()
        self._instrumented: StubContext | None = None
        self._instrument()

    @property
    def runner(self) -> Runner:
        return self.worker._runner

    @property
    def context(self) -> StubContext:
        context = self.runner.context
        assert isinstance(context, StubContext)
        return context

    def _instrument(self) -> None:
        if self._instrumented is self.context:
            return
        self._instrumented = self.context
        self.context._faults = self.faults  # type: ignore[assignment]
        restorer = self.runner.restorer
        post = restorer._post
        self._on_their_way = 0
        """Answers of other threads that are in the inbox."""

        def arrived(request: Request, act: Callable[[Request], None]) -> None:
            def taken(request: Request) -> None:
                with self._arrivals:
                    self._on_their_way -= 1
                act(request)

            post(request, taken)
            with self._arrivals:
                self._on_their_way += 1
                self._arrivals.notify()

        restorer._post = arrived  # type: ignore[misc]

    def _await_reads(self) -> None:
        """Whatever was asked of other threads has been answered: they are never in between."""
        restorer = self.runner.restorer
        with self._arrivals:
            came = self._arrivals.wait_for(
                lambda: self._on_their_way >= restorer.outstanding, timeout=10.0
            )
        assert came, "a read never came back"

    def turn(self) -> bool:
        """One turn, if there is anything to do; whether there was."""
        runner = self.runner
        if self.worker._finished.is_set():
            return False
        if not self.reads_held:
            self._await_reads()
        if not runner.has_work and runner._patience() != 0.0:
            return False
        try:
            runner.turn()
        except Abandoned:
            self.worker._free(runner, None)
        except Exception as error:  # noqa: BLE001 - as the worker's own thread does
            heir = self.worker._heir_after(runner, error)
            self.worker._free(runner, heir)
            if heir is not None:
                assert self.worker._open(heir)
        self._instrument()
        self.checks()
        return True

    def turns(self, most: int = 10_000) -> int:
        """Turns until there is nothing to do; how many that took. Fails when it does not end."""
        taken = 0
        while self.turn():
            taken += 1
            assert taken < most, "the worker goes on and on"
        return taken

    def turns_of(self, count: int) -> None:
        """That many turns, as far as there is something to do."""
        for _ in range(count):
            if not self.turn():
                return

    def until(self, reached: Callable[[], bool], most: int = 10_000) -> None:
        """Turns until something is so."""
        for _ in range(most):
            if reached():
                return
            assert self.turn(), "there is nothing left to do"
        raise AssertionError("it never came to be")

    def during(self, call: Callable[[], T]) -> T:
        """What a call returns that waits for the worker, which takes its turns meanwhile."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001 - raised on the test's thread
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            with self.worker._lock:
                waiting = [done for done in self.worker._asking if not done.is_set()]
            if not waiting:
                thread.join(0.0005)  # it has not asked yet, or has its answer
            elif not self.turn():
                raise AssertionError("the worker rests, and somebody waits for it")
        if errors:
            raise errors[0]
        return results[0]

    def give_up(self) -> None:
        """What the watchdog does about a step that does not end. During a step."""
        self.runner.watch.is_abandoned = True
        self.worker._quarantine(self.runner)

    def checks(self) -> None:
        """Between two turns the books are right, whatever happened."""
        runner = self.runner
        if self.worker._finished.is_set():
            return  # the context is freed
        pool, roster, context = runner.pool, runner.roster, self.context
        held = [sequence.cells for sequence in context._sequences]
        for live in pool.all:
            sequence = context._sequences[live.seq]
            assert not sequence.must_drop
            assert len(sequence) == live.length, f"sequence {live.seq}"
            if live.request is not None:
                assert live.request.live is live
                tokens = live.request.tokens[: 4 * live.length]
                assert _tokens_in(context, live.seq) == tokens, f"sequence {live.seq}"
            if live.session is not None:
                assert live.session.live is live
        if pool.ledger.is_pooled:
            cells = set().union(*held)
            assert pool.ledger.used == len(cells)
            assert context._pools[0].n_free == context.n_ctx - len(cells)
            for live in pool.all:
                others = set().union(*(h for seq, h in enumerate(held) if seq != live.seq))
                assert pool.ledger.exclusive({live.seq}) == len(set(held[live.seq]) - others)
        assert len(set(map(id, (*roster.active, *roster.waiting)))) == len(roster.active) + len(
            roster.waiting
        )
        for request in roster.active:
            assert request.live in pool.all
            assert request.phase.name not in {"QUEUED", "ENDED"}
            assert request.live is not None
            assert request.live.request is request
            assert request.is_answered == (request.phase.name == "CLOSING")
            leader, seen = request.leader, [request]
            while leader is not None and leader.phase.name == "FOLLOWING":
                assert leader not in seen, "they wait for each other"
                seen.append(leader)
                leader = leader.leader
            if request.phase.name == "FOLLOWING":
                assert request.leader in roster.active
        for request in roster.waiting:
            assert request.phase.name == "QUEUED"
            assert request.live is None
            assert not request.is_answered


class Faults:
    """What goes wrong next, in place of a stub's plan."""

    def __init__(self) -> None:
        self.gate: Any = self
        self.hang_deaf = False
        self.in_step: Callable[[], None] | None = None
        """Called in the next step, once."""
        self.fail_step = False
        self.fail_export = False
        self.fail_import = False

    def wake(self) -> None:
        """A step that hangs would look whether it was aborted."""

    def next_step(self) -> Fault:
        call, self.in_step = self.in_step, None
        if call is not None:
            call()
        fails, self.fail_step = self.fail_step, False
        return Fault(0, fails=fails)

    def next_export(self) -> Fault:
        fails, self.fail_export = self.fail_export, False
        return Fault(0, fails=fails)

    def next_import(self) -> Fault:
        fails, self.fail_import = self.fail_import, False
        return Fault(0, fails=fails)


def _tokens_in(context: StubContext, seq: int) -> bytes:
    """The tokens that the cells of a sequence name."""
    sequence = context._sequences[seq]
    size = context._cell_bytes
    data = sequence.read(0, len(sequence))
    return b"".join(data[at : at + 4] for at in range(0, len(data), size))

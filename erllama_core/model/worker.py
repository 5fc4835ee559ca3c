"""A loaded model's worker, as other threads see it: requests go in, and nobody waits for it.

The work is done by a :class:`~.runner.Runner` on a thread of its own. A runner whose native
call does not come back is given up, and so is one whose context cannot be used any more; another
one takes over on a new context.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

import attrs

from erllama_core import results
from erllama_core.cache.budget import Hold
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import (
    DecodeTimeout,
    EngineClosed,
    ModelLoadError,
    NotSupported,
    SeqCapacity,
)
from erllama_core.interfaces.backend import BackendModel, Context, KVClass
from erllama_core.interfaces.log import get_logger, log_unexpected
from erllama_core.model.adapters import Adapters, AdapterTable, Withdrawal
from erllama_core.model.endings import as_erllama_error, close_sampler
from erllama_core.model.explain import Finding, examine
from erllama_core.model.footprint import Footprint
from erllama_core.model.request import Phase, Request
from erllama_core.model.runner import Runner
from erllama_core.model.session import SessionTable
from erllama_core.model.watch import Abandoned
from erllama_core.prompt import Prompt
from erllama_core.results import CacheHit

log = get_logger("erllama.model")


@attrs.frozen(kw_only=True)
class WorkerOptions:
    """How a worker runs a model's requests."""

    policy: SavePolicy
    decode_budget_ms: int = 30_000
    """A step that takes longer is aborted; one that is not over after as long again is given up,
    with its context. 0: neither."""
    resident_cells_max: int | None = None
    """Cells that idle sequences without a session may hold."""


class Worker:
    """Runs one model's requests. Thread-safe.

    ``open_space`` is called on the worker's thread once the context is open, since only the
    open context says what KV class it has and what makes its state incompatible.
    """

    def __init__(
        self,
        name: str,
        model: BackendModel,
        open_space: Callable[[Context], ModelSpace],
        options: WorkerOptions,
        adapters: Adapters = (),
        memory: Footprint | None = None,
    ) -> None:
        self.name: Final = name
        self._model: Final = model
        self._open_space: Final = open_space
        self._options = options
        self._lock: Final = threading.Lock()
        self._accepts = True
        self._sessions: Final = SessionTable()
        self._adapters: Final = AdapterTable(model, adapters)
        self._memory: Final = memory
        """What is set aside for the model; None without a budget."""
        self._lost_memory: Final[dict[Runner, Hold]] = {}
        """Of contexts that were given up and are not freed."""
        self._unfinished: Final[set[Request]] = set()
        self._asking: Final[set[threading.Event]] = set()
        """What callers wait for who had the worker do something."""
        self._runners: Final[set[Runner]] = set()
        """Those whose context is not freed."""
        self._runner = self._new_runner()
        self._thread: threading.Thread | None = None
        """The one that serves; None before the first does."""
        self._open_error: Exception | None = None
        self._opened: Final = threading.Event()
        self._finished: Final = threading.Event()
        """No runner is left but such as were given up."""
        self._closed: Final = threading.Event()
        self._watchdog: threading.Thread | None = None
        self._preempted_before = 0
        """Requests that runners preempted that are no more."""
        self.quarantined = 0
        """Contexts that were given up because a native call in them did not come back."""
        self.last_used_s = time.monotonic()
        """When a request came or ended last, on the monotonic clock."""

    # ------------------------------------------------------------------ life

    def start(self) -> Context:
        """Open the context; blocks until it is. Raises what the backend raised.

        The context is returned for its properties; only the worker may call its methods. From
        here on the worker owns the model, and frees it when it is closed or failed to open.
        """
        self._launch(self._runner)
        self._opened.wait()
        if self._open_error is not None:
            self.close()
            raise self._open_error
        if self._options.decode_budget_ms:
            self._watchdog = threading.Thread(
                target=self._watch, name=f"erllama-watchdog-{self.name}", daemon=True
            )
            self._watchdog.start()
        return self._runner.context

    def close(self) -> None:
        """Answer every request with EngineClosed, free context and weights, end the threads.

        What running requests have computed is saved first. Idempotent.
        """
        with self._lock:
            self._accepts = False
            self._runner.inbox.post(Runner.stop)
            serving = self._thread
        if serving is None or serving is threading.current_thread():
            return
        self._finished.wait()
        with self._lock:
            last = self._thread
        assert last is not None
        last.join()
        self._closed.set()
        if self._watchdog is not None:
            self._watchdog.join()

    # -------------------------------------------------------------- requests

    def submit(self, request: Request, goes_on_from: bytes | None = None) -> None:
        """Queue a request. Raises EngineClosed, SeqCapacity, StickyBusy.

        ``goes_on_from``: see :meth:`SessionTable.begin`.
        """
        # Reading the text of a long prompt takes a while, so the caller's thread does it.
        request.keys = self.space.keys(request.tokens, request.options.cache_salt)
        if request.keys.text is not None:
            request.keys.text.catch_up()
        with self._lock:
            self._check_accepts()
            if request.options.on_full == "error":
                self._check_capacity()
            if request.options.session_id is not None:
                request.session = self._sessions.begin(
                    request.options.session_id, request, goes_on_from
                )
            self._unfinished.add(request)
            self.last_used_s = time.monotonic()
            self._runner.inbox.post(lambda runner: runner.roster.enter(request))

    def _check_accepts(self) -> None:
        if not self._accepts:
            raise EngineClosed(f"model {self.name!r} is closed")

    def _check_capacity(self) -> None:
        running = sum(not request.is_answered for request in self._unfinished)
        n_seq_max = self._runner.context.n_seq_max
        if running >= n_seq_max:
            raise SeqCapacity(
                f"model {self.name!r} runs {n_seq_max} requests at a time, and has as many; try "
                f"again, wait with on_full='block', or load it with a larger n_seq_max"
            )

    def _ended(self, request: Request) -> None:
        """A request is over. On the worker's thread."""
        with self._lock:
            self._unfinished.discard(request)
            self.last_used_s = time.monotonic()

    def cancel(self, request: Request) -> None:
        """End a request at its next token; nothing happens when it has ended.

        A step over prompts that nobody waits for any more is aborted.
        """
        if request.cancelled or request.is_answered:
            return
        request.cancelled = True
        runner = self._runner
        runner.inbox.post(_nothing)
        batch = runner.watch.batch
        # A step of replies alone is over in no time, and its tokens are worth keeping.
        prompts = any(one.phase is Phase.PREFILLING for one in batch)
        if prompts and all(one.cancelled for one in batch):
            runner.context.abort()

    def cancel_id(self, request_id: int) -> bool:
        """:meth:`cancel` the request of that id; False when none runs or waits."""
        with self._lock:
            running = (r for r in self._unfinished if not r.is_answered)
            found = next((r for r in running if r.id == request_id), None)
        if found is not None:
            self.cancel(found)
        return found is not None

    # --------------------------------------------------------------- sessions

    def transcript(self, session_id: Hashable, expected: bytes | None) -> tuple[bytes, str | None]:
        """See :meth:`SessionTable.transcript`."""
        with self._lock:
            self._check_accepts()
        return self._sessions.transcript(session_id, expected)

    def end_session(self, session_id: Hashable) -> None:
        """Forget a session; its sequence is free for others. Idempotent, unknown is a no-op."""
        session = self._sessions.remove(session_id)
        if session is not None:
            self._runner.inbox.post(lambda runner: runner.end_session(session))

    def reset_session(self, session_id: Hashable) -> bool:
        """Forget a session and what it computed, its running request included.

        That one ends with EngineReset. Returns when it has; False for an unknown id.
        """
        session = self._sessions.remove(session_id)
        if session is None:
            return False

        def reset(runner: Runner, done: threading.Event) -> None:
            runner.reset_session(session)
            done.set()

        self._ask(reset)
        return True

    # --------------------------------------------------------------- adapters

    @property
    def adapters(self) -> Adapters:
        """Those in effect. Waits for nobody."""
        return self._adapters.current

    def change_adapters(
        self,
        apply: Callable[[Adapters], Adapters],
        timeout_s: float | None = None,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        """Have other adapters from now on: requests that run end first, and others wait.

        ``apply`` makes the new ones from those there are, and changes nothing else. Raises what
        it raises, AdapterTimeout, what attaching them raises, EngineClosed.
        """
        if threading.current_thread() is self._thread:
            raise NotSupported("a stream processor cannot change adapters: its own request runs")
        if withdrawal is not None:
            withdrawal.check()
        with self._lock:
            self._check_accepts()
            change = self._adapters.ask(apply)
            self._runner.inbox.post(_nothing)

        def withdrawn() -> None:  # whom it held up is let in
            self._runner.inbox.post(_nothing)

        def recall() -> None:
            if self._adapters.recall(change):
                withdrawn()

        if withdrawal is not None:
            withdrawal.arm(recall)
        self._adapters.wait(change, timeout_s, withdrawn)

    # ------------------------------------------------------------------ state

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until every answered request has handed over its state to be saved.

        False when time ran out. A closed worker is settled.
        """
        return self._ask(Runner.wait_settled, timeout_s)

    def save_live(self) -> bool:
        """Save what running requests have computed, with the reason ``evict``; they go on.

        For sequences that are about to lose their cells, or memory that is about to. Returns
        when it is written; False when that took longer than ``evict_save_timeout_ms``, or
        the worker is closed, which saves by itself.
        """
        timeout_s = self._options.policy.evict_save_timeout_ms / 1000
        deadline = time.monotonic() + timeout_s
        saved = False

        def save(runner: Runner, done: threading.Event) -> None:
            nonlocal saved
            runner.save_live()
            saved = True
            done.set()

        self._ask(save, timeout_s)
        return saved and self.space.wait_written(max(0.0, deadline - time.monotonic()))

    def set_policy(self, policy: SavePolicy) -> None:
        """Go by another policy, from the next tick on.

        What of it makes state incompatible, or decides which tiers get it, must be as it was.
        """
        with self._lock:
            self._options = attrs.evolve(self._options, policy=policy)
            self._runner.inbox.post(lambda runner: runner.set_policy(policy))

    def drop_residents(self, timeout_s: float = 0.0, *, save: bool = True) -> int:
        """Have idle sequences give back their cells; with ``save`` their state is saved first.

        How many did within ``timeout_s``: a worker that is in the middle of a step, or closed,
        gives 0, and drops them later.
        """
        dropped = 0

        def drop(runner: Runner, done: threading.Event) -> None:
            nonlocal dropped
            dropped = runner.pool.drop_all_idle(save=save)
            done.set()

        self._ask(drop, timeout_s)
        return dropped

    def stop_if_idle(self) -> bool:
        """Take no more requests, if none runs or waits; False, and nothing changed, if one does.

        To be closed then.
        """
        with self._lock:
            if self._unfinished or not self._accepts:
                return False
            self._accepts = False
            return True

    def _ask(
        self, act: Callable[[Runner, threading.Event], None], timeout_s: float | None = None
    ) -> bool:
        """Have the runner do something and wait until it sets the event; False: time ran out.

        True also when there is nobody who could do it: a closed worker has nothing left to do.
        """
        done = threading.Event()

        def do(runner: Runner) -> None:
            try:
                act(runner, done)
            except BaseException:
                done.set()
                raise

        with self._lock:
            if self._finished.is_set():
                return True
            self._asking.add(done)
            self._runner.inbox.post(do)
        try:
            return done.wait(timeout_s)
        finally:
            with self._lock:
                self._asking.discard(done)

    # ------------------------------------------------------------ observation

    @property
    def status(self) -> results.Phase:
        """What it is doing, as seen without waiting for it."""
        return self._runner.status

    @property
    def available_seqs(self) -> int:
        """Sequences that no request has now."""
        return self._runner.pool.n_idle

    @property
    def pinned_idle_seqs(self) -> int:
        """Of these, the ones that hold a session's context."""
        return self._runner.pool.n_pinned_idle

    @property
    def pending_len(self) -> int:
        """Requests that wait for a sequence."""
        with self._lock:
            return sum(request.phase is Phase.QUEUED for request in self._unfinished)

    @property
    def queue_depth(self) -> int:
        """Streams that have not ended."""
        with self._lock:
            return sum(r.is_streamed and not r.is_answered for r in self._unfinished)

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second of prompts, and of all replies together; 0.0 until measured."""
        pace = self._runner.stepper.pace
        return pace.prefill_tokens_per_s, pace.decode_tokens_per_s

    @property
    def preemptions(self) -> int:
        """Requests that lost their cells to others for a while."""
        return self._preempted_before + self._runner.stepper.preemptions

    def examine(self, prompt: Prompt, salt: str | None) -> tuple[Finding, KVClass]:
        """What is stored of a prompt now. Computes nothing, and waits for nobody."""
        space = self.space
        keys = space.keys(bytearray(prompt.packed), salt)
        match = space.find(keys, may_sample=True)
        other = space.respell(keys, match) if prompt.text is not None else None
        if other is not None:
            keys = space.keys(bytearray(other), salt)
            match = space.find(keys, may_sample=True)
        finding = examine(space, keys, match, respelt=other is not None)
        gate = space.judge(match, len(keys))
        return attrs.evolve(finding, gate=gate), space.kv_class

    def shortfall(self, prompt_tokens: int) -> str | None:
        """What of a prompt would be saved late or not at all, and why. Waits for nobody."""
        return self._runner.saver.shortfall(prompt_tokens, prompt_tokens)

    @property
    def last_hit(self) -> CacheHit | None:
        """What the last admitted request found."""
        return self._runner.last_hit

    @property
    def space(self) -> ModelSpace:
        """The model's part of the cache; for what is thread-safe in it."""
        return self._runner.space

    # ------------------------------------------------------------- the threads

    def _new_runner(self) -> Runner:
        runner = Runner(
            self.name,
            self._model,
            self._options.policy,
            self._sessions,
            adapters=self._adapters,
            resident_cells_max=self._options.resident_cells_max,
            ended=self._ended,
        )
        self._runners.add(runner)
        return runner

    def _launch(self, runner: Runner) -> None:
        """Have a runner live on a thread of its own."""
        threading.Thread(
            target=self._live, args=(runner,), name=f"erllama-worker-{self.name}", daemon=True
        ).start()

    def _live(self, runner: Runner) -> None:
        """A runner's life, and that of whoever takes over from it on this thread."""
        one: Runner | None = runner
        while one is not None:
            heir = self._serve(one) if self._open(one) else None
            self._free(one, heir)
            one = heir

    def _open(self, runner: Runner) -> bool:
        """Whether it could be; requests are this runner's then."""
        try:
            runner.open(self._open_space)
        except BaseException as error:  # noqa: BLE001 - handed to the loading thread
            reason = ModelLoadError(f"model {self.name!r} has no context", reason=repr(error))
            self._open_error = error if isinstance(error, Exception) else reason
            self._give_up(reason)
            return False
        with self._lock:
            before, self._runner = self._runner, runner
            self._thread = threading.current_thread()
            if before is not runner:
                self._preempted_before += before.stepper.preemptions
                before.roster.hand_over_to(runner.roster)
                before.inbox.bequeath(runner.inbox)
            if not self._accepts:
                runner.inbox.post(Runner.stop)
            runner.inbox.post(_nothing)  # so that it looks at what it was left
        self._opened.set()
        return True

    def _serve(self, runner: Runner) -> Runner | None:
        """Serve until stopped; who goes on, on a new context, when this one cannot be used."""
        try:
            runner.serve()
        except Abandoned:
            log.warning("context.came_back", model=self.name)
            return None
        except BaseException as error:  # noqa: BLE001 - what went beyond one request
            return self._heir_after(runner, error)
        with self._lock:
            self._accepts = False
        try:
            runner.shut_down()
        except BaseException as error:  # noqa: BLE001 - a backend's own code
            log_unexpected(log, "worker.not_shut_down", error, model=self.name)
        return None

    def _heir_after(self, runner: Runner, error: BaseException) -> Runner | None:
        """Who serves those that wait, after a runner has failed; None when nobody can."""
        log_unexpected(log, "context.lost", error, model=self.name)
        failure = as_erllama_error(error, f"the worker of model {self.name!r} failed")
        runner.lose(failure)
        with self._lock:
            # One that failed before it had computed anything would only fail again.
            if self._accepts and runner.watch.count:
                return self._new_runner()
        self._give_up(failure)
        return None

    def _free(self, runner: Runner, heir: Runner | None) -> None:
        """The context first, then the weights under it, when no other stands on them."""
        try:
            runner.close_context()
        except BaseException as error:  # noqa: BLE001 - a backend's own code
            log_unexpected(log, "model.not_freed", error, model=self.name)
        with self._lock:
            self._runners.discard(runner)
            lost_memory = self._lost_memory.pop(runner, None)
            last = not self._runners and not self._accepts
        if lost_memory is not None:
            lost_memory.release()
        if last:
            self._adapters.close()
            try:
                self._model.close()
            except BaseException as error:  # noqa: BLE001 - a backend's own code
                log_unexpected(log, "model.not_freed", error, model=self.name)
            if self._memory is not None:
                self._memory.release()
        if heir is None and not runner.watch.is_abandoned:
            self._finish()

    def _give_up(self, error: Exception) -> None:
        """Nothing can be served any more."""
        with self._lock:
            self._accepts = False
            left = list(self._unfinished)
        for request in left:
            self._answer_lost(request, error)

    def _finish(self) -> None:
        """Nobody is left to do anything: whoever still waits is told."""
        with self._lock:
            self._thread = threading.current_thread()
            self._accepts = False
            left = list(self._unfinished)
        error = EngineClosed(f"model {self.name!r} was closed before the request ended")
        for request in left:
            self._answer_lost(request, error)
        self._adapters.fail_all(error)
        with self._lock:
            self._finished.set()
            for asking in self._asking:
                asking.set()
        self._opened.set()

    def _answer_lost(self, request: Request, error: Exception) -> None:
        """No runner has the request any more."""
        request.phase = Phase.ENDED
        if not request.is_answered:
            self._sessions.answered(request, None)
            request.fail(error)
        close_sampler(request)
        self._ended(request)

    # ---------------------------------------------------------------- watchdog

    def _watch(self) -> None:
        budget_s = self._options.decode_budget_ms / 1000
        while not self._closed.wait(min(1.0, budget_s / 4)):
            runner = self._runner
            try:
                given_up = runner.watch.check(budget_s, runner.context.abort)
            except Exception as error:  # noqa: BLE001 - a backend's own code
                log_unexpected(log, "step.not_aborted", error, model=self.name)
            else:
                if given_up:
                    self._quarantine(runner)

    def _quarantine(self, runner: Runner) -> None:
        """A native call does not come back: leave it, its context and its thread behind.

        Those whose tokens it computes are told; those who wait are served by another runner.
        """
        self.quarantined += 1
        requests = [request.id for request in list(runner.roster.active)]
        log.error("context.quarantined", model=self.name, requests=requests)
        error = DecodeTimeout(
            "a step did not end, not even when it was aborted; the model goes on with a new context"
        )
        runner.lose(error)
        with self._lock:
            heir = self._new_runner()
        if self._memory is not None:
            lost = self._memory.hold_lost_context()
            with self._lock:
                is_held = runner in self._runners
                if is_held:
                    self._lost_memory[runner] = lost
            if not is_held:  # it came back meanwhile, and was freed
                lost.release()
        self._launch(heir)


def _nothing(_: Runner) -> None:
    """Wakes the worker."""

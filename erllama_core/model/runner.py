"""The thread that alone touches a model's context: one batch a tick, for all its requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from erllama_core import results
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import EngineClosed, EngineReset
from erllama_core.interfaces.backend import BackendModel, Context
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger, log_unexpected
from erllama_core.model.adapters import AdapterTable, Barrier
from erllama_core.model.admission import Admission
from erllama_core.model.endings import Endings
from erllama_core.model.inbox import Inbox
from erllama_core.model.request import Phase, Request
from erllama_core.model.restorer import Restorer
from erllama_core.model.roster import Roster
from erllama_core.model.saver import Saver
from erllama_core.model.sequences import SequencePool
from erllama_core.model.session import Session, SessionTable
from erllama_core.model.stepper import Stepper
from erllama_core.model.tick import TickComposer
from erllama_core.model.watch import StepWatch
from erllama_core.results import CacheHit

log = get_logger("erllama.model")

_LAST_READS_S: Final = 10.0
"""How long closing waits for a tier that does not answer."""


class Runner:
    """Has requests admitted, restored, computed, saved and ended, tick by tick.

    One thread runs :meth:`open`, then :meth:`serve`, which is :meth:`turn` over and over, then
    :meth:`shut_down`. What is to be posted is for other threads to put into the ``inbox``;
    whatever else they may call says so.
    """

    def __init__(
        self,
        name: str,
        model: BackendModel,
        policy: SavePolicy,
        sessions: SessionTable,
        *,
        adapters: AdapterTable,
        resident_cells_max: int | None,
        ended: Callable[[Request], None],
    ) -> None:
        self.name: Final = name
        self._model: Final = model
        self._policy = policy
        self._sessions: Final = sessions
        self._adapters: Final = adapters
        self._resident_cells_max: Final = resident_cells_max
        self._ended: Final = ended
        self.inbox: Final = Inbox()
        self.roster: Final = Roster()
        self.watch: Final = StepWatch()
        self._stopping = False
        self._may_rest = False
        """The last turn did nothing, and the next would not either without news."""
        self._settling: Final[list[tuple[threading.Event, list[Request]]]] = []
        self.context_or_none: Context | None = None
        self.context: Context
        self.space: ModelSpace
        self.saver: Saver
        self.pool: SequencePool
        self.stepper: Stepper
        self.restorer: Restorer
        self.endings: Endings
        self._barrier: Barrier
        self._admission: Admission

    # -------------------------------------------------------------- to be posted

    def stop(self) -> None:
        """End :meth:`serve`."""
        self._stopping = True

    def wait_settled(self, settled: threading.Event) -> None:
        """Set the event when every request has ended that has its answer now."""
        closing = [request for request in self.roster.active if request.phase is Phase.CLOSING]
        self._settling.append((settled, closing))

    def save_live(self) -> None:
        """Save what running requests have computed; they go on."""
        for request in self.roster.active:
            self.saver.at_end(request, None, "evict")

    def set_policy(self, policy: SavePolicy) -> None:
        """Go by another policy from the next tick on, in what the space does not know."""
        self._policy = policy
        self.saver.set_policy(policy)
        self.stepper.set_composer(self._new_composer())
        self._barrier.save_timeout_s = policy.evict_save_timeout_ms / 1000

    def end_session(self, session: Session) -> None:
        """Its sequence is like any other from now on."""
        self.pool.unpin_session(session)
        self.pool.bound_residents()

    def reset_session(self, session: Session) -> None:
        """End its request and drop its state."""
        request = session.request
        if request is not None:
            self.endings.fail(request, EngineReset(f"session {session.id!r} was reset"))
        for live in self.pool.all:
            # Of a first turn it is not pinned before its last token was computed.
            request = live.request
            if request is None or request.session is not session:
                continue
            if live.is_idle:
                self.pool.forget(live)
            elif request.phase is Phase.CLOSING:
                self.endings.release(request)

    # ------------------------------------------------------------ any thread

    @property
    def status(self) -> results.Phase:
        """What it is doing, as seen without waiting for it. Any thread."""
        phases = {request.phase for request in tuple(self.roster.active)}
        if Phase.GENERATING in phases:
            return "generating"
        busy = {Phase.LOADING, Phase.FOLLOWING, Phase.PREFILLING}
        return "prefilling" if phases & busy else "idle"

    @property
    def last_hit(self) -> CacheHit | None:
        """What the request found that began last. Any thread."""
        return self.restorer.last_hit

    def lose(self, error: Exception) -> None:
        """Answer those that run: the context is lost, and is not asked for anything.

        Those that wait go on elsewhere. Any thread, once this one's does nothing any more.
        """
        self.endings.fail_all(error)
        self._let_settled()

    # ------------------------------------------------------------- the thread

    def open(self, open_space: Callable[[Context], ModelSpace]) -> None:
        """Open the context and what works on it. Raises what the backend raises."""
        context = self.context_or_none = self._model.open_context()
        vocabulary = self._model.vocabulary
        self.context = context
        self.space = open_space(context)
        self.saver = Saver(context, self.space, self._policy)
        self.pool = SequencePool(context, self.saver.before_loss, self._resident_cells_max)
        self.endings = Endings(
            vocabulary,
            self.space,
            self.saver,
            self.pool,
            self.roster,
            self._sessions,
            hand_over=lambda request: self.restorer.hand_over(request),  # noqa: PLW0108 - made below
            ended=self._ended,
        )
        self.restorer = Restorer(
            context,
            self.space,
            self.pool,
            vocabulary.n_tokens,
            post=self._post,
            guard=self.endings.guard,
            running=lambda: tuple(self.roster.active),
            respell=self._respell,
            ready=lambda *found: self.stepper.restored(*found),  # noqa: PLW0108
        )
        self.stepper = Stepper(
            context,
            vocabulary,
            self.space,
            self.saver,
            self.pool,
            self.roster,
            self.restorer,
            self.endings,
            self._new_composer(),
            self.watch,
        )
        self._barrier = Barrier(
            self._adapters,
            context,
            self.space,
            self.pool,
            self.roster,
            self.watch,
            save_timeout_s=self._policy.evict_save_timeout_ms / 1000,
        )
        self._barrier.open()
        self._admission = Admission(
            self.pool,
            self.roster,
            may_begin=self._barrier.may_begin,
            guard=self.endings.guard,
            start=self.restorer.start,
        )

    def _new_composer(self) -> TickComposer:
        policy = self._policy
        return TickComposer(self.context.n_batch, policy.prefill_chunk_size, policy.stall_target_ms)

    def close_context(self) -> None:
        """Free the context, if it was opened."""
        if self.context_or_none is not None:
            self.context_or_none.close()

    def serve(self) -> None:
        """Run requests until stopped. Raises Abandoned, and what goes beyond one request."""
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """Take what is in the inbox, waiting for it while there is nothing to do, and do a tick."""
        self._receive()
        self.endings.end_cancelled()
        self.endings.end_overdue()
        self.restorer.settle_followers()
        computed = self.stepper.step()
        # After whatever sets sequences free, so that nobody waits for news.
        self._barrier.proceed()
        admitted = self._admission.admit()
        self._let_settled()
        self._may_rest = not (computed or admitted)

    @property
    def has_work(self) -> bool:
        """Whether a turn would not wait for anything. Of the thread that makes the turns."""
        return self._stopping or not (self._may_rest and self.inbox.is_empty)

    def _receive(self) -> None:
        """Take everything from the inbox; wait for something while there is nothing to do."""
        message = self.inbox.take(self._patience()) if self._may_rest else self.inbox.take_now()
        # Importing state is what takes long here, and replies are waiting for their next token.
        until = time.perf_counter() + self._policy.stall_target_ms / 1000
        while message is not None:
            message(self)
            if self.status == "generating" and time.perf_counter() >= until:
                return
            message = self.inbox.take_now()

    def _patience(self) -> float | None:
        """Seconds until a request that waits has run out of time."""
        everybody = (*self.roster.active, *self.roster.waiting)
        deadlines = [request.deadline for request in everybody if request.deadline is not None]
        return max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None

    def _let_settled(self) -> None:
        """Tell those who wait that every request that was being closed then has ended."""
        if not self._settling:
            return
        for settled, closing in self._settling:
            if all(request.phase is Phase.ENDED for request in closing):
                settled.set()
        self._settling[:] = [item for item in self._settling if not item[0].is_set()]

    def _post(self, request: Request, act: Callable[[Request], None]) -> None:
        """Do something for a request, on the worker; from any thread."""
        self.inbox.post(lambda _: self.endings.guard(request, act))

    def _respell(self, request: Request, tokens: bytes) -> bool:
        """Have a request go on with other tokens of its text, if it may."""
        needed = request.max_tokens_after(len(tokens) // TOKEN_BYTES)
        if needed is None or request.generated:
            return False
        sampler = None
        if request.options.repetition_penalty != 1.0:  # else the prompt's tokens are no use to it
            sampler = request.new_sampler(tokens)
        keys = self.space.keys(request.tokens, request.options.cache_salt)
        before = bytes(request.tokens[: request.computed * TOKEN_BYTES])
        request.respell(tokens, keys, sampler)
        if not tokens.startswith(before):
            self.restorer.empty(request)
        return True

    # ---------------------------------------------------------------- the end of it

    def shut_down(self) -> None:
        """Answer everybody, then save what there is. Who submits from now on is told at once."""
        self._adapters.fail_all(EngineClosed(f"model {self.name!r} was closed"))
        self._drain(lambda: not self.inbox.is_empty)
        error = EngineClosed(f"model {self.name!r} was closed before the request ended")
        ran = self.endings.close_all(error)
        self._let_settled()
        for request in ran:
            self.saver.at_end(request, None, "shutdown")
        # Of those that ended before, what found no room on its way to the tiers then.
        residents = [live.request for live in self.pool.residents() if live.request is not None]
        late = [self.saver.before_loss(request, "shutdown") for request in residents]
        timeout_s = self._policy.evict_save_timeout_ms / 1000
        if (ran or any(late)) and not self.space.wait_written(timeout_s):
            log.warning("save.late", model=self.name)
        # Reads that are under way hold pages, which their requests will no longer take.
        self._drain(lambda: self.restorer.outstanding > 0)

    def _drain(self, more: Callable[[], bool]) -> None:
        while more():
            message = self.inbox.take(_LAST_READS_S)
            if message is None:
                log.warning("worker.reads_abandoned", model=self.name)
                return
            try:
                message(self)
            except Exception as error:  # noqa: BLE001 - the others are still to be done
                log_unexpected(log, "worker.message_failed", error, model=self.name)

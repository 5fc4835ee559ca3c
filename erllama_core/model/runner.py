"""The thread that alone touches a model's context: one batch a tick, for all its requests."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core import results
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import (
    DecodeAborted,
    DecodeTimeout,
    EngineClosed,
    EngineReset,
    ErllamaError,
    PluginFailed,
    TimeoutExceeded,
)
from erllama_core.interfaces.backend import BackendModel, Context, Mark, Row
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger
from erllama_core.model.explain import explain
from erllama_core.model.logprobs import FindLogprob, marked_logprob, row_logprob
from erllama_core.model.request import Phase, Request
from erllama_core.model.restorer import Restorer
from erllama_core.model.saver import Saver
from erllama_core.model.sequences import LiveSequence, SequencePool
from erllama_core.model.session import Session, SessionTable
from erllama_core.model.tick import Pace, TickComposer
from erllama_core.results import CacheHit, CacheKey, FinishReason

log = get_logger("erllama.model")

_LAST_READS_S: Final = 10.0
"""How long closing waits for a tier that does not answer."""
_HEADROOM: Final = 64
"""Cells of its reply that must be free for a request to be let in. What it needs beyond them is
taken from residents, or from requests that came later."""

_UNFINISHED: Final = frozenset({Phase.PREFILLING, Phase.GENERATING, Phase.CLOSING})
"""Phases in which there is something to compute."""


class Abandoned(Exception):
    """A native call came back after its runner was given up."""


class Runner:
    """Admits requests to sequences, computes them, and saves what they leave behind.

    One thread runs :meth:`open`, then :meth:`serve`, then :meth:`shut_down`; what other threads
    may call says so.
    """

    def __init__(
        self,
        name: str,
        model: BackendModel,
        policy: SavePolicy,
        sessions: SessionTable,
        *,
        resident_cells_max: int | None,
        ended: Callable[[Request], None],
    ) -> None:
        self.name: Final = name
        self._model: Final = model
        self._policy: Final = policy
        self._sessions: Final = sessions
        self._resident_cells_max: Final = resident_cells_max
        self._ended: Final = ended
        self._inbox: Final[queue.SimpleQueue[Callable[[], None]]] = queue.SimpleQueue()
        self._stopping = False
        self._orders: Final = itertools.count(1)
        self.abandoned = False
        self.waiting: Final[deque[Request]] = deque()
        self.active: Final[list[Request]] = []
        self.batch: tuple[Request, ...] = ()
        """Those whose rows are being computed."""
        self.step_began: float | None = None
        """Since when, by ``time.monotonic``; None while nothing is."""
        self.step_number = 0
        self.over_budget = False
        """The step that runs was aborted because it took too long."""
        self.preemptions = 0
        self.pace: Final = Pace()
        self._settling: Final[list[tuple[threading.Event, list[Request]]]] = []
        self._last_hit: CacheHit | None = None
        self.context_or_none: Context | None = None
        self.context: Context
        self.space: ModelSpace
        self.saver: Saver
        self.pool: SequencePool
        self._restorer: Restorer
        self._composer: TickComposer

    # ----------------------------------------------------- from other threads

    def post(self, message: Callable[[], None]) -> None:
        """Have something done between two ticks. Any thread."""
        self._inbox.put(message)

    def hand_messages_to(self, other: Runner) -> None:
        """Another runner does what this one was asked to. Any thread, once this is abandoned."""
        while True:
            try:
                other.post(self._inbox.get_nowait())
            except queue.Empty:
                return

    def stop(self) -> None:
        """End :meth:`serve`. To be posted."""
        self._stopping = True

    def wait_settled(self, settled: threading.Event) -> None:
        """Set the event when every request has ended that has its answer now. To be posted."""
        closing = [request for request in self.active if request.phase is Phase.CLOSING]
        self._settling.append((settled, closing))

    def save_live(self) -> None:
        """Save what running requests have computed; they go on. To be posted."""
        for request in self.active:
            if request.phase in _UNFINISHED:
                self.saver.at_end(request, None, "evict")

    def end_session(self, session: Session) -> None:
        """Its sequence is like any other from now on. To be posted."""
        if session.live is not None:
            self.pool.unpin(session.live)
            self._bound_residents()

    def reset_session(self, session: Session, done: Callable[[], None]) -> None:
        """End its request and drop its state. To be posted."""
        request = session.request
        if request is not None and request.phase is not Phase.ENDED:
            self._fail(request, EngineReset(f"session {session.id!r} was reset"))
        live = session.live
        if live is not None and live.is_idle:
            self.pool.forget(live)
        elif live is not None and live.request is not None:
            self._release(live.request)  # answered, its last token still to be computed
        done()

    @property
    def status(self) -> results.Phase:
        """What it is doing, as seen without waiting for it. Any thread."""
        phases = {request.phase for request in tuple(self.active)}
        if Phase.GENERATING in phases:
            return "generating"
        busy = {Phase.LOADING, Phase.FOLLOWING, Phase.PREFILLING}
        return "prefilling" if phases & busy else "idle"

    @property
    def last_hit(self) -> CacheHit | None:
        """What the request admitted last found. Any thread."""
        return self._last_hit

    # ------------------------------------------------------------- the thread

    def open(self, open_space: Callable[[Context], ModelSpace]) -> None:
        """Open the context and what works on it. Raises what the backend raises."""
        context = self.context_or_none = self._model.open_context()
        self.context = context
        self.space = open_space(context)
        self.saver = Saver(context, self.space, self._policy)
        self.pool = SequencePool(context, self.saver.before_loss)
        self._restorer = Restorer(
            context,
            self.space,
            self.pool,
            self._model.vocabulary.n_tokens,
            post=self._post,
            running=lambda: tuple(self.active),
            respell=self._respell,
            ready=self._restored,
        )
        self._composer = TickComposer(
            context.n_batch, self._policy.prefill_chunk_size, self._policy.stall_target_ms
        )

    def close_context(self) -> None:
        """Free the context, if it was opened."""
        if self.context_or_none is not None:
            self.context_or_none.close()

    def serve(self) -> None:
        """Run requests until stopped. Raises Abandoned."""
        while not self._stopping:
            self._receive()
            self._end_cancelled()
            self._end_overdue()
            self._tick()
            self._restorer.settle_followers()
            self._admit()  # after whatever sets sequences free, so that nobody waits for news
            if self._settling:
                self._let_settled()

    def _receive(self) -> None:
        """Take everything from the inbox; wait for something while there is nothing to do."""
        if not any(request.phase in _UNFINISHED for request in self.active):
            try:
                self._inbox.get(timeout=self._patience())()
            except queue.Empty:
                return
        # Importing state is what takes long here, and replies are waiting for their next token.
        until = time.perf_counter() + self._policy.stall_target_ms / 1000
        while self.status != "generating" or time.perf_counter() < until:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message()

    def _patience(self) -> float | None:
        """Seconds until a request that waits has run out of time."""
        deadlines = [r.deadline for r in (*self.active, *self.waiting) if r.deadline is not None]
        return max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None

    def _let_settled(self) -> None:
        """Tell those who wait that every request that was being closed then has ended."""
        for settled, closing in self._settling:
            if all(request.phase is Phase.ENDED for request in closing):
                settled.set()
        self._settling[:] = [item for item in self._settling if not item[0].is_set()]

    def _post(self, request: Request, act: Callable[[Request], None]) -> None:
        """Do something for a request, on the worker; from any thread."""
        self._inbox.put(lambda: self._guard(request, act))

    def shut_down(self) -> None:
        """Answer everybody, then save what there is. Who submits from now on is told at once."""
        self._drain(lambda: not self._inbox.empty())
        error = EngineClosed(f"model {self.name!r} was closed before the request ended")
        requests = [*self.active, *self.waiting]
        with_state = [request for request in self.active if request.phase in _UNFINISHED]
        for request in requests:
            if request.phase is not Phase.CLOSING:
                self._sessions.answered(request, None)
                request.fail(error)
            self._end(request)
        for request in with_state:
            self.saver.at_end(request, None, "shutdown")
        if with_state and not self.space.wait_written(self._policy.evict_save_timeout_ms / 1000):
            log.warning("save.late", model=self.name)
        self.active.clear()
        self.waiting.clear()
        self._let_settled()
        # Reads that are under way hold pages, which their requests will no longer take.
        self._drain(lambda: self._restorer.outstanding > 0)

    def _drain(self, more: Callable[[], bool]) -> None:
        while more():
            try:
                message = self._inbox.get(timeout=_LAST_READS_S)
            except queue.Empty:
                log.warning("worker.reads_abandoned", model=self.name)
                return
            try:
                message()
            except Exception:
                log.exception("worker.message_failed", model=self.name)

    # -------------------------------------------------------------- admission

    def _admit(self) -> None:
        """Give sequences to waiting requests, in order, as long as the first one can have one."""
        while self.waiting:
            request = self.waiting[0]
            live = self._place_for(request)
            if live is None:
                return
            self.waiting.popleft()
            self._occupy(live, request)
            self.active.append(request)
            self._guard(request, self._restorer.start)

    def _place_for(self, request: Request) -> LiveSequence | None:
        """The sequence that a request gets now; None when it has to wait."""
        session, keys = request.session, request.keys
        assert keys is not None
        own = None if session is None else session.live
        if own is not None and not own.is_idle:
            return None  # the last token of the turn before is still being computed
        nearest, common = max(
            ((live, self.pool.common(live, keys)) for live in self.pool.all),
            key=lambda found: found[1],
        )
        if not self._has_room(request, common):
            return None
        if own is not None:
            return own
        return self.pool.claim(spare=nearest if common else None)

    def _has_room(self, request: Request, common: int) -> bool:
        """Whether there are cells for a request of which ``common`` tokens are in the context.

        Residents make room, and so do later requests, but not for this one to get in. One that
        had to give way before waits until all that it may ever need is there.
        """
        ledger = self.pool.ledger
        if not ledger.is_pooled or not self.active:
            return True
        needed = request.length - common + min(_HEADROOM, request.max_tokens - request.length)
        if request.was_preempted:
            needed = request.max_tokens - common
        for other in self.active:
            left = other.max_tokens - other.computed
            if not other.was_preempted:
                left = min(left, max(0, other.length - other.computed) + _HEADROOM)
            if other.phase is Phase.FOLLOWING:
                left -= other.follow_until
            needed += left
        return needed <= ledger.free + self.pool.held

    def _occupy(self, live: LiveSequence, request: Request) -> None:
        """Let a request have a sequence, with as much of what is in it as is of use to it."""
        keys = request.keys
        assert keys is not None
        held, common = live.length, self.pool.common(live, keys)
        sticks = live.session is not None and live.session is request.session
        if live.is_resident and common < held:
            self.pool.save(live)
            if not common or not self.context.truncate(live.seq, common):
                common = 0
                self.context.drop(live.seq)
            self.pool.ledger.cut(live.seq, common)
        self.pool.occupy(live, request)
        request.computed = common
        request.sticks = sticks and 0 < common == held
        if not request.was_preempted:
            request.order = next(self._orders)
            request.admitted_at = time.perf_counter()

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
            self._restorer.empty(request)
        return True

    def _restored(self, request: Request, mark: Mark | None, token: int | None) -> None:
        """The sequence of a request is as far as anything but computing brings it.

        ``mark``: the logits at its end, if they were stored; ``token``: what was drawn from them.
        """
        if not request.was_preempted:
            self._last_hit = CacheHit(request.hit_kind, request.read)
        if mark is None:
            return
        if token is None:
            self._answer(request, "length")
        else:
            self._take(request, token, functools.partial(marked_logprob, mark))
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self._leave(request)  # it said nothing, and what it read is stored

    # ----------------------------------------------------------------- the end

    def _leave(self, request: Request) -> None:
        """The request is over, and its sequence is sound: it may be of use to others."""
        self._restorer.hand_over(request)
        self.active.remove(request)
        self._end(request)
        session = request.session
        if session is not None and not self._sessions.knows(session):
            session = None
        if session is not None and session.live is not None and session.live is not request.live:
            self.pool.unpin(session.live)
        self.pool.leave(request, session)
        self._bound_residents()

    def _release(self, request: Request) -> None:
        """The request is over, and nothing of its sequence is kept."""
        if request.phase is Phase.ENDED:
            return
        if request in self.active:
            self._restorer.hand_over(request)
            self.active.remove(request)
        self._end(request)
        if request.live is not None:
            self.pool.forget(request.live)

    def _end(self, request: Request) -> None:
        request.phase = Phase.ENDED
        close_sampler(request)
        self._ended(request)

    def _bound_residents(self) -> None:
        bound = self._resident_cells_max
        if bound is None and self.pool.ledger.is_pooled:
            bound = self.context.n_cells // 8
        self.pool.bound_residents(bound)

    def _end_cancelled(self) -> None:
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            self._guard(request, self._answer_cancelled)
        for request in [r for r in self.active if r.cancelled]:
            if request.phase not in {Phase.CLOSING, Phase.ENDED}:
                self._guard(request, self._answer_cancelled)

    def _answer_cancelled(self, request: Request) -> None:
        """Cancelled in the middle of a reply, it is finished like any other."""
        if request.phase is Phase.GENERATING:
            self._answer(request, "cancelled")
            return
        self._cut_short(request)
        request.finish_reply()
        self._deliver(request, request.stats("cancelled", None, self._explanation(request)))
        self._leave_or_release(request)

    def _cut_short(self, request: Request) -> None:
        """A request ends that has said nothing: its context is what was computed of it."""
        if not request.generated:
            computed = request.computed if request.phase is Phase.PREFILLING else 0
            del request.tokens[computed * TOKEN_BYTES :]
            request.keys = self.space.keys(request.tokens, request.options.cache_salt)

    def _leave_or_release(self, request: Request) -> None:
        """A request was ended before its reply: what it has computed may be of use."""
        if request.phase is Phase.PREFILLING and request.computed == request.length > 0:
            self._leave(request)
        else:
            self._release(request)

    def _end_overdue(self) -> None:
        now = time.perf_counter()
        for request in [r for r in self.waiting if r.deadline is not None and r.deadline <= now]:
            self.waiting.remove(request)
            self._guard(request, self._answer_overdue)
        for request in [r for r in self.active if r.deadline is not None and r.deadline <= now]:
            if request.phase not in {Phase.CLOSING, Phase.ENDED}:
                self._guard(request, self._answer_overdue)

    def _answer_overdue(self, request: Request) -> None:
        message = (
            f"the request did not end within {request.options.timeout_s} s: "
            f"{request.computed} of {request.length} tokens were computed, "
            f"{len(request.generated)} of them generated"
        )
        replying = request.phase is Phase.GENERATING
        if not replying:
            self._cut_short(request)
        request.finish_reply()
        key = self._finish_key(request) if replying else None
        stats = request.stats("cancelled", key, self._explanation(request))
        self._sessions.answered(request, bytes(request.tokens) or None)
        request.fail(TimeoutExceeded(message, stats=stats))
        if replying:
            request.phase = Phase.CLOSING
        else:
            self._leave_or_release(request)

    def _explanation(self, request: Request) -> results.Explanation | None:
        if request.finding is None:
            return None
        return explain(
            request.finding,
            self._model.vocabulary,
            self.space.kv_class,
            kind=request.hit_kind,
            reused_tokens=request.read,
            tiers=request.sources,
            restored_bytes=request.restored_bytes,
            restore_s=request.restore_s,
            saving=self.saver.shortfall(request.prompt_tokens, request.length, request.drops),
        )

    # ------------------------------------------------------------------- tick

    def _tick(self) -> None:
        """One batch: a token of every running reply, then parts of prompts in fair turns."""
        batch, rows = self._compose()
        if not rows:
            return
        started = time.perf_counter()
        error = self._step(batch, rows)
        seconds = time.perf_counter() - started
        if error is not None:
            self._recover(batch, error)
            return
        tokens = sum(len(row.tokens) for row in rows) // TOKEN_BYTES
        replies = sum(len(row.tokens) == TOKEN_BYTES for row in rows)
        self.pace.note(tokens - replies, replies, seconds)
        if self.space.gate is not None:
            self.space.gate.observe_step(tokens, seconds)
        ends: list[tuple[Request, int | None]] = []
        for number, (request, row) in enumerate(zip(batch, rows, strict=True)):
            count = len(row.tokens) // TOKEN_BYTES
            request.computed += count
            self.pool.ledger.grow(request.seq, count)
            ends.append((request, number if row.logits else None))
            if row.logits and request.phase is not Phase.CLOSING:
                self._guard(request, functools.partial(self._sample, row=number))
        # Tokens are on their way to the callers; now what was computed is saved.
        for request, last in ends:
            if request.phase is not Phase.ENDED:
                self._guard(request, functools.partial(self._save, row=last))

    def _compose(self) -> tuple[list[Request], list[Row]]:
        """The next batch, with cells for all of it."""
        while True:
            batch, rows = self._composer.compose(self.active, self.pace)
            needed = sum(len(row.tokens) for row in rows) // TOKEN_BYTES
            if self.pool.make_room(needed):
                return batch, rows
            victim = self._victim()
            if victim is not None:
                self._preempt(victim)
            elif any(request.phase is Phase.LOADING for request in self.active):
                return [], []  # one that holds cells will soon be where it can give them up
            else:
                return batch, rows

    def _victim(self) -> Request | None:
        """Who gives its cells to the others; never the one that came first, so that some end."""
        running = [r for r in self.active if r.phase in {Phase.PREFILLING, Phase.GENERATING}]
        first = min(self.active, key=lambda request: request.order)
        others = [request for request in running if request is not first]
        if not others:
            return None
        return max(others, key=lambda r: (self.pool.ledger.exclusive(r.seq), r.order))

    def _preempt(self, request: Request) -> None:
        """Take a request's cells; it goes on where it was when all that it needs is free."""
        log.debug("request.preempted", request=request.id, tokens=request.computed)
        self.preemptions += 1
        self.saver.at_end(request, None, "evict")
        self._restorer.hand_over(request)
        self.active.remove(request)
        assert request.live is not None
        self.pool.forget(request.live)
        request.lose_sequence()
        self.waiting.appendleft(request)

    def _step(self, batch: Sequence[Request], rows: Sequence[Row]) -> Exception | None:
        self.batch = tuple(batch)
        self.over_budget = False
        self.step_number += 1
        self.step_began = time.monotonic()
        try:
            self.context.step(rows)
        except Exception as error:  # noqa: BLE001 - a backend's own code
            return error
        finally:
            self.step_began = None
            self.batch = ()
            if self.abandoned:
                raise Abandoned
        return None

    def _recover(self, batch: Sequence[Request], error: Exception) -> None:
        """A step failed. Its callers get an answer, and what can go on goes on."""
        aborted = isinstance(error, DecodeAborted)
        if aborted and self.over_budget:
            error = DecodeTimeout(
                "a step took longer than decode_budget_ms and was aborted; give the model more "
                "time, or compute less at once (n_batch, prefill_chunk_size)"
            )
        elif not aborted:
            log.warning("step.failed", model=self.name, error=str(error))
        failure = _as_erllama_error(error, "the backend raised in a step")
        for request in batch:
            is_whole = self.context.length(request.seq) == request.computed
            if not is_whole:
                self._restorer.empty(request)
            if not aborted or self.over_budget:
                self._fail(request, failure)
            elif not is_whole:
                self._start_again(request)

    def _start_again(self, request: Request) -> None:
        """A step was aborted, for others that were cancelled, and the request lost its state."""
        if request.phase is Phase.CLOSING:
            self._release(request)
        else:
            request.saved = request.tried = 0
            self._guard(request, self._restorer.start)

    def _sample(self, request: Request, row: int) -> None:
        if not request.generates:
            self._answer(request, "length")
            return
        token = self.context.sample(row, request.sampler, greedy=request.pipeline.greedy)
        self._take(request, token, functools.partial(row_logprob, self.context, row))

    def _take(self, request: Request, token: int, find: FindLogprob) -> None:
        """A token was sampled: tell the caller, and see whether it was the last one."""
        if request.phase is Phase.PREFILLING:
            request.phase = Phase.GENERATING
            if request.first_token_at is None:
                now = time.perf_counter()
                request.first_token_at = now
                if request.computed > request.read:
                    request.prefill_s = now - request.prefill_at
        if token in self._model.vocabulary.end_of_generation:
            self._answer(request, "stop")
            return
        request.append(token)
        if request.logprobs is not None:
            request.note_logprob(find(self._model.vocabulary, token, request.options.logprobs or 0))
        for event in request.pipeline.feed(token):
            request.mailbox.put(event)
        if request.pipeline.ended:
            self._answer(request, "stop")
        elif len(request.generated) >= request.max_generated:
            self._answer(request, "length")

    def _answer(self, request: Request, reason: FinishReason) -> None:
        """Generation has ended: the caller gets the end now, the cache the rest of it next."""
        request.finish_reply()
        if reason == "length" and request.pipeline.stop_sequence is not None:
            reason = "stop"  # it was met, but a better one could have come
        stats = request.stats(reason, self._finish_key(request), self._explanation(request))
        request.phase = Phase.CLOSING
        self._deliver(request, stats)

    def _deliver(self, request: Request, stats: results.Stats) -> None:
        # The session first: its caller may be back with the next turn at once.
        self._sessions.answered(request, bytes(request.tokens) or None)
        request.finish(stats)

    def _finish_key(self, request: Request) -> CacheKey | None:
        if not self.saver.saves(request.length) or request.keys is None:
            return None
        return CacheKey(request.keys.key(request.length))

    def _save(self, request: Request, row: int | None) -> None:
        """After a step: save what is due, and let go of a request whose context is whole."""
        if request.computed <= request.prompt_tokens:
            self.saver.after_prefill(request, row)
        else:
            self.saver.after_token(request)
        if request.phase is Phase.CLOSING and request.computed == request.length:
            self.saver.at_end(request, row)
            self._leave(request)

    # ----------------------------------------------------------------- errors

    def _guard(self, request: Request, act: Callable[[Request], None]) -> None:
        """Do something for one request; what it raises ends that request and no other."""
        try:
            act(request)
        except Abandoned:
            raise
        except Exception as error:  # noqa: BLE001 - a plugin's own code
            what = f"a plugin raised while request {request.id} ran"
            self._fail(request, _as_erllama_error(error, what))

    def _fail(self, request: Request, error: Exception) -> None:
        if request.phase is Phase.ENDED:
            return
        if request.phase is not Phase.CLOSING:  # else the caller has its answer already
            self._sessions.answered(request, None)
            request.fail(error)
        if request in self.waiting:
            self.waiting.remove(request)
        self._release(request)


def close_sampler(request: Request) -> None:
    """Free a request's sampler, whatever that raises."""
    try:
        request.sampler.close()
    except Exception:
        log.exception("sampler.not_freed", request=request.id)


def _as_erllama_error(error: Exception, what: str) -> ErllamaError:
    if isinstance(error, ErllamaError):
        return error
    log.error("plugin.raised", doing=what, exc_info=error)
    failure = PluginFailed(f"{what}: {error!r}")
    failure.__cause__ = error
    return failure

"""Every way in which a request can end: whoever asked is answered, once, and nothing stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVarTuple

from erllama_core.cache.space import ModelSpace
from erllama_core.errors import ErllamaError, PluginFailed, TimeoutExceeded
from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger, log_unexpected
from erllama_core.model.explain import explain
from erllama_core.model.request import Phase, Request
from erllama_core.model.roster import Roster
from erllama_core.model.saver import Saver
from erllama_core.model.sequences import SequencePool
from erllama_core.model.session import SessionTable
from erllama_core.model.watch import Abandoned
from erllama_core.results import CacheKey, Explanation, FinishReason, Stats

log = get_logger("erllama.model")

Given = TypeVarTuple("Given")
"""What is to be done with a request, beside the request itself."""


class Endings:
    """Answers requests and takes them off the roster. The worker's alone.

    An answer comes first and at once; a request whose last token is still to be computed is
    ``CLOSING`` until it was. ``hand_over`` sees a request that loses its sequence while others
    may wait for what it computes; ``ended`` one that is over.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        space: ModelSpace,
        saver: Saver,
        pool: SequencePool,
        roster: Roster,
        sessions: SessionTable,
        *,
        hand_over: Callable[[Request], None],
        ended: Callable[[Request], None],
    ) -> None:
        self._vocabulary: Final = vocabulary
        self._space: Final = space
        self._saver: Final = saver
        self._pool: Final = pool
        self._roster: Final = roster
        self._sessions: Final = sessions
        self._hand_over: Final = hand_over
        self._ended: Final = ended

    # ------------------------------------------------------------------ by its reply

    def answer(self, request: Request, reason: FinishReason) -> None:
        """Generation has ended: the caller gets the end now, the cache the rest of it next."""
        request.finish_reply()
        if reason == "length" and request.pipeline.stop_sequence is not None:
            reason = "stop"  # it was met, but a better one could have come
        stats = self._stats(request, reason, self._finish_key(request))
        request.phase = Phase.CLOSING
        self._deliver(request, stats)

    def _deliver(self, request: Request, stats: Stats) -> None:
        # The session first: its caller may be back with the next turn at once.
        self._sessions.answered(request, bytes(request.tokens) or None)
        request.finish(stats)

    def _finish_key(self, request: Request) -> CacheKey | None:
        if not self._saver.saves(request.length) or request.keys is None:
            return None
        return CacheKey(request.keys.key(request.length))

    def _stats(self, request: Request, reason: FinishReason, key: CacheKey | None) -> Stats:
        return request.stats(reason, key, self._explanation(request))

    def _explanation(self, request: Request) -> Explanation | None:
        if request.finding is None:
            return None
        return explain(
            request.finding,
            self._vocabulary,
            self._space.kv_class,
            kind=request.hit_kind,
            reused_tokens=request.read,
            tiers=request.sources,
            restored_bytes=request.restored_bytes,
            restore_s=request.restore_s,
            saving=self._saver.shortfall(request.prompt_tokens, request.length, request.drops),
        )

    # ---------------------------------------------------------- by its caller's wish

    def end_cancelled(self) -> None:
        """Answer those whose callers do not want them any more."""
        for request in [r for r in self._everybody() if r.cancelled and not r.is_answered]:
            self.guard(request, self._answer_cancelled)

    def _answer_cancelled(self, request: Request) -> None:
        """Cancelled in the middle of a reply, it is finished like any other."""
        if request.phase is Phase.GENERATING:
            self.answer(request, "cancelled")
            return
        self._cut_short(request)
        request.finish_reply()
        self._deliver(request, self._stats(request, "cancelled", None))
        self._leave_or_release(request)

    def end_overdue(self) -> None:
        """Answer those that have run out of time."""
        limited = [r for r in self._everybody() if r.deadline is not None and not r.is_answered]
        if not limited:
            return
        now = time.perf_counter()
        for request in limited:
            if request.deadline is not None and request.deadline <= now:
                self.guard(request, self._answer_overdue)

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
        error = TimeoutExceeded(message, stats=self._stats(request, "cancelled", key))
        if replying:
            request.phase = Phase.CLOSING
        self._sessions.answered(request, bytes(request.tokens) or None)
        request.fail(error)
        if not replying:
            self._leave_or_release(request)

    def _everybody(self) -> tuple[Request, ...]:
        return (*self._roster.waiting, *self._roster.active)

    def _cut_short(self, request: Request) -> None:
        """A request ends that has said nothing: its context is what its sequence holds of it."""
        if not request.generated:
            del request.tokens[request.computed * TOKEN_BYTES :]
            request.keys = self._space.keys(request.tokens, request.options.cache_salt)

    def _leave_or_release(self, request: Request) -> None:
        """A request was ended before its reply: what it has computed may be of use."""
        sound = request.phase is Phase.PREFILLING or request.phase is Phase.LOADING
        if sound and request.computed == request.length > 0:
            self.leave(request)
        else:
            self.release(request)

    # ------------------------------------------------------------------- by an error

    def guard(
        self, request: Request, act: Callable[[Request, *Given], None], *given: *Given
    ) -> None:
        """Do something for one request; what it raises ends that request and no other."""
        try:
            act(request, *given)
        except Abandoned:
            raise
        except BaseException as error:  # noqa: BLE001 - a plugin's own code; SystemExit too
            what = f"a plugin raised while request {request.id} ran"
            failure = as_erllama_error(error, what, request=request.id, model=request.model)
            self.fail(request, failure)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error, unless its caller has an answer already."""
        if request.phase is Phase.ENDED:
            return
        self._answer_with(request, error)
        self.release(request)

    def fail_all(self, error: Exception) -> None:
        """The context is lost, and so is whatever runs in it. Nothing is asked of the context.

        Any thread, once the one that used the context does so no longer.
        """
        for request in list(self._roster.active):
            self._answer_with(request, error)
            self._end(request)
        self._roster.active.clear()
        self._pool.abandon()

    def close_all(self, error: Exception) -> list[Request]:
        """Answer everybody, running or not; those that ran, in whose sequences there is state."""
        ran = [r for r in self._roster.active if r.phase is not Phase.FOLLOWING]
        for request in (*self._roster.active, *self._roster.waiting):
            self._answer_with(request, error)
            self._end(request)
        self._roster.active.clear()
        self._roster.waiting.clear()
        return ran

    def _answer_with(self, request: Request, error: Exception) -> None:
        if not request.is_answered:
            self._sessions.answered(request, None)
            request.fail(error)

    # --------------------------------------------------------------- off the roster

    def leave(self, request: Request) -> None:
        """The request is over, and its sequence is sound: it may be of use to others."""
        self._roster.discard(request)
        self._end(request)
        session = request.session
        known = session is not None and self._sessions.knows(session)
        self._pool.leave(request, session if known else None)
        self._hand_over(request)
        self._pool.bound_residents()

    def release(self, request: Request) -> None:
        """The request is over, and nothing of its sequence is kept."""
        if request.phase is Phase.ENDED:
            return
        ran = self._roster.discard(request)
        self._end(request)
        if ran:
            self._hand_over(request)
        if request.live is not None:
            self._pool.forget(request.live)

    def _end(self, request: Request) -> None:
        request.phase = Phase.ENDED
        self._saver.let_go(request)
        close_sampler(request)
        self._ended(request)


def close_sampler(request: Request) -> None:
    """Free a request's sampler, whatever that raises."""
    try:
        request.sampler.close()
    except Exception as error:  # noqa: BLE001 - a backend's own code
        log_unexpected(log, "sampler.not_freed", error, request=request.id, model=request.model)


def as_erllama_error(error: BaseException, what: str, **fields: object) -> ErllamaError:
    """An error that callers may be given, for whatever a plugin raised. ``fields`` are logged."""
    if isinstance(error, ErllamaError):
        return error
    log_unexpected(log, "plugin.raised", error, doing=what, **fields)
    failure = PluginFailed(f"{what}: {error!r}")
    failure.__cause__ = error
    return failure

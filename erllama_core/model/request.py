"""One request on its way through the worker."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.lookup import Match
from erllama_core.interfaces.backend import ConstrainedSampler, PackedTokens, Sampler
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.stream import Done, Event
from erllama_core.model.explain import Finding
from erllama_core.model.options import RequestOptions
from erllama_core.model.snapshots import SnapshotQueue
from erllama_core.prompt import Prompt, unpack
from erllama_core.results import (
    CacheDelta,
    CacheKey,
    Explanation,
    FinishReason,
    GateEstimate,
    HitKind,
    Stats,
    TokenLogprob,
)
from erllama_core.stream.mailbox import Mailbox
from erllama_core.stream.pipeline import Pipeline

if TYPE_CHECKING:
    from erllama_core.model.sequences import LiveSequence
    from erllama_core.model.session import Session

log = get_logger("erllama.model")


class Phase(enum.Enum):
    """Where a request is."""

    QUEUED = enum.auto()
    LOADING = enum.auto()
    """It has a sequence, and waits for stored state to be read."""
    FOLLOWING = enum.auto()
    """It has a sequence, and waits for another request to compute what both begin with."""
    PREFILLING = enum.auto()
    GENERATING = enum.auto()
    CLOSING = enum.auto()
    """Answered; its last token is still to be computed, so that its context is whole."""
    ENDED = enum.auto()


class Request:
    """State of one request. The worker's alone, but for ``cancelled`` and ``mailbox``."""

    def __init__(
        self,
        request_id: int,
        prompt: Prompt,
        options: RequestOptions,
        *,
        model: str = "",
        context_size: int,
        new_sampler: Callable[[PackedTokens], Sampler],
        pipeline: Pipeline,
        generates: bool = True,
        continues: bool = False,
        is_streamed: bool = False,
        on_answer: Callable[[Request, Stats | Exception], None] | None = None,
    ) -> None:
        self.id: Final = request_id
        self.model: Final = model
        """Its model's id, for the log."""
        self._on_answer: Final = on_answer
        self.options: Final = options
        self.prompt_tokens = len(prompt)
        self.opening_tokens: Final = prompt.opening_tokens
        """Tokens at the prompt's end that open the reply; 0: not known."""
        self.may_respell: Final = prompt.text is not None
        """Whether its text is what was meant, so that other tokens of that text do as well."""
        self.respelt = False
        """It goes on with other tokens of its text."""
        self.context_size: Final = context_size
        self.generates: Final = generates
        """Whether it wants a reply, and not only its prompt computed."""
        self.continues: Final = continues
        """It was given as a session's tokens and more, not as a prompt of its own."""
        self.is_streamed: Final = is_streamed
        self.max_generated = self._room(self.prompt_tokens)
        self.new_sampler: Final = new_sampler
        """Makes a sampler of what the request asks for, behind a prompt."""
        self.sampler = new_sampler(prompt.packed)
        self.pipeline: Final = pipeline
        self.mailbox: Final[Mailbox[Event | Exception]] = Mailbox()
        self.tokens = bytearray(prompt.packed)
        """The context, packed: prompt and reply."""
        self.generated: Final[list[int]] = []
        self.logprobs: Final[list[TokenLogprob] | None] = None if options.logprobs is None else []
        """Of the tokens generated, for a request that asks for them."""
        self.keys: ContextKeys | None = None
        """Made when the request is submitted to a worker, which knows the namespace."""
        self.phase = Phase.QUEUED
        self.cancelled = False
        self.session: Session | None = None
        self.live: LiveSequence | None = None
        self.order = 0
        """By when it was first given a sequence: the least one is never preempted. 0: not yet."""
        self.turn = 0
        """When it last had a part of a step, in steps."""
        self.was_preempted = False
        """It had a sequence before, and lost it to others."""
        self.is_counted = False
        """What it found was counted; what it gets back of its own later is no hit."""
        self.is_answered = False
        """Its caller has been given its end, one way or the other."""
        self.aborts = 0
        """Steps in a row that were aborted for nothing that it did."""
        self.unproven: Match | None = None
        """What was stored that it goes on from, until a step has shown that it can."""
        self.sticks = False
        """It goes on in the very cells of its session's last turn."""
        self.leader: Request | None = None
        """Who computes the first ``follow_until`` tokens for it."""
        self.follow_until = 0
        self.stops: Final[set[int]] = set()
        """Positions at which slices of its prompt end, as others go on from there."""
        self.computed = 0
        """Tokens whose state the sequence holds."""
        self.saved = 0
        """Tokens whose state is stored, counted from the start without a gap."""
        self.snapshots: Final = SnapshotQueue()
        """For models whose state cannot be cut."""
        self.tried = 0
        """Tokens up to which a save was tried last, while the reply grows."""
        self.drops = 0
        """Saves that found no room."""
        self.is_last_save = False
        """The worker is closing: what is saved now is saved whatever is on its way."""
        self.read = 0
        """Tokens that were restored."""
        self.restored_bytes = 0
        self.gate: GateEstimate | None = None
        """What the cost gate made of the state that was found, where it had a say."""
        self.finding: Finding | None = None
        """What the look-up found, for a request that asks why."""
        self.sources: tuple[str, ...] = ()
        """Names of the tiers that its state came from."""
        self.attempts = 0
        """Fetches that failed."""
        now = time.perf_counter()
        self.submitted_at: Final = now
        timeout = options.timeout_s
        self.deadline: Final = None if timeout is None else now + timeout
        self.admitted_at = now
        self.prefill_at = now
        self.first_token_at: float | None = None
        self.prefill_s = 0.0
        self.restore_s = 0.0

    @property
    def max_tokens(self) -> int:
        """The longest that the context can become: the cells that it needs."""
        return self.prompt_tokens + self.max_generated

    def _room(self, prompt_tokens: int) -> int:
        """Tokens that may be generated after so long a prompt."""
        room = self.context_size - prompt_tokens
        return min(self.options.response_tokens or room, room) if self.generates else 0

    def max_tokens_after(self, prompt_tokens: int) -> int | None:
        """What ``max_tokens`` is for a prompt of another length; None when that is too long."""
        room = self._room(prompt_tokens)
        least = 1 if self.generates else 0
        return prompt_tokens + room if room >= least else None

    def respell(self, tokens: bytes, keys: ContextKeys, sampler: Sampler | None) -> None:
        """Go on with other tokens of the same text; nothing was computed yet."""
        self.tokens[:] = tokens
        self.prompt_tokens = len(tokens) // TOKEN_BYTES
        self.max_generated = self._room(self.prompt_tokens)
        self.keys = keys
        if sampler is not None:
            self.sampler.close()
            self.sampler = sampler

    @property
    def context_tokens(self) -> tuple[int, ...]:
        """The context as the model sees it: the prompt's tokens, and the reply's."""
        return tuple(unpack(bytes(self.tokens)))

    @property
    def length(self) -> int:
        """Tokens of the context so far."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def seq(self) -> int:
        """The id of its sequence."""
        assert self.live is not None
        return self.live.seq

    @property
    def hit_kind(self) -> HitKind:
        """What the look-up came to."""
        if not self.read:
            return "cold"
        if self.sticks:
            return "continuation" if self.continues else "sticky"
        return "exact" if self.read == self.prompt_tokens else "partial"

    def lose_sequence(self) -> None:
        """Its cells are others' from now on; it waits to go on where it was."""
        self.phase = Phase.QUEUED
        self.was_preempted = True
        self.live = self.leader = None
        self.stops.clear()
        self.computed = self.saved = self.tried = self.attempts = 0

    def append(self, token: int) -> None:
        """A token was sampled."""
        self.tokens += token.to_bytes(TOKEN_BYTES, "little")
        self.generated.append(token)

    def note_logprob(self, logprob: TokenLogprob) -> None:
        """How likely the token sampled last was, for a request that asks for it."""
        assert self.logprobs is not None
        self.logprobs.append(logprob)
        self.mailbox.put(logprob)

    def stats(
        self,
        finish_reason: FinishReason,
        finish_key: CacheKey | None,
        explanation: Explanation | None = None,
    ) -> Stats:
        """How it went, once generation has ended."""
        now = time.perf_counter()
        committed = self.length
        first = self.first_token_at
        return Stats(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.generated),
            generated=tuple(self.generated),
            committed_tokens=committed,
            finish_key=finish_key,
            finish_reason=finish_reason,
            cancelled=finish_reason == "cancelled",
            cache_hit_kind=self.hit_kind,
            cache_delta=CacheDelta(
                read=self.read, created=committed - self.read if finish_key is not None else 0
            ),
            restored_bytes=self.restored_bytes,
            queue_s=(self.admitted_at if self.order else now) - self.submitted_at,
            restore_s=self.restore_s,
            prefill_s=self.prefill_s,
            first_token_s=None if first is None else first - self.submitted_at,
            decode_s=0.0 if first is None else now - first,
            stop_sequence=self.pipeline.stop_sequence,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            grammar_rejections=(
                self.sampler.turned_down if isinstance(self.sampler, ConstrainedSampler) else 0
            ),
            explain=explanation,
        )

    def finish_reply(self) -> None:
        """Nothing more is generated: deliver what was held back."""
        for event in self.pipeline.finish():
            self.mailbox.put(event)

    def finish(self, stats: Stats) -> None:
        """Deliver the end, unless there was one."""
        if self._answer(Done(stats), stats):
            log.info(
                "request.finished",
                request=self.id,
                model=self.model,
                reason=stats.finish_reason,
                prompt_tokens=stats.prompt_tokens,
                completion_tokens=stats.completion_tokens,
                cache_hit=stats.cache_hit_kind,
                reused_tokens=stats.cache_delta.read,
                first_token_s=_rounded(stats.first_token_s),
                seconds=_rounded(time.perf_counter() - self.submitted_at),
            )

    def fail(self, error: Exception) -> None:
        """Deliver an error instead of an end, unless there was one."""
        if self._answer(error, error):
            # Not what it says, which is for the caller.
            log.info(
                "request.failed",
                request=self.id,
                model=self.model,
                error=type(error).__name__,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=len(self.generated),
            )

    def _answer(self, end: Done | Exception, outcome: Stats | Exception) -> bool:
        """Whether this is the answer."""
        if self.is_answered:
            return False
        self.is_answered = True
        self.mailbox.put(end)
        if self._on_answer is not None:
            self._on_answer(self, outcome)
        return True


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)

"""What goes into one batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import attrs

from erllama_core.interfaces.backend import Row
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.model.request import Phase, Request

_MIN_CHUNK: Final = 64
_LEAST: Final = 4
"""Prompt tokens in a step with replies, however slow the model is: prompts must get on."""
_SHARE: Final = 0.75
"""What prompts get at least, of the time that the replies of a step take."""
_WEIGHT: Final = 0.25
"""Of a new measurement in a moving average."""
_SLOWER_WEIGHT: Final = 0.5
"""The same where steps have become slower, as those of prompts do with all that they look at."""


class Pace:
    """How fast prompts and replies are computed. Written by the worker, read by any thread."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        """0.0 until it was measured."""
        self.step_s = 0.0
        """A step of replies alone; 0.0 until it was measured."""
        self.replies_per_step = 0.0
        self._beside_s = 0.0
        """What the replies of a step with prompts take: ``step_s``, and how that has changed."""

    def note(self, prompt_tokens: int, replies: int, seconds: float) -> None:
        """A step was computed."""
        if seconds <= 0.0:
            return
        if not prompt_tokens:
            self.step_s += _WEIGHT * (seconds - self.step_s) if self.step_s else seconds
            more = replies - self.replies_per_step
            self.replies_per_step += _WEIGHT * more if self.replies_per_step else replies
            self._beside_s = self.step_s
        elif not replies or not self._beside_s:
            self._note_rate(prompt_tokens / seconds)
        elif not self.prefill_tokens_per_s:
            # Never all of it the replies', should what they took before be off.
            self._note_rate(prompt_tokens / max(seconds - self._beside_s, seconds / 4))
        else:
            # Another process slows both down, the tokens behind a prompt the prompt alone. Which
            # of it this is cannot be told: the replies are taken to have half a part in it.
            expected_s = self._beside_s + prompt_tokens / self.prefill_tokens_per_s
            change = seconds / expected_s - 1.0
            factor = 1.0 + (_SLOWER_WEIGHT if change > 0.0 else _WEIGHT) * change
            self._beside_s *= math.sqrt(factor)
            self.prefill_tokens_per_s /= factor

    def _note_rate(self, rate: float) -> None:
        before = self.prefill_tokens_per_s
        weight = _WEIGHT if rate > before else _SLOWER_WEIGHT
        self.prefill_tokens_per_s += weight * (rate - before) if before else rate

    def prompt_tokens_within(self, target_s: float) -> int:
        """As many as a step with the replies has within that time; few before they were measured.

        Three quarters of what the replies take at least: where they alone take the target, a
        prompt would hardly get on. So replies come within the target and two of their own
        steps, with some room for what the last steps did not show.
        """
        if not self.prefill_tokens_per_s:
            return _MIN_CHUNK
        left_s = max(target_s - self._beside_s, _SHARE * self._beside_s)
        return max(_LEAST, int(left_s * self.prefill_tokens_per_s))

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all replies together; 0.0 until it was measured."""
        return self.replies_per_step / self.step_s if self.step_s else 0.0


@attrs.frozen
class Tick:
    """What one step computes."""

    requests: Sequence[Request]
    rows: Sequence[Row]
    """One of each request, in the same order."""
    n_tokens: int
    n_replies: int
    """How many of the requests, the first ones, have a reply that goes on."""


class TickComposer:
    """Composes batches: running replies first, then parts of prompts in fair turns.

    A prompt gets at most ``chunk_tokens`` of a batch (None: a quarter of it, 64 at least), so
    that a long one does not keep the others waiting. With replies in the batch, all prompts
    together get no more than makes a step of ``stall_target_ms``, or than three quarters of the
    replies' time where these alone take most of it.
    """

    def __init__(
        self, batch_tokens: int, chunk_tokens: int | None, stall_target_ms: int = 0
    ) -> None:
        self._batch_tokens: Final = batch_tokens
        self._chunk_tokens: Final = chunk_tokens or max(_MIN_CHUNK, batch_tokens // 4)
        self._stall_target_s: Final = stall_target_ms / 1000
        self._turns: Final = itertools.count(1)

    def compose(self, active: Sequence[Request], pace: Pace | None = None) -> Tick:
        """The requests that take part in the next step, and their rows."""
        batch: list[Request] = []
        rows: list[Row] = []
        room = self._batch_tokens
        turn = next(self._turns)

        def add(request: Request, stop: int, *, logits: bool) -> int:
            request.turn = turn
            start = request.computed
            tokens = bytes(request.tokens[TOKEN_BYTES * start : TOKEN_BYTES * stop])
            batch.append(request)
            rows.append(Row(request.seq, start, tokens, logits))
            return stop - start

        replies: list[Request] = []
        prompts: list[Request] = []
        for request in active:
            phase = request.phase
            if phase is Phase.GENERATING or phase is Phase.CLOSING:
                replies.append(request)
            elif phase is Phase.PREFILLING:
                prompts.append(request)
        if len(replies) > room:
            replies.sort(key=_last_turn)
            del replies[room:]
        n_tokens = sum([add(request, request.length, logits=True) for request in replies])
        room -= n_tokens
        if not prompts:
            return Tick(batch, rows, n_tokens, len(replies))
        if rows and pace is not None and self._stall_target_s:
            room = min(room, pace.prompt_tokens_within(self._stall_target_s))
        # Whoever had no part for longest comes first, so that nobody is passed over for ever.
        prompts.sort(key=_last_turn)
        for request in prompts:
            whole = request.length
            stop = min(whole, request.computed + min(self._chunk_tokens, room))
            stop = min([stop, *(at for at in request.stops if at > request.computed)])
            if stop > request.computed:
                logits = stop == whole or stop in request.snapshots.marked
                count = add(request, stop, logits=logits)
                room -= count
                n_tokens += count
        return Tick(batch, rows, n_tokens, len(replies))


def _last_turn(request: Request) -> int:
    return request.turn

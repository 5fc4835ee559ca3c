"""Choosing the next token from logits."""

from __future__ import annotations

import math
import random
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

from erllama_backend_stub.arithmetic import exp
from erllama_backend_stub.logits import LogitRow
from erllama_backend_stub.vocabulary import N_TOKENS
from erllama_core.interfaces.backend import (
    PENALTY_WINDOW,
    Mark,
    PackedTokens,
    SamplingParams,
)

_ALL_TOKENS: Final = range(N_TOKENS)


class StubSampler:
    """Penalty, top-k, top-p, min-p, temperature, draw: llama.cpp's order.

    A draw consumes one number of a generator that ``params.seed`` alone determines; a greedy
    choice consumes none. The same tokens are drawn on every machine.
    """

    def __init__(self, params: SamplingParams, history: PackedTokens) -> None:
        self._params = params
        self._random = random.Random(params.seed)
        count = min(len(history) // 4, PENALTY_WINDOW)
        tail = history[len(history) - 4 * count :]
        self._recent = deque(struct.unpack(f"<{count}I", tail), maxlen=PENALTY_WINDOW)

    def sample_row(self, row: LogitRow, *, greedy: bool = False) -> int:
        """Draw the next token from the logits of a step and take note of it."""
        return self._choose(_ALL_TOKENS, row.values, greedy=greedy)

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int | None:
        """See the protocol. Raises ValueError for a mark that does not serve the parameters."""
        return self._choose(*logits_of(mark, self._params), greedy=greedy)

    def close(self) -> None:
        self._recent.clear()

    def _choose(self, tokens: Sequence[int], logits: Sequence[float], *, greedy: bool) -> int:
        token = self.draw(tokens, logits, greedy=greedy)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """The token comes next: it counts for the penalty."""
        self._recent.append(token)

    def draw(self, tokens: Sequence[int], logits: Sequence[float], *, greedy: bool) -> int:
        """Draw from parallel tokens and logits, whose order has no influence."""
        penalty = self._params.repetition_penalty
        if penalty != 1.0:
            recent = set(self._recent)
            # A penalty above 1 makes a token less likely on either side of zero, as in
            # llama.cpp's llama_sampler_penalties_apply.
            logits = [
                (logit / penalty if logit > 0.0 else logit * penalty) if token in recent else logit
                for token, logit in zip(tokens, logits, strict=True)
            ]
        if greedy or self._params.temperature <= 0.0:
            top = max(logits)
            token = min(t for t, logit in zip(tokens, logits, strict=True) if logit == top)
        else:
            token = self._draw(tokens, logits)
        return token

    def _draw(self, tokens: Sequence[int], logits: Sequence[float]) -> int:
        params = self._params
        ranked = sorted(zip([-logit for logit in logits], tokens, strict=True))
        if params.top_k > 0:
            del ranked[params.top_k :]
        least = ranked[0][0]
        weights = [exp(least - negated) for negated, _ in ranked]
        if params.top_p < 1.0:
            wanted, reached = params.top_p * sum(weights), 0.0
            for kept, weight in enumerate(weights, start=1):
                reached += weight
                if reached >= wanted:
                    del ranked[kept:], weights[kept:]
                    break
        # The largest weight is 1, so a weight is a token's probability relative to the best.
        if params.min_p > 0.0:
            kept = max(1, sum(weight >= params.min_p for weight in weights))
            del ranked[kept:]
        weights = [exp((least - negated) / params.temperature) for negated, _ in ranked]
        lot = self._random.random() * sum(weights)
        for (_, token), weight in zip(ranked, weights, strict=True):
            lot -= weight
            if lot < 0.0:
                return token
        return ranked[-1][1]


def logits_of(mark: Mark, params: SamplingParams) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The tokens of a mark and their logits. Raises ValueError for one that does not serve."""
    if not mark.serves(params):
        raise ValueError(f"a mark of {mark.size} logits cannot serve {params}")
    tokens = struct.unpack(f"<{mark.size}I", mark.tokens)
    logits = struct.unpack(f"<{mark.size}f", mark.logits)
    if mark.n_vocab != N_TOKENS or max(tokens) >= N_TOKENS or any(map(math.isnan, logits)):
        raise ValueError("a mark holds numbers, for tokens of the vocabulary")
    return tokens, logits

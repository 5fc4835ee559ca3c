"""Sampling chains of llama.cpp, one per request."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import numpy as np
from llama_cpp import llama_cpp

from erllama_backend_llama.batch import TOKEN
from erllama_backend_llama.candidates import Candidates, LiveRow, array_of, of_mark, of_row
from erllama_core.errors import DecodeFailed, EngineClosed
from erllama_core.interfaces.backend import (
    PENALTY_WINDOW,
    Mark,
    PackedTokens,
    SamplingParams,
)

_RANDOM_SEED: Final = 0xFFFFFFFF
"""LLAMA_DEFAULT_SEED: llama.cpp takes it as "choose one", which nobody could repeat."""


class LlamaSampler:
    """A chain: penalties, then greedy, or top-k, top-p, min-p, temperature and a draw.

    A second chain, made when first asked for, chooses greedily after the same penalties. Owns
    its native chains, which ``close`` (or the end of the object) frees once. Made on any
    thread, used by one. Seeds are 0 to 2**32 - 1; the largest draws as the one below it.
    Raises ValueError for parameters that mean nothing.
    """

    # Kept on the class: module globals may be gone when the interpreter ends.
    _free = staticmethod(llama_cpp.llama_sampler_free)

    def __init__(self, params: SamplingParams, history: PackedTokens, n_vocab: int) -> None:
        self._chain: Any = None
        self._greedy_chain: Any = None
        _check(params)
        self._is_greedy = params.temperature <= 0.0
        self._has_penalties = params.repetition_penalty != 1.0
        self._n_vocab = n_vocab
        self._chain = _new_chain()
        if self._has_penalties:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    n_vocab, PENALTY_WINDOW, params.repetition_penalty, 0.0, 0.0
                )
            )
        if self._is_greedy:
            self._add(llama_cpp.llama_sampler_init_greedy())
        else:
            # 1 keeps at least one token, whatever the cut.
            self._add(llama_cpp.llama_sampler_init_top_k(params.top_k))
            self._add(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
            self._add(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
            self._add(llama_cpp.llama_sampler_init_temp(params.temperature))
            self._add(llama_cpp.llama_sampler_init_dist(min(params.seed, _RANDOM_SEED - 1)))
        if self._has_penalties:
            self._note(history)

    @property
    def chain(self) -> Any:
        """The native chain. Raises EngineClosed once it was freed."""
        if self._chain is None:
            raise EngineClosed("the sampler was closed; its request has ended")
        return self._chain

    def takes_largest(self, *, greedy: bool) -> bool:
        """Whether the next draw is the largest logit, the first of equal ones, and nothing else.

        llama.cpp's greedy sampler finds it in 0.07 ms for a vocabulary of 49,152, most of which
        is copying the row; whoever knows it already need not ask. Raises EngineClosed.
        """
        if self._chain is None:
            self.chain  # noqa: B018 - raises
        return (greedy or self._is_greedy) and not self._has_penalties

    def chain_for(self, *, greedy: bool) -> Any:
        """The native chain to draw with; the other one must hear of the token too.

        Raises EngineClosed once it was freed.
        """
        chain = self.chain
        if not greedy or self._is_greedy:
            return chain
        if self._greedy_chain is None:
            self._greedy_chain = _new_chain()
            if self._has_penalties:
                penalties = llama_cpp.llama_sampler_chain_get(chain, 0)
                llama_cpp.llama_sampler_chain_add(
                    self._greedy_chain, llama_cpp.llama_sampler_clone(penalties)
                )
            llama_cpp.llama_sampler_chain_add(
                self._greedy_chain, llama_cpp.llama_sampler_init_greedy()
            )
        return self._greedy_chain

    def sample_row(self, live: LiveRow, *, greedy: bool = False) -> int:
        """Draw from a row of the context, and take note of the token."""
        chain = self.chain_for(greedy=greedy)
        token: int = llama_cpp.llama_sampler_sample(chain, live.context, live.index)
        if self._has_penalties and self._greedy_chain is not None:
            other = self._chain if chain is self._greedy_chain else self._greedy_chain
            llama_cpp.llama_sampler_accept(other, token)
        return token

    def draw_row(self, live: LiveRow, *, greedy: bool = False) -> int:
        """Draw from a row of the context, without taking note of the token."""
        if self.takes_largest(greedy=greedy):
            return live.largest
        if self._has_penalties:  # which llama_sampler_sample would tell of the token
            return self.draw(of_row(live.logits), greedy=greedy)
        chain = self.chain_for(greedy=greedy)
        token: int = llama_cpp.llama_sampler_sample(chain, live.context, live.index)
        return token

    def draw(self, candidates: Candidates, *, greedy: bool = False) -> int:
        """Draw one of the candidates, without taking note of it; they are used up."""
        array = array_of(candidates)
        llama_cpp.llama_sampler_apply(self.chain_for(greedy=greedy), ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise DecodeFailed("the sampling chain chose no token", code=0)
        return int(array.data[array.selected].id)

    def note(self, token: int) -> None:
        """The token comes next: it counts for the penalties."""
        if self._has_penalties:
            for chain in (self._chain, self._greedy_chain):
                if chain is not None:
                    llama_cpp.llama_sampler_accept(chain, token)

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int:
        """Draw from stored logits what a forward pass would have drawn, bit for bit.

        The caller has asked ``mark.serves``. Raises ValueError for a mark of another
        vocabulary, or one that is empty.
        """
        token = self.draw(of_mark(mark, self._n_vocab), greedy=greedy)
        self.note(token)
        return token

    def close(self) -> None:
        chains = (self._chain, self._greedy_chain)
        self._chain = self._greedy_chain = None
        for chain in chains:
            if chain is not None:
                self._free(chain)

    def __del__(self) -> None:
        self.close()

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def _note(self, history: PackedTokens) -> None:
        recent = memoryview(history).cast("B")[-4 * PENALTY_WINDOW :]
        if not len(recent):
            return
        tokens = np.frombuffer(recent, dtype=TOKEN)
        if int(tokens.max()) >= self._n_vocab:
            self.close()
            raise ValueError(
                f"token {int(tokens.max())} is outside the vocabulary of {self._n_vocab} tokens"
            )
        for token in tokens.tolist():
            llama_cpp.llama_sampler_accept(self._chain, token)


def _new_chain() -> Any:
    params = llama_cpp.llama_sampler_chain_default_params()
    params.no_perf = True
    return llama_cpp.llama_sampler_chain_init(params)


def _check(params: SamplingParams) -> None:
    if not 0 <= params.seed <= _RANDOM_SEED:
        raise ValueError(f"seed is 0 to {_RANDOM_SEED}, got {params.seed}")
    if not 0.0 < params.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is above 0, got {params.repetition_penalty}")
    if not math.isfinite(params.temperature):
        raise ValueError(f"temperature is a finite number, got {params.temperature}")
    if not 0 <= params.top_k < 2**31:
        raise ValueError(f"top_k is 0 (off) or more, got {params.top_k}")
    for name in ("top_p", "min_p"):
        if not 0.0 <= getattr(params, name) <= 1.0:
            raise ValueError(f"{name} is 0.0 to 1.0, got {getattr(params, name)}")

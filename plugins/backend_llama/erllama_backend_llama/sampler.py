"""Sampling chains of llama.cpp, one per request."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import numpy as np
from llama_cpp import llama_cpp

from erllama_core.errors import DecodeFailed, EngineClosed
from erllama_core.interfaces.backend import (
    PENALTY_WINDOW,
    Mark,
    PackedTokens,
    SamplingParams,
)

_TOKEN: Final = np.dtype("<u4")
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""``struct llama_token_data``."""

assert _CANDIDATE.itemsize == ctypes.sizeof(llama_cpp.llama_token_data)

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
        return self.chain is not None and not self._has_penalties and (greedy or self._is_greedy)

    def chain_for(self, *, greedy: bool) -> Any:
        """The native chain to draw with; :meth:`note_drawn` must follow the draw.

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

    def note_drawn(self, token: int, *, greedy: bool) -> None:
        """Tell the chain that a token was not drawn with, for its penalties."""
        if self._has_penalties and self._greedy_chain is not None:
            other = self._chain if greedy else self._greedy_chain
            llama_cpp.llama_sampler_accept(other, token)

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int:
        """Draw from stored logits what a forward pass would have drawn, bit for bit.

        The caller has asked ``mark.serves``. Raises ValueError for a mark of another
        vocabulary, or one that is empty.
        """
        if mark.n_vocab != self._n_vocab:
            raise ValueError(
                f"a mark over {mark.n_vocab} tokens; this model's vocabulary has {self._n_vocab}"
            )
        tokens = np.frombuffer(mark.tokens, dtype=_TOKEN)
        logits = np.frombuffer(mark.logits, dtype="<f4")
        if not 0 < tokens.size == logits.size or int(tokens.max()) >= self._n_vocab:
            raise ValueError("a mark holds tokens of the vocabulary, with one logit each")
        candidates = np.zeros(tokens.size, dtype=_CANDIDATE)
        if mark.is_whole:
            # A chain without a cut draws in the order of its candidates: that of a fresh row.
            candidates["id"] = np.arange(tokens.size)
            candidates["logit"][tokens] = logits
        else:
            candidates["id"] = tokens
            candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, llama_cpp.llama_token_data_p),
            size=tokens.size,
            selected=-1,
            sorted=False,
        )
        chain = self.chain_for(greedy=greedy)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        # Samplers shrink, sort, and may move the array; only its own fields say where it is.
        if not 0 <= array.selected < array.size:
            raise DecodeFailed("the sampling chain chose no token", code=0)
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(chain, token)
        self.note_drawn(token, greedy=greedy)
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
        tokens = np.frombuffer(recent, dtype=_TOKEN)
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

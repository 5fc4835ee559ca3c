"""A loop of ``llama_decode`` and native samplers, and nothing else: what is to be reached."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import llama_cpp

from erllama_backend_llama.context_params import default_threads

SLICE_TOKENS = 512


@attrs.frozen
class Steps:
    """How long some steps took, in seconds: the whole, and of that drawing from the logits."""

    seconds: float
    sampling_s: float
    steps: int


class BareLoop:
    """A context of its own with llama.cpp's defaults, and a greedy sampler for each sequence.

    ``n_ctx``: tokens of one sequence, see ErllamaServer. ``threads``: None for as many as the
    backend takes by default.
    """

    def __init__(
        self, path: Path, *, unified: bool, n_ctx: int, n_seq: int, threads: int | None = None
    ) -> None:
        self._unified = unified
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_seq_max, params.kv_unified = n_seq, unified
        params.n_threads = params.n_threads_batch = threads or default_threads()
        self._context = llama_cpp.llama_init_from_model(self.model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make the bare loop's context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(SLICE_TOKENS, 0, 1)
        self._samplers = [_greedy() for _ in range(n_seq)]
        self._last: list[int] = []
        self._lengths: list[int] = []

    def prefill(self, tokens: Sequence[int], kept_tokens: int = 0) -> float:
        """Seconds in which the first sequence is computed, up to its last logits.

        Of what it had, ``kept_tokens`` stay. Laying out the batches in Python does not count.
        """
        if not kept_tokens:
            llama_cpp.llama_memory_clear(self._memory, False)
        elif not llama_cpp.llama_memory_seq_rm(self._memory, 0, kept_tokens, -1):
            raise RuntimeError("the bare loop could not cut its context")
        seconds = self._feed(0, tokens, kept_tokens)
        self._lengths, self._last = [len(tokens)], [tokens[-1]]
        return seconds

    def draw(self) -> int:
        """The first sequence's next token, from the logits that are there."""
        token: int = llama_cpp.llama_sampler_sample(self._samplers[0], self._context, -1)
        return token

    def append(self, token: int) -> None:
        """Compute one more token of the first sequence."""
        self._put(0, token, self._lengths[0], 0, logits=True)
        self._decode(1)
        self._lengths[0] += 1

    def state(self) -> Any:
        """The first sequence's state, as llama.cpp gives it."""
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, state, size, 0)
        return state

    def set_state(self, state: Any, n_tokens: int) -> None:
        """Give the first sequence a state of so many tokens, a ctypes array, and nothing else."""
        llama_cpp.llama_memory_clear(self._memory, False)
        size = ctypes.sizeof(state)
        if llama_cpp.llama_state_seq_set_data(self._context, state, size, 0) != size:
            raise RuntimeError("the bare loop could not restore a context")
        self._lengths = [n_tokens]

    def compute(self, tokens: Sequence[int]) -> Any:
        """The state of a context, to be given to sequences of this and of equal loops."""
        self.prefill(tokens)
        return self.state()

    def fill(self, state: Any, contexts: Sequence[Sequence[int]], *, shared_tokens: int) -> None:
        """Give each sequence a context of which ``state`` is the first one's.

        All begin with the same ``shared_tokens``. With none shared, every sequence gets cells
        of its own with that state: what is in them does not change how long a step takes.
        """
        llama_cpp.llama_memory_clear(self._memory, False)
        for seq, tokens in enumerate(contexts):
            if seq == 0 or not shared_tokens:
                size = ctypes.sizeof(state)
                read = llama_cpp.llama_state_seq_set_data(self._context, state, size, seq)
                if read != size:
                    raise RuntimeError("the bare loop could not copy a context")
            else:
                # Of a whole sequence, as separate cells have it; then the end is cut off.
                llama_cpp.llama_memory_seq_cp(self._memory, 0, seq, -1, -1)
                llama_cpp.llama_memory_seq_rm(self._memory, seq, shared_tokens, -1)
                self._feed(seq, tokens, shared_tokens)
        self._lengths = [len(tokens) for tokens in contexts]
        self._last = [tokens[-1] for tokens in contexts]

    def _feed(self, seq: int, tokens: Sequence[int], start: int) -> float:
        seconds = 0.0
        for at in range(start, len(tokens), SLICE_TOKENS):
            part = tokens[at : at + SLICE_TOKENS]
            for i, token in enumerate(part):
                self._put(i, token, at + i, seq, logits=at + i == len(tokens) - 1)
            began = time.perf_counter()
            self._decode(len(part))
            if at + len(part) == len(tokens):
                # Some backends compute no sooner than somebody looks.
                llama_cpp.llama_get_logits_ith(self._context, -1)
            seconds += time.perf_counter() - began
        return seconds

    def decode(self, steps: int) -> Steps:
        """Draw a token of every sequence and compute it, so many times."""
        streams = len(self._lengths)
        sample, context, samplers = llama_cpp.llama_sampler_sample, self._context, self._samplers
        sampling_s = 0.0
        began = time.perf_counter()
        for _ in range(steps):
            for seq in range(streams):
                self._put(seq, self._last[seq], self._lengths[seq], seq, logits=True)
                self._lengths[seq] += 1
            self._decode(streams)
            computed = time.perf_counter()
            for seq in range(streams):
                self._last[seq] = sample(samplers[seq], context, seq)
            sampling_s += time.perf_counter() - computed
        return Steps(time.perf_counter() - began, sampling_s, steps)

    def _put(self, i: int, token: int, position: int, seq: int, *, logits: bool) -> None:
        batch = self._batch
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq

    def _decode(self, n_tokens: int) -> None:
        self._batch.n_tokens = n_tokens
        if llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode failed in the bare loop")

    def close(self) -> None:
        """Free everything."""
        for sampler in self._samplers:
            llama_cpp.llama_sampler_free(sampler)
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _greedy() -> Any:
    params = llama_cpp.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = llama_cpp.llama_sampler_chain_init(params)
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
    return chain

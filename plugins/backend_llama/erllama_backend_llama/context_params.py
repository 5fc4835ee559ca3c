"""``context_opts`` as llama.cpp takes them, checked before it can abort the process on them."""

from __future__ import annotations

import os
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_core.errors import ModelLoadError, unknown_name
from erllama_core.interfaces.backend import ContextOptions, CostPrior

# enum ggml_type of ggml.h; those that llama.cpp accepts for its cache.
CACHE_TYPES: Final = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
_NOT_QUANTISED: Final = frozenset({"f32", "f16", "bf16"})
_FLASH_ATTENTION: Final = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_MAX_THREADS: Final = 512
_THREAD_OPERATIONS: Final = 3e10
"""Arithmetic operations of a thread in a second; 4.5e10 were measured with SmolLM2-135M Q4_1."""
_GPU_OPERATIONS: Final = 2e12
"""Of a build for GPUs. Most do more: until steps were measured, rather too much is restored."""
_IMPORT_S_PER_BYTE: Final = 1 / 4e9
"""State copied into a context; 6e9 bytes in a second were measured in memory."""
CELL_STEP: Final = 256
"""llama.cpp rounds the number of cells up to a multiple of this (``GGML_PAD`` in
llama_context's constructor), but clamps the batch to the number before rounding.
"""
_MAX_CELLS: Final = 2**31 - CELL_STEP
"""Positions are int32."""


def check_options(options: ContextOptions) -> None:
    """Raise ModelLoadError for options that llama.cpp refuses, crashes on or ignores."""
    limits = {
        "n_ctx": _MAX_CELLS,
        "n_batch": _MAX_CELLS,
        "n_ubatch": _MAX_CELLS,
        # One more is opened for restoring state.
        "n_seq_max": llama_cpp.llama_max_parallel_sequences() - 1,
        "n_threads": _MAX_THREADS,
    }
    for name, limit in limits.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= limit:
            raise ModelLoadError(f"context_opts.{name} is 1 to {limit}, got {value}")
    if not options.kv_unified and native_cells(options) > _MAX_CELLS:
        raise ModelLoadError(
            f"context_opts.n_ctx = {options.n_ctx} for each of {options.n_seq_max} sequences; "
            f"all together have {_MAX_CELLS} cells at most. Lower n_ctx or n_seq_max."
        )
    if options.n_batch <= options.n_seq_max:
        raise ModelLoadError(
            f"context_opts.n_batch = {options.n_batch} must be larger than "
            f"n_seq_max = {options.n_seq_max}: a step holds a token of every sequence"
        )
    for name in ("type_k", "type_v"):
        value = getattr(options, name)
        if value not in CACHE_TYPES:
            raise ModelLoadError(unknown_name(f"context_opts.{name}", value, CACHE_TYPES))
    if options.flash_attn not in _FLASH_ATTENTION:
        raise ModelLoadError(
            f'context_opts.flash_attn is true, false or "auto", got {options.flash_attn!r}'
        )
    if options.flash_attn is False and options.type_v not in _NOT_QUANTISED:
        raise ModelLoadError(
            f'context_opts.type_v = "{options.type_v}" needs flash attention; set flash_attn '
            f'to true or "auto", or type_v to "f16"'
        )


def native_cells(options: ContextOptions) -> int:
    """Cells of all sequences together, as llama.cpp counts them."""
    cells = -(-options.n_ctx // CELL_STEP) * CELL_STEP
    return cells if options.kv_unified else cells * options.n_seq_max


def native_params(options: ContextOptions, *, n_seq: int, window: int) -> Any:
    """``struct llama_context_params`` for ``n_seq`` native sequences.

    ``window``: tokens of the model's sliding window, 0 when it has none. Everything that is
    not an option keeps llama.cpp's default; RoPE is always the model's own.
    """
    threads = options.n_threads or default_threads()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = native_cells(options)
    params.n_batch = options.n_batch
    params.n_ubatch = min(options.n_ubatch, options.n_batch)
    params.n_seq_max = n_seq
    if window:
        # With a sliding window a step must not be cut into several ubatches. Before it
        # computes the first, llama.cpp places all of them by way of trial, which throws out
        # cells that later ones no longer need, and puts back only those that it reused: the
        # first is then computed with holes in its window, without any error (logits of a
        # tiny gemma3 were off by 0.09 where rounding explains 0.005).
        params.n_ubatch = max(params.n_ubatch, n_seq + 1)
        params.n_batch = params.n_ubatch
    # A row has logits for its last token only. The default reserves a row of logits for each
    # token of a ubatch: 300 MB with 512 tokens and a vocabulary of 150,000.
    params.n_outputs_max = n_seq
    params.n_threads = threads
    params.n_threads_batch = threads
    params.flash_attn_type = _FLASH_ATTENTION[options.flash_attn]
    params.type_k = CACHE_TYPES[options.type_k]
    params.type_v = CACHE_TYPES[options.type_v]
    params.swa_full = options.swa_full
    params.kv_unified = options.kv_unified
    return params


def cost_prior(model: Any, options: ContextOptions) -> CostPrior:
    """A guess from the number of weights and threads, within a factor of ten or so.

    A token takes two operations for each weight. Mixtures of experts use a part of their
    weights only, and processors differ; a few measured steps replace the guess.
    """
    if llama_cpp.llama_supports_gpu_offload():
        per_second = _GPU_OPERATIONS
    else:
        per_second = _THREAD_OPERATIONS * (options.n_threads or default_threads())
    weights = int(llama_cpp.llama_model_n_params(model))
    return CostPrior(
        compute_s_per_token=2 * weights / per_second, import_s_per_byte=_IMPORT_S_PER_BYTE
    )


def default_threads() -> int:
    """One per core that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)

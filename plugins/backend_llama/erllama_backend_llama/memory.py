"""What a model is going to take of the host's memory: llama.cpp says so without allocating it.

A model that is opened with ``no_alloc`` is metadata and vocabulary, and a context of it is laid
out as any other and allocates nothing of size: what llama.cpp's own ``common/fit.cpp`` does to fit
a model to a machine. There are no C functions for the sizes, so they are read from the log, where
they stand in MiB with two decimals; tests hold the reading to what is really allocated.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Final

import attrs
from llama_cpp import llama_cpp

from erllama_backend_llama import native
from erllama_backend_llama.context_params import check_options, native_params
from erllama_backend_llama.kv_class import claimed_class
from erllama_backend_llama.model import model_params
from erllama_backend_llama.model_check import check_model
from erllama_backend_llama.options import ALL_LAYERS, LlamaOptions
from erllama_core.errors import ModelLoadError
from erllama_core.interfaces.backend import BackendRequest, ContextOptions, MemoryEstimate

_MEMORY: Final = re.compile(r"llama_(\w+): size = +([0-9.]+) MiB \(")
"""Of one memory, all its layers together: ``llama_kv_cache``, ``llama_memory_recurrent``."""
_BUFFER: Final = re.compile(r": +(\S+) +(compute|output) buffer size = +([0-9.]+) MiB")
_MIB: Final = 1 << 20


def estimate_memory(request: BackendRequest) -> MemoryEstimate | None:
    """What loading and opening ``request`` would take; None when llama.cpp does not say.

    Takes as long as reading the vocabulary does, a tenth of a second or so. Raises ModelLoadError
    for what cannot be loaded. Thread-safe.
    """
    options, path = request.options, request.model_path
    if not isinstance(options, LlamaOptions) or path is None:
        return None  # loading says what is wrong
    check_options(request.context)
    check_model(path)
    native.start()
    params, _kept = model_params(options)
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    with native.collect_log(everything=True) as lines:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ModelLoadError(
                f"{path}: llama.cpp could not read the model", reason=native.reason(lines)
            )
        try:
            return _estimate(model, options, request.context, lines)
        finally:
            llama_cpp.llama_model_free(model)


def _estimate(
    model: Any, options: LlamaOptions, context: ContextOptions, lines: list[native.LogLine]
) -> MemoryEstimate | None:
    claim = claimed_class(model, swa_full=context.swa_full, unified=context.kv_unified)
    n_seq = claim.n_native(context.n_seq_max, unified=context.kv_unified)
    recurrent = llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
    # Recurrent states are allocated even so, as the only ones: a sequence stands for all.
    alone = attrs.evolve(context, n_seq_max=1) if recurrent else context
    lines.clear()
    opened = llama_cpp.llama_init_from_model(
        model, native_params(alone, n_seq=1 if recurrent else n_seq, window=claim.window)
    )
    if not opened:
        raise ModelLoadError("llama.cpp could not lay out a context", reason=native.reason(lines))
    llama_cpp.llama_free(opened)
    sizes = _sizes(
        [line for _, line in lines],
        sequences=n_seq if recurrent else 1,
        unified=context.kv_unified,
    )
    if sizes is None:
        return None
    kv_bytes, compute_bytes = sizes
    share = _host_share(model, options)
    return MemoryEstimate(
        weights_bytes=int(llama_cpp.llama_model_size(model) * share),
        kv_bytes=int(kv_bytes * share),
        compute_bytes=compute_bytes,
    )


def _sizes(lines: list[str], *, sequences: int, unified: bool) -> tuple[int, int] | None:
    """Bytes of KV and of buffers; None when there is no word of a memory.

    ``sequences``: how many there are for each that the log tells of. Unified cells are shared
    by all of them.
    """
    kv = compute = 0.0
    found = False
    for line in lines:
        memory = _MEMORY.search(line)
        if memory is not None:
            found = True
            shared = unified and "recurrent" not in memory[1]
            kv += float(memory[2]) * (1 if shared else sequences)
        buffer = _BUFFER.search(line)
        if buffer is not None and _is_host(buffer[1]):
            compute += float(buffer[3]) * (sequences if buffer[2] == "output" else 1)
    return (int(kv * _MIB), int(compute * _MIB)) if found else None


def _is_host(buffer_type: str) -> bool:
    """Whether a buffer is in the host's memory: ``CPU``, ``CUDA_Host``; all where it is one."""
    return buffer_type.startswith("CPU") or buffer_type.endswith("_Host") or _shares_memory()


def _host_share(model: Any, options: LlamaOptions) -> float:
    """The part of the layers that is not on a device of its own memory."""
    if not llama_cpp.llama_supports_gpu_offload() or _shares_memory():
        return 1.0
    layers = int(llama_cpp.llama_model_n_layer(model)) + 1  # the output counts as one
    if options.n_gpu_layers == ALL_LAYERS:
        return 0.0
    return max(0, layers - options.n_gpu_layers) / layers


def _shares_memory() -> bool:
    """Whether the GPU's memory is the host's, as Apple's is."""
    return sys.platform == "darwin"

"""Loaded weights."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_backend_llama import native
from erllama_backend_llama.adapter import LlamaAdapter, NativeLock, check_adapter, read_ahead
from erllama_backend_llama.constrained import ConstrainedLlamaSampler
from erllama_backend_llama.context import ENCODES_ONLY, LlamaContext, longest_text
from erllama_backend_llama.context_params import check_options
from erllama_backend_llama.embedding import Embedder, pooling_of
from erllama_backend_llama.gguf_file import Tensor
from erllama_backend_llama.identity import state_identity
from erllama_backend_llama.model_check import check_model
from erllama_backend_llama.no_context import NoContext
from erllama_backend_llama.options import LlamaOptions
from erllama_backend_llama.quantisation import from_file_type
from erllama_backend_llama.sampler import LlamaSampler
from erllama_backend_llama.vocabulary import LlamaVocabulary
from erllama_core.errors import (
    AdapterLoadError,
    DecodeAborted,
    DecodeFailed,
    EngineClosed,
    ModelLoadError,
    NotSupported,
)
from erllama_core.interfaces.backend import (
    Adapter,
    BackendRequest,
    ConstrainedSampler,
    Constraint,
    Context,
    ContextOptions,
    Identity,
    PackedTokens,
    Quantisation,
    Sampler,
    SamplingParams,
    Vocabulary,
)

_SPLIT_MODES: Final = {
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
}
_LOAD_MODES: Final = {
    (False, False): llama_cpp.LLAMA_LOAD_MODE_NONE,
    (True, False): llama_cpp.LLAMA_LOAD_MODE_MMAP,
    (False, True): llama_cpp.LLAMA_LOAD_MODE_MLOCK,
    (True, True): llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
"""By use_mmap and use_mlock."""


def load_model(request: BackendRequest) -> LlamaModel:
    """Load the weights that ``request`` names; blocks while they are read.

    Raises ModelLoadError, whose ``reason`` is what llama.cpp said. Thread-safe.
    """
    options = request.options
    if not isinstance(options, LlamaOptions):
        raise TypeError(f"model_opts of this backend are LlamaOptions, got {options!r}")
    if request.model_path is None:
        raise ModelLoadError('the backend "llama" needs model_path, the path of a GGUF file')
    check_options(request.context)
    tensors = check_model(request.model_path)
    # A file without tensors is a vocabulary, as llama.cpp's own tests have them.
    vocab_only = not tensors or options.vocab_only
    native.start()
    params, _kept = model_params(options)
    params.vocab_only = vocab_only
    with native.collect_log() as lines:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(request.model_path), params)
    if not model:
        raise ModelLoadError(
            f"{request.model_path}: llama.cpp could not load the model; the file may be "
            f"truncated, of an unknown architecture, or too large for the memory",
            reason=native.reason(lines),
        )
    try:
        _check_kind(model)
        return LlamaModel(model, request.context, options, tensors, vocab_only=vocab_only)
    except BaseException:
        llama_cpp.llama_model_free(model)
        raise


class LlamaModel:
    """A ``llama_model``. Thread-safe but for :meth:`open_context` and :meth:`close`."""

    def __init__(
        self,
        model: Any,
        context: ContextOptions,
        options: LlamaOptions,
        tensors: Mapping[str, Tensor],
        *,
        vocab_only: bool,
    ) -> None:
        """Takes ``model`` over when it returns; raises without having freed it."""
        self._options = context
        self._pooling: Final = options.pooling
        self._tensors: Final = tensors
        self._metadata: Final = _metadata(model)
        self._vocab_only: Final = vocab_only
        self._lacks = _what_it_lacks(self._metadata, vocab_only=vocab_only)
        """Why it generates nothing; None for a model that does."""
        self._embedding: Final = threading.Lock()
        self._embedder: Embedder | None = None
        self._is_closing = False
        self._vocabulary: Final = LlamaVocabulary(model)
        self.description: Final = _string(partial(llama_cpp.llama_model_desc, model))
        self.quantisation: Final[Quantisation] = from_file_type(
            int(llama_cpp.llama_model_ftype(model))
        )
        template = llama_cpp.llama_model_chat_template(model, None)
        self.chat_template: Final[str | None] = (
            template.decode("utf-8", "replace") if template else None
        )
        self._context: LlamaContext | None = None
        """The one opened last."""
        self._contexts: Final[list[LlamaContext]] = []
        self._lock: Final = NativeLock()
        self._adapters: Final[list[LlamaAdapter]] = []
        self._model: Any = model

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def identity(self) -> Identity:
        if self._lacks is not None:
            return {"backend": "llama", "generates": False}
        if self._context is None:
            raise ValueError("a model's identity is known once its context was opened")
        return state_identity(
            self._options,
            self._context.memory_class,
            self._metadata,
            n_ctx=self._context.n_ctx,
        )

    def open_context(self) -> Context:
        with self._lock:
            if self._model is None:
                raise EngineClosed("the model was unloaded")
            if self._lacks is not None:
                return NoContext(self._options, self._lacks)
            n_vocab = self._vocabulary.n_tokens
            try:
                self._context = LlamaContext(self._model, self._options, n_vocab=n_vocab)
            except NotSupported as error:
                self._lacks = str(error)
                return NoContext(self._options, self._lacks)
            self._contexts.append(self._context)
            return self._context

    def load_adapter(self, path: Path) -> LlamaAdapter:
        """See ``Adapts``."""
        check_adapter(path, self._metadata["general.architecture"], self._tensors)
        read_ahead(path)
        with self._lock:
            if self._model is None:
                raise EngineClosed("the model was unloaded")
            with native.collect_log() as lines:
                adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not adapter:
                raise AdapterLoadError(
                    f"{path}: llama.cpp could not load the adapter", reason=native.reason(lines)
                )
            loaded = LlamaAdapter(adapter, self._lock)
            self._adapters[:] = [one for one in self._adapters if one.native is not None]
            self._adapters.append(loaded)
            return loaded

    def attach(self, context: Context, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """See ``Adapts``. Raises AdapterLoadError when the model computes no numbers with them."""
        if not isinstance(context, LlamaContext):
            raise TypeError(f"a context of this backend, got {context!r}")
        chosen = []
        for adapter, scale in adapters:
            if not isinstance(adapter, LlamaAdapter) or adapter.native is None:
                raise TypeError(f"an adapter that this model has loaded, got {adapter!r}")
            chosen.append((adapter, scale))
        with self._lock:
            try:
                context.set_adapters(chosen)
            except DecodeAborted:
                raise
            except DecodeFailed as error:
                raise AdapterLoadError(
                    "the model cannot compute with these adapters and scales", reason=str(error)
                ) from error

    def new_sampler(self, params: SamplingParams, history: PackedTokens) -> Sampler:
        """A sampler of its own.

        Raises ValueError for parameters that mean nothing, NotSupported when the model generates
        nothing.
        """
        if self._lacks is not None:
            raise NotSupported(self._lacks)
        return LlamaSampler(params, history, self._vocabulary.n_tokens)

    def new_constrained_sampler(
        self, params: SamplingParams, history: PackedTokens, constraint: Constraint
    ) -> ConstrainedSampler:
        """A sampler of its own. Raises ValueError for parameters that mean nothing, InvalidGrammar
        for a grammar that llama.cpp refuses.
        """
        if self._lacks is not None:
            raise NotSupported(self._lacks)
        return ConstrainedLlamaSampler(params, history, constraint, self._vocabulary)

    def embed(self, tokens: PackedTokens) -> Sequence[float]:
        """See :meth:`Embedder.embed`. Raises NotSupported for a vocabulary alone."""
        if self._vocab_only:
            raise NotSupported(self._lacks or "")
        with self._embedding:
            if self._is_closing or self._model is None:
                raise EngineClosed("the model was unloaded; load it again to embed")
            if self._embedder is None:
                self._embedder = Embedder(
                    self._model,
                    self._options,
                    pooling_of(self._metadata, self._pooling),
                    self._lock,
                    n_vocab=self._vocabulary.n_tokens,
                    limit=self._longest_text(),
                )
            embedder = self._embedder
        return embedder.embed(tokens)

    def _longest_text(self) -> int:
        n_ctx = self._options.n_ctx
        if self._lacks is None:
            return longest_text(self._model, n_ctx)
        # An encoder's positions are learned, whatever its rope type is said to be.
        return min(n_ctx, int(llama_cpp.llama_model_n_ctx_train(self._model)))

    def close(self) -> None:
        """Free the weights, and before them the contexts that are still open. Idempotent."""
        with self._embedding:
            self._is_closing = True
        if self._embedder is not None:
            self._embedder.close()
        with self._lock:
            model, self._model = self._model, None
            if model is None:
                return
            self._vocabulary.close()
            for context in self._contexts:
                context.close()
            llama_cpp.llama_model_free(model)
            for adapter in self._adapters:
                adapter.gone()


def model_params(options: LlamaOptions) -> tuple[Any, Any]:
    """``struct llama_model_params``, and what must stay alive while it is used."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.main_gpu = options.main_gpu
    params.split_mode = _SPLIT_MODES[options.split_mode]
    params.load_mode = _LOAD_MODES[options.use_mmap, options.use_mlock]
    if not options.tensor_split:
        return params, None
    devices = int(llama_cpp.llama_max_devices())
    if len(options.tensor_split) > devices:
        raise ModelLoadError(
            f"model_opts.tensor_split has {len(options.tensor_split)} proportions; this build "
            f"of llama.cpp knows at most {devices} devices"
        )
    # llama.cpp reads one for every device it could have.
    shares = (ctypes.c_float * devices)(*options.tensor_split)
    params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    return params, shares


def _what_it_lacks(metadata: Mapping[str, str], *, vocab_only: bool) -> str | None:
    if vocab_only:
        return (
            "this model is a vocabulary alone: it makes tokens of text and text of tokens, and "
            "computes nothing; load it with its weights"
        )
    architecture = metadata.get("general.architecture", "")
    if metadata.get(f"{architecture}.attention.causal") == "false":
        return ENCODES_ONLY
    return None


def _check_kind(model: Any) -> None:
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ModelLoadError("the file has no vocabulary; the backend runs language models only")
    if (
        llama_cpp.llama_model_has_encoder(model)
        or not llama_cpp.llama_model_has_decoder(model)
        or llama_cpp.llama_model_is_diffusion(model)
    ):
        raise ModelLoadError(
            "this is no decoder-only language model (it has an encoder, or generates by "
            "diffusion); the backend cannot run it"
        )


def _metadata(model: Any) -> dict[str, str]:
    """The file's scalar metadata; arrays are left out by llama.cpp."""
    key_at = llama_cpp.llama_model_meta_key_by_index
    value_at = llama_cpp.llama_model_meta_val_str_by_index
    return {
        _string(partial(key_at, model, index)): _string(partial(value_at, model, index))
        for index in range(int(llama_cpp.llama_model_meta_count(model)))
    }


def _string(read: Callable[[Any, int], int]) -> str:
    """What ``read(buffer, size)`` writes; it returns the length that it would need."""
    size = 256
    buffer = ctypes.create_string_buffer(size)
    length = read(buffer, size)
    if length >= size:
        buffer = ctypes.create_string_buffer(length + 1)
        read(buffer, length + 1)
    return buffer.value.decode("utf-8", "replace")

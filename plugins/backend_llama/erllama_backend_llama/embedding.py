"""Sentence embeddings, in a context of their own over the same weights.

llama.cpp pools what it computes for a text in one go: of a text that is cut in two only the last
part would count, and a model whose attention looks both ways cannot be cut at all. So a text is
one batch and one ubatch, and the context is as large as the longest text so far.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp

from erllama_backend_llama import native
from erllama_backend_llama.adapter import NativeLock
from erllama_backend_llama.batch import TOKEN, Batch
from erllama_backend_llama.context_params import CELL_STEP, native_params
from erllama_backend_llama.options import Pooling
from erllama_core.errors import (
    DecodeFailed,
    EngineClosed,
    InvalidPrompt,
    NotSupported,
    TextTooLong,
)
from erllama_core.interfaces.backend import ContextOptions, PackedTokens, Row

POOLINGS: Final[Mapping[Pooling, int]] = {
    "mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    "cls": llama_cpp.LLAMA_POOLING_TYPE_CLS,
    "last": llama_cpp.LLAMA_POOLING_TYPE_LAST,
}


def pooling_of(metadata: Mapping[str, str], asked: Pooling | None) -> int:
    """How to pool: as asked, else as the file says, else the mean.

    Raises NotSupported for a file that ranks texts instead of embedding them.
    """
    if asked is not None:
        return POOLINGS[asked]
    architecture = metadata.get("general.architecture", "")
    own = metadata.get(f"{architecture}.pooling_type", "")
    if own == str(llama_cpp.LLAMA_POOLING_TYPE_RANK):
        raise NotSupported(
            "this model ranks texts and has no embeddings of its own; set model_opts.pooling to "
            "have some all the same"
        )
    return int(own) if own in map(str, POOLINGS.values()) else llama_cpp.LLAMA_POOLING_TYPE_MEAN


class Embedder:
    """Embeds texts of one loaded model, one at a time. Thread-safe.

    ``limit``: tokens of a text at most. The context is made when the first text comes, and made
    anew, larger, for a longer one. Adapters have no part in it.
    """

    # Kept on the class: module globals may be gone when the interpreter ends.
    _free = staticmethod(llama_cpp.llama_free)

    def __init__(
        self,
        model: Any,
        options: ContextOptions,
        pooling: int,
        lock: NativeLock,
        *,
        n_vocab: int,
        limit: int,
    ) -> None:
        self._model: Any = model
        self._native_lock: Final = lock
        self._options: Final = options
        self._pooling: Final = pooling
        self._n_vocab: Final = n_vocab
        self._limit: Final = limit
        self._suffix: Final = _suffix(model)
        self._lock: Final = threading.Lock()
        self._context: Any = None
        self._room = 0
        """Tokens that the context takes."""

    def embed(self, tokens: PackedTokens) -> Sequence[float]:
        """The pooled vector of a text, of length 1, as llama.cpp's server gives it.

        An end or separator token that the model wants behind a text is added where it is
        missing. Raises InvalidPrompt, TextTooLong, NotSupported, DecodeFailed, EngineClosed.
        """
        packed = bytes(tokens)
        ids = np.frombuffer(packed, dtype=TOKEN)
        if not ids.size:
            raise InvalidPrompt("there is nothing to embed: no tokens")
        if self._suffix and int(ids[-1]) not in self._suffix:
            packed += self._suffix[0].to_bytes(4, "little")
        length = len(packed) // TOKEN.itemsize
        if length > self._limit:
            raise TextTooLong(length, self._limit)
        with self._lock:
            self._make_room(length)
            vector: list[float] = self._pooled(packed).tolist()
            return vector

    def close(self) -> None:
        """Free the context; waits for a text that is being embedded. Idempotent.

        Not to be called with the native lock, which a text may be waiting for.
        """
        with self._lock:
            self._model = None
            self._drop()

    def _make_room(self, length: int) -> None:
        if self._model is None:
            raise EngineClosed("the model was unloaded; load it again to embed")
        if self._context is not None and length <= self._room:
            return
        self._drop()
        wanted = max(2 * CELL_STEP, 1 << (length - 1).bit_length())
        room = min(wanted, -(-self._limit // CELL_STEP) * CELL_STEP)
        params = native_params(self._options, n_seq=1, window=0)
        params.n_ctx = params.n_batch = params.n_ubatch = room
        params.n_outputs_max = 0  # every token has one, for pooling
        params.embeddings = True
        params.pooling_type = self._pooling
        params.kv_unified = True
        # A context plans its graphs when it is made, and again in its first step.
        with self._native_lock:
            with native.collect_log() as lines:
                context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise DecodeFailed(
                    "llama.cpp could not make a context for embeddings: "
                    + (native.reason(lines) or "too little memory"),
                    code=0,
                )
            self._context, self._room = context, room
            self._compute(bytes(TOKEN.itemsize))

    def _compute(self, packed: bytes) -> None:
        context = self._context
        memory = llama_cpp.llama_get_memory(context)
        if memory:  # what only encodes has none
            llama_cpp.llama_memory_clear(memory, False)
        batch = Batch(n_batch=self._room, n_seq=1, n_vocab=self._n_vocab)
        batch.fill([Row(0, 0, packed, logits=False)])
        batch.want_all()
        status = int(llama_cpp.llama_decode(context, batch.native))
        if status != 0:
            raise DecodeFailed("llama.cpp failed while embedding a text", code=status)

    def _pooled(self, packed: bytes) -> npt.NDArray[np.float32]:
        self._compute(packed)
        pointer = llama_cpp.llama_get_embeddings_seq(self._context, 0)
        if not pointer:
            raise NotSupported("this model gives no embeddings")
        size = int(llama_cpp.llama_model_n_embd_out(self._model))
        floats = (ctypes.c_float * size).from_address(
            ctypes.cast(pointer, ctypes.c_void_p).value or 0
        )
        vector = np.array(floats, dtype=np.float32)
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(length) or not length:
            raise DecodeFailed("the embedding came out as no numbers", code=0)
        return (vector / length).astype(np.float32)

    def _drop(self) -> None:
        context, self._context, self._room = self._context, None, 0
        if context is not None:
            self._free(context)


def _suffix(model: Any) -> tuple[int, ...]:
    """Tokens that end a text for this model, the one to add first; empty when it wants none."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    end = int(llama_cpp.llama_vocab_eos(vocab))
    separator = int(llama_cpp.llama_vocab_sep(vocab))
    wanted = []
    if llama_cpp.llama_vocab_get_add_sep(vocab) and separator >= 0:
        wanted.append(separator)
    if llama_cpp.llama_vocab_get_add_eos(vocab) and end >= 0:
        wanted.append(end)
    return tuple(wanted)

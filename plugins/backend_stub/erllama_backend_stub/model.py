"""The model: what a stub has instead of weights, and what it makes from it."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from erllama_backend_stub.adapter import StubAdapter
from erllama_backend_stub.cells import CellMaker
from erllama_backend_stub.constrained import ConstrainedStubSampler
from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import FaultPlan, HangGate
from erllama_backend_stub.options import StubOptions
from erllama_backend_stub.sampler import StubSampler
from erllama_backend_stub.script import Script
from erllama_backend_stub.template import CHAT_TEMPLATE
from erllama_backend_stub.vocabulary import StubVocabulary, tape_from_tokens
from erllama_core.errors import InvalidPrompt, ModelLoadError
from erllama_core.interfaces.backend import (
    Adapter,
    BackendRequest,
    Constraint,
    Context,
    ContextOptions,
    Identity,
    MemoryEstimate,
    PackedTokens,
    Quantisation,
    SamplingParams,
)

ARITHMETIC: Final = 1
"""Counts the ways in which state and logits were ever computed; stored state depends on it."""
EMBEDDING_FLOATS: Final = 32


def open_model(request: BackendRequest) -> StubModel:
    """The provider's factory; a model file is neither needed nor read.

    Raises ModelLoadError for a context that cannot be, a script that cannot work, and when
    ``faults.fail_load`` says so.
    """
    options = request.options
    if not isinstance(options, StubOptions):
        raise ModelLoadError(f"the stub's options are a StubOptions, not {options!r}")
    if options.faults.fail_load:
        raise ModelLoadError("the stub model was not loaded", reason="injected fault")
    for name in ("n_ctx", "n_batch", "n_seq_max"):
        if getattr(request.context, name) < 1:
            raise ModelLoadError(f"context_opts.{name} must be 1 at least")
    try:
        script = _script(options) if options.script else None
    except ValueError as error:
        raise ModelLoadError("the stub's script cannot be played", reason=str(error)) from error
    return StubModel(options, request.context, script)


def estimate_memory(request: BackendRequest) -> MemoryEstimate:
    """The provider's estimate: the cells of :func:`open_model`'s context."""
    context = request.context
    n_cells = context.n_ctx * (1 if context.kv_unified else context.n_seq_max)
    return MemoryEstimate(kv_bytes=n_cells * request.options.cell_bytes)


class StubModel:
    """See ``erllama_core.interfaces.backend.BackendModel``.

    It also ``Embeds``, ``Adapts`` and ``Constrains``.

    Contexts can be opened any number of times, one after or beside the other.
    """

    def __init__(
        self, options: StubOptions, context: ContextOptions, script: Script | None
    ) -> None:
        self._options = options
        self._context = context
        self._script = script
        self._faults = FaultPlan(options.faults)
        self._key = _digest("cells", options.weights, context.type_k, context.type_v)
        self.vocabulary: Final = StubVocabulary(options.add_bos, options.digraphs)

    @property
    def gate(self) -> HangGate:
        """Where the step of ``faults.hang_step`` hangs."""
        return self._faults.gate

    @property
    def description(self) -> str:
        options = self._options
        return f"stub {options.weights!r}, {options.kv_class}, {options.cell_bytes} bytes a token"

    @property
    def quantisation(self) -> Quantisation:
        return Quantisation(type="f32", bits=32)

    @property
    def chat_template(self) -> str | None:
        return CHAT_TEMPLATE

    def identity(self) -> Identity:
        """See the protocol.

        What determines logits belongs to it too, since logits are stored with state. How
        cells are shared out (n_ctx, n_seq_max, kv_unified) changes neither.
        """
        options = self._options
        return {
            "backend": "stub",
            "build": ARITHMETIC,
            "weights": options.weights,
            "kv_class": options.kv_class,
            "cell_bytes": options.cell_bytes,
            "type_k": self._context.type_k,
            "type_v": self._context.type_v,
            "eog_rate": options.eog_rate,
            "script": _digest("script", options.reply_marker, options.script_free, *options.script),
        }

    def open_context(self) -> StubContext:
        return StubContext(
            self._options,
            self._context,
            CellMaker(self._key, self._options.cell_bytes),
            self._script,
            self._faults,
        )

    def new_sampler(self, params: SamplingParams, history: PackedTokens) -> StubSampler:
        return StubSampler(params, history)

    def new_constrained_sampler(
        self, params: SamplingParams, history: PackedTokens, constraint: Constraint
    ) -> ConstrainedStubSampler:
        return ConstrainedStubSampler(params, history, constraint, self.vocabulary)

    def embed(self, tokens: PackedTokens) -> Sequence[float]:
        """32 floats of length 1, a function of tokens and weights.

        Raises InvalidPrompt for no tokens, or for ids outside the vocabulary.
        """
        if not tape_from_tokens(tokens, self.vocabulary.n_tokens):
            raise InvalidPrompt("there is nothing to embed: no tokens")
        seed = _digest("embedding", self._options.weights) + bytes(tokens)
        numbers = hashlib.shake_256(seed).digest(2 * EMBEDDING_FLOATS)
        # Odd integers: no component, and so no length, is ever zero.
        vector = [2 * n - 65535 for n in struct.unpack(f"<{EMBEDDING_FLOATS}H", numbers)]
        length = math.sqrt(sum(n * n for n in vector))
        return [n / length for n in vector]

    def load_adapter(self, path: Path) -> StubAdapter:
        """See ``Adapts``."""
        return StubAdapter.read(path)

    def attach(self, context: Context, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """See ``Adapts``, whose contract is enforced. TypeError for what is not the stub's."""
        if not isinstance(context, StubContext):
            raise TypeError(f"a {type(context).__name__} is no context of this model")
        chosen = []
        for adapter, scale in adapters:
            if not isinstance(adapter, StubAdapter):
                raise TypeError(f"a {type(adapter).__name__} is no adapter of this model")
            chosen.append((adapter, scale))
        context.set_adapters(chosen)

    def close(self) -> None:
        """Nothing to free. Idempotent."""


def _script(options: StubOptions) -> Script:
    return Script(options.script, options.reply_marker, options.script_free)


def _digest(purpose: str, *texts: str) -> bytes:
    """16 bytes that stand for some texts, whatever is in them."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.digest()

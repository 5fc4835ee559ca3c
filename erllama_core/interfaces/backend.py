"""What a model backend is: weights with a vocabulary, and a context that holds KV state.

A backend is two things that threads treat differently. A :class:`BackendModel`, with its
:class:`Vocabulary` and the samplers it makes, is used from any thread. A :class:`Context` is
used by one thread alone, the model's worker, from its first call to ``close``.

Tokens travel packed: little-endian u32, four bytes each, in ``bytes`` or a memoryview, so that
no call does Python work per token. A backend knows no cache; a cache knows no backend.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import attrs

from erllama_core.interfaces.grammar import Grammar

PackedTokens = bytes | memoryview
"""Token ids, little-endian u32."""

# ------------------------------------------------------------------ opening


@attrs.frozen(kw_only=True)
class ContextOptions:
    """``context_opts`` of a model: the size and shape of its context."""

    n_ctx: int = 2048
    """Tokens: per sequence with separate cells, shared by all with unified ones."""
    n_batch: int = 2048
    """Tokens in one step, at most."""
    n_ubatch: int = 512
    """Tokens that the backend computes at a time within a step."""
    n_seq_max: int = 1
    """Requests that run together."""
    n_threads: int | None = None
    """None: one per core."""
    kv_unified: bool = True
    """One pool of cells for all sequences, or one of n_ctx cells for each."""
    swa_full: bool = True
    """Keep the cells that a sliding window has left behind."""
    flash_attn: Literal["auto"] | bool = "auto"
    type_k: str = "f16"
    type_v: str = "f16"
    decode_budget_ms: int = 30_000
    """A step that takes longer is aborted, and its requests end with DecodeTimeout; one that does
    not even end then is left behind with its context. 0: steps may take any time."""
    resident_cells_max: int | None = None
    """Cells that finished contexts may hold on to, beside those of sessions. None: an eighth of
    unified cells, as every cell that is in use slows all replies down; all separate ones."""


@attrs.frozen(kw_only=True)
class BackendRequest:
    """What a backend's factory gets."""

    model_path: Path | None
    """Checked by the core: an existing, readable file, or None when none was given."""
    options: Any
    """An instance of the provider's ``config`` class."""
    context: ContextOptions


@attrs.frozen(kw_only=True)
class MemoryEstimate:
    """What a model is going to take of the host's memory; what lies on devices is not in it."""

    weights_bytes: int = 0
    """Of a mapped file too: the model is slow while they are not in memory."""
    kv_bytes: int = 0
    """KV cells and recurrent states of all sequences."""
    compute_bytes: int = 0
    """Buffers of a step."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


# --------------------------------------------------------------- vocabulary


class Vocabulary(Protocol):
    """Tokens and text. Immutable; thread-safe."""

    @property
    def n_tokens(self) -> int:
        """Ids are 0 to n_tokens - 1."""
        ...

    @property
    def bos(self) -> int | None: ...

    @property
    def add_bos(self) -> bool:
        """Whether the model asks for ``bos`` at the start of a text."""
        ...

    @property
    def end_of_generation(self) -> frozenset[int]:
        """The tokens that end a reply."""
        ...

    @property
    def control_tokens(self) -> Mapping[int, str]:
        """Tokens that steer the model, with their text; ordinary text never yields one."""
        ...

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> bytes:
        """Packed tokens of ``text``.

        ``add_bos``: put ``bos`` first, unless the text gives it already. ``parse_special``:
        the text of a control token becomes that token; otherwise it is ordinary text.
        """
        ...

    def detokenize(self, tokens: PackedTokens) -> bytes:
        """The text of ``tokens``, control tokens as their text; bytes, as it need not be UTF-8."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that one token appends to a reply; O(1), called once per token."""
        ...


# ----------------------------------------------------------------- sampling


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0: greedy; ``top_k``, ``top_p``, ``min_p`` and ``seed`` then have no effect."""
    top_k: int = 40
    """0: the whole vocabulary."""
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    """Over the last :data:`PENALTY_WINDOW` tokens, prompt included. 1.0: none."""
    seed: int = 0

    @property
    def reach(self) -> int | None:
        """How many of the largest logits a draw can depend on; None: on all of them.

        Greedy and top-k look at the largest alone, and a penalty of at least 1.0 moves no more
        than PENALTY_WINDOW tokens down, none up.
        """
        looked_at = 1 if self.temperature <= 0.0 else self.top_k
        if self.repetition_penalty < 1.0 or not looked_at:
            return None
        return looked_at + (PENALTY_WINDOW if self.repetition_penalty != 1.0 else 0)


PENALTY_WINDOW = 64


@attrs.frozen
class Mark:
    """The largest logits at one position: enough to sample the next token from.

    ``tokens`` (u32) and ``logits`` (f32) are parallel and packed, largest logit first.
    """

    tokens: bytes
    logits: bytes
    logsumexp: float
    """Of the logits of the whole vocabulary."""
    n_vocab: int

    @property
    def size(self) -> int:
        return len(self.tokens) // 4

    @property
    def is_whole(self) -> bool:
        """Whether no logit was left out."""
        return self.size == self.n_vocab

    def serves(self, params: SamplingParams) -> bool:
        """Whether sampling from this mark draws what sampling from all logits would.

        It does while no token outside can be drawn. A grammar may still turn down what is drawn:
        see :meth:`Sampler.sample_mark`.
        """
        reach = params.reach
        return self.is_whole or (reach is not None and reach <= self.size)


class Sampler(Protocol):
    """The sampling state of one request; shares nothing with another's.

    Made on any thread, used by the worker alone.
    """

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int | None:
        """Draw the next token from stored logits and take note of it.

        None, and no token noted, when a grammar turned down what was drawn, and too few of the
        mark's other tokens fit it to draw another one. The next call, which is to be
        :meth:`Context.sample` for the same position, goes on from there: it draws what it would
        have drawn had there been no mark. ``greedy``: see :meth:`Context.sample`.

        Raises ValueError, and notes nothing, for a mark that cannot be of this model: of another
        vocabulary, with tokens outside of it, or with logits that are no numbers.
        """
        ...

    def close(self) -> None:
        """Free it. Idempotent."""
        ...


@attrs.frozen(eq=False)
class Constraint:
    """What a reply has to look like, token by token."""

    grammar: Grammar
    """Of the text that the tokens of a reply spell."""
    excluded: frozenset[int]
    """Tokens that never come. Control tokens that are no part of a reply's text have a spelling
    all the same, and would pass for it."""


@runtime_checkable
class ConstrainedSampler(Sampler, Protocol):
    """A sampler under a grammar.

    It draws as any other does, and asks the grammar about the one token that was drawn. One that
    does not fit is turned down: then it draws again, from the tokens that fit. A token that ends
    generation fits where the text is whole. Drawing raises InvalidGrammar when no token of the
    vocabulary fits.
    """

    @property
    def turned_down(self) -> int:
        """Tokens that were drawn and did not fit."""
        ...


# ------------------------------------------------------------------ context


class KVClass(enum.Enum):
    """What can be done to a sequence's state after the fact."""

    SPAN = "span"
    """Any token range can be exported, imported behind another, and cut off at the end."""
    CHECKPOINT = "checkpoint"
    """Ranges, and beside them a snapshot that cannot be cut, taken while standing there."""
    WHOLE = "whole"
    """Nothing but the whole state at the position where the sequence stands."""


@attrs.frozen(slots=True)
class Row:
    """Consecutive tokens of one sequence in a step."""

    seq: int
    start: int
    """Position of the first token: the sequence's length before the step."""
    tokens: PackedTokens
    logits: bool
    """Whether the logits after the last token are wanted."""


@attrs.frozen(slots=True)
class RangeExport:
    """A range on its way out of a sequence: where the state of tokens [start, end) goes."""

    start: int
    end: int
    into: memoryview
    """Writable, of exactly ``range_bytes(seq, start, end)`` bytes."""


@attrs.frozen(slots=True)
class RangeImport:
    """A stored range on its way into a sequence: cells [start, stop) of block [start, end)."""

    start: int
    end: int
    stop: int
    data: memoryview
    """The bytes that an export of [start, end) gave."""


class Context(Protocol):
    """KV state for several sequences. One thread alone calls it.

    Sequences are numbered 0 to n_seq_max - 1 and start empty. Nothing done to one sequence
    may change what another one computes.
    """

    @property
    def kv_class(self) -> KVClass: ...

    @property
    def n_ctx(self) -> int:
        """The longest context of one sequence, tokens."""
        ...

    @property
    def n_cells(self) -> int:
        """Tokens that all sequences together can hold."""
        ...

    @property
    def n_seq_max(self) -> int: ...

    @property
    def n_batch(self) -> int: ...

    @property
    def max_block_tokens(self) -> int | None:
        """The longest range that may be exported and restored; None: any."""
        ...

    @property
    def exports_whole(self) -> bool:
        """Whether exporting any range costs as much as exporting the whole sequence.

        Then ranges are best exported together, and seldom.
        """
        ...

    def step(self, rows: Sequence[Row]) -> None:
        """Compute all rows in one native call; each sequence appears at most once.

        Raises DecodeFailed, as DecodeAborted after :meth:`abort`, and as NotNumbers for logits
        that nothing can be drawn from. Each sequence of ``rows`` then stands where it stood
        before, or, where that cannot be, is empty: see :meth:`length`.
        """
        ...

    def abort(self) -> None:
        """End the step that is running, soon. Any thread; no effect while none runs."""
        ...

    def sample(self, row: int, sampler: Sampler, *, greedy: bool = False) -> int:
        """Draw a token from the logits of the last step's row number ``row``.

        The row must have asked for logits. The sampler takes note of the token. ``greedy``:
        take the largest logit after penalties this time, and use up nothing of the seed.
        """
        ...

    def mark(self, row: int, size: int | None) -> Mark:
        """The ``size`` largest logits of the last step's row (None: all of them)."""
        ...

    def length(self, seq: int) -> int:
        """Tokens of the sequence; 0 also for one that must be dropped."""
        ...

    def drop(self, seq: int) -> None:
        """Empty the sequence. Never fails."""
        ...

    def truncate(self, seq: int, length: int) -> bool:
        """Keep the first ``length`` tokens; False, and nothing changed, when it cannot."""
        ...

    def share(self, source: int, target: int, length: int) -> bool:
        """Give the empty sequence ``target`` the first ``length`` tokens of ``source``.

        With unified cells both have the same cells, so that it costs next to nothing; with
        separate ones they are copied. Only a SPAN sequence can be shared in part. False, and
        nothing changed, when it cannot be done.
        """
        ...

    def range_bytes(self, seq: int, start: int, end: int) -> int:
        """The size of an exported range. SPAN and CHECKPOINT."""
        ...

    def export_ranges(self, seq: int, ranges: Sequence[RangeExport]) -> None:
        """Copy the state of ranges of tokens out. SPAN and CHECKPOINT.

        Raises StateRejected; what was copied until then is worth nothing.
        """
        ...

    def import_ranges(self, seq: int, ranges: Sequence[RangeImport]) -> None:
        """Append stored ranges to a sequence, each starting where the one before stops.

        Raises StateRejected; the sequence must then be dropped.
        """
        ...

    def snapshot_bytes(self, seq: int) -> int:
        """The size that ``export_snapshot`` needs now. CHECKPOINT and WHOLE."""
        ...

    def export_snapshot(self, seq: int, into: memoryview) -> None:
        """Copy out what only exists while the sequence stands where it stands.

        CHECKPOINT: that beside the ranges; WHOLE: everything. Raises StateRejected.
        """
        ...

    def import_snapshot(self, seq: int, length: int, data: memoryview) -> None:
        """Put the sequence at ``length`` tokens.

        CHECKPOINT: its ranges [0, length) were imported before; WHOLE: it is empty. Raises
        StateRejected; the sequence must then be dropped.
        """
        ...

    def close(self) -> None:
        """Free it. Idempotent."""
        ...


@attrs.frozen(kw_only=True)
class CostPrior:
    """What a context is expected to take, until it was measured; a rough guess will do."""

    compute_s_per_token: float = attrs.field(validator=attrs.validators.ge(0.0))
    """Computing a token of a long prompt."""
    import_s_per_byte: float = attrs.field(validator=attrs.validators.ge(0.0))
    """Copying stored state into the context."""


@runtime_checkable
class DeclaresCosts(Protocol):
    """Optional ability of a Context: a guess of its costs.

    Without one, whatever is stored is restored, even where computing it would be sooner.
    """

    @property
    def cost_prior(self) -> CostPrior | None:
        """None: not known, which is as if the context could not tell."""
        ...


@runtime_checkable
class TellsLogits(Protocol):
    """Optional ability of a Context: the logit of any token, for log-probabilities."""

    def logit(self, row: int, token: int) -> float:
        """Of one token, after the last step's row number ``row``, which asked for logits."""
        ...


# -------------------------------------------------------------------- model


@attrs.frozen
class Quantisation:
    """How the weights are stored."""

    type: str
    """The field's name for it, lower case: ``"q4_k_m"``, ``"f16"``."""
    bits: int
    """Bits of one weight in the type that most weights have."""


Identity = Mapping[str, str | int | float | bool | bytes]
"""Properties by name; all of them, together, decide whether state is compatible."""


class BackendModel(Protocol):
    """Loaded weights. Thread-safe but for :meth:`open_context`."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def description(self) -> str:
        """The model in a few words, for a person."""
        ...

    @property
    def quantisation(self) -> Quantisation: ...

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template."""
        ...

    def identity(self) -> Identity:
        """What makes KV state incompatible, besides the weights file.

        The backend's name and native build, KV element types, every context property that
        changes the layout or the meaning of state; for a model without a file also whatever
        stands for its weights. Called once, after the context was opened.
        """
        ...

    def open_context(self) -> Context:
        """The context, as ``BackendRequest.context`` described it. Called on the worker.

        Called again, on another thread, when a call in the context before did not come back; that
        one may come back, and be closed, later. Raises ModelLoadError.
        """
        ...

    def new_sampler(self, params: SamplingParams, history: PackedTokens) -> Sampler:
        """A sampler for one request whose context so far ends in ``history``."""
        ...

    def close(self) -> None:
        """Free the weights; the context is closed by then. Idempotent."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """Optional ability of a BackendModel: sentence embeddings. Thread-safe."""

    def embed(self, tokens: PackedTokens) -> Sequence[float]:
        """One vector for the whole text. Raises NotSupported when the model has none."""
        ...


class Adapter(Protocol):
    """The weights of a LoRA adapter, for the model that loaded them."""

    def close(self) -> None:
        """Free them. Idempotent, any thread; also after the model was closed, which frees them.

        They are attached to no context but such as were given up, in which a call may still
        compute with them: until it comes back they stay.
        """
        ...


@runtime_checkable
class Adapts(Protocol):
    """Optional ability of a BackendModel: LoRA adapters."""

    def load_adapter(self, path: Path) -> Adapter:
        """Read an adapter; nothing computes with it yet. Any thread, while contexts compute.

        ``path`` is an existing, readable file, but may be anything. Raises AdapterLoadError,
        whose ``reason`` is what the native side said; EngineClosed.
        """
        ...

    def attach(self, context: Context, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Have a context of this model compute with these adapters, and with no others.

        Each comes with its scale, a number that a 32-bit float holds and that is not 0. Their
        order must not matter. Called on the context's thread, while all its sequences are
        empty. Raises AdapterLoadError when the model cannot compute with them; which ones are
        attached is then undefined, until a call succeeds.
        """
        ...


@runtime_checkable
class Constrains(Protocol):
    """Optional ability of a BackendModel: replies under a grammar. Thread-safe."""

    def new_constrained_sampler(
        self, params: SamplingParams, history: PackedTokens, constraint: Constraint
    ) -> ConstrainedSampler:
        """Like ``new_sampler``, for a reply that the constraint governs from its first token on.

        Raises InvalidGrammar for a grammar that the backend cannot follow.
        """
        ...

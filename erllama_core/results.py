"""What requests give back: frozen records, shared by streams, models and the engine."""

from __future__ import annotations

from typing import Literal, NewType

import attrs

CacheKey = NewType("CacheKey", bytes)
"""``key(n)``: 32 bytes that name the first n tokens of a context within a namespace."""

HitKind = Literal["exact", "partial", "cold", "sticky", "continuation"]
FinishReason = Literal["stop", "length", "cancelled"]
Phase = Literal["idle", "prefilling", "generating"]


@attrs.frozen
class CacheDelta:
    """Tokens that a request took from the cache, and tokens that it hands to it."""

    read: int = 0
    created: int = 0


@attrs.frozen
class CacheHit:
    """The last look-up of a model: its kind and the tokens that it reused."""

    kind: HitKind
    prefix_len: int


@attrs.frozen
class GateEstimate:
    """What the cost gate expects of stored state, and how much of it was left alone."""

    withheld_tokens: int
    """Stored tokens that were computed, as that was expected to be clearly sooner."""
    restore_s: float
    """Restoring those tokens; when none were withheld, all that is stored of the prompt."""
    compute_s: float
    """Computing the same tokens."""


@attrs.frozen(kw_only=True)
class Explanation:
    """Why a request reused what it did, and not more."""

    kind: HitKind
    reused_tokens: int
    stored_tokens: int
    """How much of the prompt's state is stored without a gap, reusable or not."""
    tiers: tuple[str, ...]
    """Where the state came from; ``"save buffer"`` for what was still on its way."""
    restored_bytes: int
    restore_s: float
    diverges_at: int | None
    """Index of the first prompt token that is not stored; None when all of it is."""
    prompt_text: str
    """The prompt around that token."""
    stored_text: str | None
    """How the nearest stored context goes on there; None where it ends."""
    reason: str
    """All of it in a sentence."""
    gate: GateEstimate | None = None
    """What the cost gate made of it; None where it had no say: it is off, nothing is stored, or
    what is stored is exempt."""
    saving: str | None = None
    """What of this context is saved late or not at all, and why; None: its prompt is saved as it
    is computed, and the rest when the reply has ended."""


@attrs.frozen
class TokenLogprob:
    """How likely the model took a token to be, out of its whole vocabulary.

    By the model's logits as they are: before temperature, penalties, and any grammar. In a stream
    it comes as an event, before those of the token's text.
    """

    token: int
    data: bytes
    """The token's own bytes."""
    logprob: float
    """The natural logarithm of its probability."""
    top: tuple[TokenLogprob, ...] = ()
    """The most likely tokens at its place, in order; as many as were asked for."""


@attrs.frozen
class Stats:
    """How a request went. Durations are seconds; tokens are counts.

    ``committed_tokens == prompt_tokens + completion_tokens``, the length of the context that
    the request leaves behind; only a request that was cancelled before its first token commits
    less: what was computed of its prompt.
    """

    prompt_tokens: int
    completion_tokens: int
    generated: tuple[int, ...]
    committed_tokens: int
    finish_key: CacheKey | None
    """Names the whole context, when it will be saved; None when it is too short to be."""
    finish_reason: FinishReason
    cancelled: bool
    cache_hit_kind: HitKind
    cache_delta: CacheDelta
    restored_bytes: int
    """Bytes of stored state that were imported."""
    queue_s: float
    """From the call until a sequence was free."""
    restore_s: float
    """Reading, checking and importing stored state; 0.0 for a cold request."""
    prefill_s: float
    """Computing the part of the prompt that was not restored; 0.0 for an exact hit."""
    first_token_s: float | None
    """From the call until the first token was sampled; None when there was none."""
    decode_s: float
    """From the first token to the end of generation."""
    stop_sequence: str | None = None
    """The stop sequence that ended the reply."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token of ``generated``, for a request with ``logprobs``."""
    grammar_rejections: int = 0
    """Tokens that were drawn and did not fit the request's grammar, so that others came."""
    explain: Explanation | None = None
    """For a request with ``explain=True``."""


@attrs.frozen
class Completion:
    """A finished reply, and what it cost."""

    reply: str
    generated: tuple[int, ...]
    context_tokens: tuple[int, ...]
    """Prompt and reply as the model saw them."""
    committed_tokens: int
    finish_key: CacheKey | None
    cache_hit_kind: HitKind
    cache_delta: CacheDelta
    finish_reason: FinishReason
    stats: Stats
    stop_sequence: str | None = None
    """The stop sequence that ended the reply, which has nothing of it."""
    thinking: str = ""
    thinking_signature: bytes = b""
    """Of all thinking of the reply; empty without thinking, or without a key."""
    tool_calls: tuple[bytes, ...] = ()
    """Exactly as the model wrote them."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token of ``generated``, for a request with ``logprobs``."""


@attrs.frozen(kw_only=True)
class Replay:
    """A turn of a model that is kept under an id, to be put into a later prompt unchanged."""

    generated: tuple[int, ...]
    """Every token that was drawn."""
    data: bytes
    """Their bytes: thinking and tool calls with their markers, and the text between."""
    reply: str
    """The text alone, as :class:`Completion` had it."""
    prompt_end: tuple[int, ...]
    """The last tokens of the prompt that it answered."""


@attrs.frozen
class Prefill:
    """A prompt that was computed and saved."""

    finish_key: CacheKey | None
    """Names it, when it will be saved; None when it is too short to be."""
    committed_tokens: int
    cache_hit_kind: HitKind
    cache_delta: CacheDelta
    is_pinned: bool = False
    """Whether a tier keeps it, as ``pin=True`` asks; False where nothing was saved, too."""


@attrs.frozen(kw_only=True)
class AdapterInfo:
    """A LoRA adapter of a model."""

    name: str
    path: str
    """The file, as it was given."""
    scale: float
    """The factor of what it adds to the weights: 1.0 as it was trained, 0.0 no effect."""
    fingerprint: str
    """SHA-256 of the file, hexadecimal."""


@attrs.frozen
class ModelInfo:
    """A loaded model as an observer sees it; read without waiting for its worker."""

    id: str
    backend: str
    description: str
    """What the backend says of the weights, for a person."""
    status: Phase
    context_size: int
    n_ctx: int
    n_seq_max: int
    available_seqs: int
    """Sequences that no request has."""
    pinned_idle_seqs: int
    """Of these, the ones that hold a session's context."""
    prefill_tokens_per_s: float
    """Of late; 0.0 until it was measured."""
    decode_tokens_per_s: float
    """Of all replies together, of late; 0.0 until it was measured."""
    preemptions: int
    """How often a request lost its cells to others for a while."""
    quarantined_contexts: int
    """Contexts whose native call never returned; their memory is not given back."""
    kv_class: str
    n_vocab: int
    fingerprint: str
    """Hexadecimal."""
    quant_type: str
    quant_bits: int
    tiers: tuple[str, ...]

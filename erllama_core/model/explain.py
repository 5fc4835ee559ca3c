"""Saying why a prompt hits or misses."""

from __future__ import annotations

from typing import Final

import attrs

from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.lookup import Divergence, Match
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import KVClass, Vocabulary
from erllama_core.results import Explanation, GateEstimate, HitKind

_AROUND: Final = 12
"""Tokens of text that are shown on either side of a divergence."""
_RESPELT: Final = "; they were found by their text, and stand for other tokens of the prompt"


@attrs.frozen
class Finding:
    """What a look-up found, before it is put into words."""

    n_tokens: int
    stored_tokens: int
    reusable_tokens: int
    divergence: Divergence
    prompt_around: bytes
    """Packed prompt tokens around the divergence."""
    respelt: bool = False
    """The prompt was found by its text; ``n_tokens`` are those of the stored context's."""
    obstacle: str | None = None
    """Why what was found was not used, when it was not."""
    gate: GateEstimate | None = None
    """What the cost gate made of it, where it had a say."""


def examine(
    space: ModelSpace, keys: ContextKeys, match: Match, *, respelt: bool = False
) -> Finding:
    """What a look-up found of a prompt. Thread-safe."""
    n = len(keys)
    stored = max(match.covered, match.length)
    around = keys.slice(max(0, stored - _AROUND), min(n, stored + _AROUND))
    divergence = space.divergence(keys, stored)
    return Finding(n, stored, match.length, divergence, around, respelt=respelt)


def explain(
    finding: Finding,
    vocabulary: Vocabulary,
    kv_class: KVClass,
    *,
    kind: HitKind,
    reused_tokens: int,
    tiers: tuple[str, ...] = (),
    restored_bytes: int = 0,
    restore_s: float = 0.0,
    saving: str | None = None,
) -> Explanation:
    """A finding, and what came of it, for a person."""

    def text(packed: bytes) -> str:
        return vocabulary.detokenize(packed).decode("utf-8", "replace")

    stored_next = finding.divergence.stored_next[: 4 * _AROUND]
    whole = finding.stored_tokens >= finding.n_tokens
    return Explanation(
        kind=kind,
        reused_tokens=reused_tokens,
        stored_tokens=finding.stored_tokens,
        tiers=tiers,
        restored_bytes=restored_bytes,
        restore_s=restore_s,
        diverges_at=None if whole else finding.stored_tokens,
        prompt_text=text(finding.prompt_around),
        stored_text=text(stored_next) if stored_next else None,
        reason=_reason(finding, kv_class, reused_tokens) + (_RESPELT if finding.respelt else ""),
        gate=finding.gate,
        saving=saving,
    )


def _reason(finding: Finding, kv_class: KVClass, reused: int) -> str:
    n, stored = finding.n_tokens, finding.stored_tokens
    if finding.obstacle is not None:
        return finding.obstacle
    gate = finding.gate
    if gate is not None and gate.withheld_tokens:
        return (
            f"the cost gate: {gate.withheld_tokens} tokens that are stored are computed, which is "
            f"expected to take {gate.compute_s:.3g} s, where restoring them would take "
            f"{gate.restore_s:.3g} s"
        )
    if reused == n:
        return f"all {n} tokens and the logits after them are stored"
    if kv_class is not KVClass.SPAN:
        where = f"at {reused} tokens" if reused else "nowhere along this prompt"
        return (
            f"the state of this model cannot be cut, and one that can be reused is stored {where}"
        )
    if stored >= n:
        return (
            f"all {n} tokens are stored, but no logits after them that would do for this "
            "request's sampling, so the last one is computed"
        )
    if not stored and not finding.divergence.stored_next:
        return "nothing is stored that begins like this prompt, under this model and cache_salt"
    if finding.divergence.is_out_of_reach:
        return (
            f"the first {stored} tokens can be read; more is stored, in tiers that this model does "
            "not use or that do not answer"
        )
    if finding.divergence.stored_next:
        return f"the first {stored} tokens are stored; the stored context goes on differently there"
    return f"the first {stored} tokens are stored; the stored context ends there"

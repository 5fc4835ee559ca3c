"""When a context is saved, how it is cut, and which tiers get it."""

from __future__ import annotations

from typing import Final, Literal

import attrs

from erllama_core.providers import ByteSize

WriteMode = Literal["through", "back"]


LIVE_POLICY: Final = frozenset(
    {
        "min_tokens",
        "cold_min_tokens",
        "cold_max_tokens",
        "continued_interval",
        "snapshot_interval",
        "snapshot_bytes_max",
        "boundary_trim_tokens",
        "prefill_chunk_size",
        "stall_target_ms",
        "evict_save_timeout_ms",
    }
)
"""Fields that can change while a model is loaded. Another ``boundary_align_tokens`` would make
its stored state unreadable, and the rest is settled when it joins the cache."""


@attrs.frozen(kw_only=True)
class SavePolicy:
    """The save policy of a model: ``[cache]``, overridden by the model's ``policy`` table.

    All counts are tokens, but for those in milliseconds, ``…_ms``.
    """

    min_tokens: int = 64
    """Contexts shorter than this are not saved at all."""
    cold_min_tokens: int = 64
    """Prompts shorter than this are not saved while they are computed."""
    cold_max_tokens: int | None = None
    """No more than this much of a prompt is saved while it is computed. None: all of it."""
    continued_interval: int = 256
    """A reply is saved when it has grown by this much and by a whole block. 0: only when it is
    finished."""
    snapshot_interval: int = 512
    """About how far apart snapshots are taken of a prompt, for models whose state cannot be cut.
    0: only at its end and where it opens the reply."""
    snapshot_bytes_max: ByteSize = ByteSize(512 << 20)  # noqa: RUF009 - an int, and frozen
    """What the snapshots along one context take at most in each tier; three are kept in any
    case."""
    boundary_trim_tokens: int = 0
    """So many tokens at the end of a prompt are not saved while it is computed, nor is what is
    left of the block that they are in. 0: the prompt is saved to its end."""
    boundary_align_tokens: int = 256
    """No stored block crosses a multiple of this; it is also the longest block."""
    prefill_chunk_size: int | None = None
    """Prompt tokens in one step, at most. None: a quarter of n_batch, 64 at least."""
    stall_target_ms: int = 100
    """While replies are generated, prompts get no more of a step than is computed in this time.
    0: as much as ``prefill_chunk_size`` says."""
    evict_save_timeout_ms: int = 30_000
    """How long a save of running requests, and the last one before a model is closed, waits
    until it is written. 0: not at all."""
    cost_gate: Literal["auto", "off"] = "auto"
    """``"auto"``: what is clearly sooner computed than restored is computed, where the backend
    can tell what things cost. ``"off"``: whatever is stored is restored."""

    write: WriteMode = "through"
    """``"through"``: every tier of the model gets what is saved. ``"back"``: the first that takes
    it, and the next one when it is evicted there; finished contexts also a tier that lasts."""
    promote: bool = True
    """Keep what was read from a further tier in the nearest one in memory as well."""

    def cold_boundary(self, prompt: int, align_tokens: int) -> int:
        """Up to where a prompt of so many tokens is saved while it is computed; 0: not at all.

        Where that is not the prompt's end it is the end of a whole block.
        """
        if prompt < max(self.min_tokens, self.cold_min_tokens):
            return 0
        limit = max(0, prompt - self.boundary_trim_tokens)
        if self.cold_max_tokens is not None:
            limit = min(limit, self.cold_max_tokens)
        return limit if limit == prompt else limit - limit % align_tokens

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, as (field, message); empty when nothing is."""
        found: list[tuple[str, str]] = []
        for name, least in (
            ("min_tokens", 0),
            ("cold_min_tokens", 0),
            ("cold_max_tokens", 1),
            ("continued_interval", 0),
            ("snapshot_interval", 0),
            ("snapshot_bytes_max", 0),
            ("boundary_trim_tokens", 0),
            ("boundary_align_tokens", 1),
            ("prefill_chunk_size", 1),
            ("stall_target_ms", 0),
            ("evict_save_timeout_ms", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append((name, f"{value} is too small; at least {least}"))
        longest, align = self.cold_max_tokens, self.boundary_align_tokens
        if longest is not None and longest < self.cold_min_tokens:
            message = (
                f"{longest} is below cold_min_tokens ({self.cold_min_tokens}), "
                "so no prompt would ever be saved"
            )
            found.append(("cold_max_tokens", message))
        elif self.boundary_trim_tokens and (longest or align) < align:
            message = (
                f"{longest} is below boundary_align_tokens ({align}), and with "
                "boundary_trim_tokens only whole blocks of a prompt are saved: none would be"
            )
            found.append(("cold_max_tokens", message))
        return found

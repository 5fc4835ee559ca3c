"""When a context is saved, how it is cut, and which tiers get it."""

from __future__ import annotations

from typing import Literal

import attrs

WriteMode = Literal["through", "back"]


@attrs.frozen(kw_only=True)
class SavePolicy:
    """The save policy of a model: ``[cache]``, overridden by the model's ``policy`` table.

    All counts are tokens.
    """

    min_tokens: int = 64
    """Contexts shorter than this are not saved at all."""
    cold_min_tokens: int = 64
    """Prompts shorter than this are not saved while they are computed."""
    cold_max_tokens: int | None = None
    """No more than this much of a prompt is saved while it is computed. None: all of it."""
    continued_interval: int = 256
    """A reply is saved when it has grown by this much and by a whole block. 0: only when it is
    finished, which is also when models are saved whose state cannot be cut."""
    boundary_align_tokens: int = 256
    """No stored block crosses a multiple of this; it is also the longest block."""
    prefill_chunk_size: int | None = None
    """Prompt tokens in one step, at most. None: a quarter of n_batch, 64 at least."""
    write: WriteMode = "through"
    """``"through"``: every tier of the model gets what is saved. ``"back"``: the first that takes
    it, and the next one when it is evicted there; finished contexts also a tier that lasts."""
    promote: bool = True
    """Keep what was read from a further tier in the nearest one in memory as well."""

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, as (field, message); empty when nothing is."""
        found: list[tuple[str, str]] = []
        for name, least in (
            ("min_tokens", 0),
            ("cold_min_tokens", 0),
            ("cold_max_tokens", 1),
            ("continued_interval", 0),
            ("boundary_align_tokens", 1),
            ("prefill_chunk_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append((name, f"{value} is too small; at least {least}"))
        if self.cold_max_tokens is not None and self.cold_max_tokens < self.cold_min_tokens:
            message = (
                f"{self.cold_max_tokens} is below cold_min_tokens ({self.cold_min_tokens}), "
                "so no prompt would ever be saved"
            )
            found.append(("cold_max_tokens", message))
        return found

"""What listeners are told: frozen records, one for each notification hook.

They say what happened, never a prompt's or a reply's text.
"""

from __future__ import annotations

from typing import Literal

import attrs

from erllama_core.interfaces.pressure import Reading
from erllama_core.results import CacheKey, ModelInfo, Stats


@attrs.frozen(kw_only=True)
class ModelLoaded:
    """A model can take requests."""

    model: ModelInfo
    seconds: float
    """How long loading took."""


@attrs.frozen(kw_only=True)
class RequestFinished:
    """A request's caller was answered. A request that was refused by the call itself is none."""

    model_id: str
    request_id: int
    stats: Stats | None
    """As its ``Done`` has them; None when it ended with an error that has none."""
    error: Exception | None
    """What it ended with; None when it was answered, cancelled requests included."""


CacheAction = Literal["stored", "dropped", "evicted", "corrupt"]


@attrs.frozen(kw_only=True)
class CacheEvent:
    """Something became of a stored object in one tier."""

    action: CacheAction
    """``stored``: it can be read from there, also after a restart where the tier lasts.
    ``dropped``: the tier did not take it. ``evicted``: removed for others or for memory.
    ``corrupt``: it was not what it claimed to be, and was removed."""
    tier: str
    kind: str
    """``"kv"``, ``"snapshot"``, ``"logits"``, ``"replay"``."""
    key: CacheKey
    size_bytes: int
    save_reason: str
    """Why it was saved; empty where that is not known any more."""


@attrs.frozen(kw_only=True)
class PressureSampled:
    """The pressure monitor has read its sources."""

    readings: tuple[Reading, ...]
    usage: float
    """The highest of their usages, 0.0 to 1.0."""
    released_bytes: int
    """What was given back because of it; 0 when nothing had to be."""


Notification = ModelLoaded | RequestFinished | CacheEvent | PressureSampled

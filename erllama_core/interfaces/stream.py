"""What happens to tokens on their way out: processors, segments and the events delivered.

A pipeline is a list of processors. Each sampled token enters the first one as one segment of
reply bytes; each processor gets the segments that the one before it let through, and returns
those that it lets through itself. Behind the last one segments become events.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import attrs

from erllama_core.results import Stats

# ------------------------------------------------------------------- events


@attrs.frozen
class TextDelta:
    """More of the reply. ``data`` is exact; ``text`` never splits a character."""

    text: str
    data: bytes


@attrs.frozen
class Done:
    """The end of every stream that ends without an error; always last."""

    stats: Stats


Event = TextDelta | Done

# --------------------------------------------------------------- processors


class Channel(enum.Enum):
    """Which events a segment's bytes become."""

    TEXT = "text"


@attrs.frozen(slots=True)
class Segment:
    """Some bytes of one channel."""

    channel: Channel
    data: bytes


class StreamProcessor(Protocol):
    """A state machine for one request, on the model's worker thread: it must not block.

    What it raises ends its request with PluginFailed, and no other.
    """

    def feed(self, token: int, segments: Sequence[Segment]) -> Sequence[Segment]:
        """One token was sampled; ``segments`` is what reached this processor of it.

        ``token`` is -1 for what an earlier processor held back until the end. Returns what
        goes on, now: bytes may be held back and returned by a later call.
        """
        ...

    def flush(self) -> Sequence[Segment]:
        """Generation has ended: what was held back. Called once, after the last ``feed``."""
        ...

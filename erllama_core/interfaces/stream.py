"""What happens to tokens on their way out: processors, and the events delivered.

A pipeline is a row of processors, made anew for each request. The bytes of each sampled token
enter the first one; each sends on, at once or later, what the next one is to see, and what
comes out behind the last one is the reply's text. A processor can also emit events, end the
request, and say which sampler the next token is drawn with: all through its :class:`Outlet`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Literal, Protocol

import attrs

from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.prompt import Prompt
from erllama_core.results import Stats, TokenLogprob

# ------------------------------------------------------------------- events


@attrs.frozen
class TextDelta:
    """More of the reply. ``data`` is exact; ``text`` never splits a character."""

    text: str
    data: bytes


@attrs.frozen
class ThinkingDelta:
    """More of what the model thinks. ``data`` is exact; ``text`` never splits a character."""

    text: str
    data: bytes


@attrs.frozen
class ThinkingEnd:
    """A block of thinking is over."""

    signature: bytes
    """HMAC-SHA-256 over the ``data`` of the block's deltas; empty when the engine has no key."""
    signature_so_far: bytes = attrs.field(default=b"", eq=False)
    """The same over all thinking of the reply up to here: the same, unless there were several
    blocks."""


@attrs.frozen
class ToolCallDelta:
    """More of a tool call, as the model wrote it, control tokens included."""

    data: bytes


@attrs.frozen
class ToolCallEnd:
    """A tool call is whole. ``data``: that of its deltas, one after another."""

    data: bytes


@attrs.frozen
class Done:
    """The end of every stream that ends without an error; always last."""

    stats: Stats


Event = TextDelta | ThinkingDelta | ThinkingEnd | ToolCallDelta | ToolCallEnd | TokenLogprob | Done

# --------------------------------------------------------------- processors


class Channel(enum.Enum):
    """What bytes on their way through a pipeline are."""

    TEXT = "text"
    """Text of the reply."""
    CONTROL = "control"
    """The text of a control token. It may be, or be part of, a marker; of what is left behind
    the last processor nothing is delivered."""


NextSampler = Literal["request", "greedy"]


class Outlet(Protocol):
    """A processor's way to the processors behind it, and to the request. For its thread alone."""

    def send(self, token: int, data: bytes, channel: Channel) -> None:
        """Hand bytes to the next processor, which has taken them in when this returns."""
        ...

    def emit(self, event: Event) -> None:
        """Deliver an event, behind all that was sent before.

        The processors behind are flushed first, so that the order is kept.
        """
        ...

    def end(self, stop_sequence: str | None = None) -> None:
        """End generation with this token, the finish reason being ``"stop"``.

        What was sent and emitted before is delivered, whoever holds it back; nothing else is.
        """
        ...

    def use_sampler(self, which: NextSampler) -> None:
        """Draw tokens with the request's sampler, or greedily, until told otherwise.

        Where several processors have a say, one that wants ``"greedy"`` is enough.
        """
        ...

    def hold_span(self, held: bool) -> None:
        """Say whether what is fed now belongs to a part that this processor has opened.

        A processor before it leaves its own markers alone meanwhile: see ``span_behind``.
        """
        ...

    @property
    def span_behind(self) -> bool:
        """Whether a processor behind this one holds a span, after all that was sent so far."""
        ...


class StreamProcessor(Protocol):
    """A state machine for one request, on the model's worker thread: it must not block.

    What it raises ends its request with PluginFailed, and no other.
    """

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        """Bytes arrived, never none; ``token`` is the one that was sampled last.

        They are not always that token's own: a processor before this one may have held them
        back. ``token`` is -1 when it did so until something interrupted or ended the text.
        """
        ...

    def flush(self) -> None:
        """An event of a processor before this one comes between: send what is held back.

        Text before and after an event is not one text. What is open may stay open.
        """
        ...

    def finish(self) -> None:
        """Generation has ended: send what is held back, close what is open. Called once, last."""
        ...


class RunningSignature(Protocol):
    """HMAC-SHA-256, with the engine's key, of bytes that come one after another."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes:
        """Of all bytes so far; empty when the engine has no key."""
        ...


@attrs.frozen(kw_only=True)
class ProcessorRequest:
    """What a processor's factory gets."""

    options: Any
    """An instance of the provider's ``config`` class."""
    outlet: Outlet
    """To send, emit or end with only once the factory has returned."""
    vocabulary: Vocabulary
    prompt: Prompt
    stop_sequences: tuple[str, ...] = ()
    thinking: bool = False
    thinking_budget_tokens: int | None = None
    """Above 0, or None: no cap."""
    thinking_markers: ThinkingMarkers | None = None
    """The model's; None for one that does not think."""
    tool_call_markers: ToolCallMarkers | None = None
    begin_signature: Callable[[], RunningSignature]

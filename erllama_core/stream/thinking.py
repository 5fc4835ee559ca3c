"""Thinking: the part of a reply between two markers, as events of its own."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.markers import ThinkingMarkers
from erllama_core.interfaces.stream import (
    Channel,
    Outlet,
    ProcessorRequest,
    RunningSignature,
    ThinkingDelta,
    ThinkingEnd,
)
from erllama_core.prompt import Prompt
from erllama_core.stream.marked import MarkedProcessor, marker_automaton
from erllama_core.stream.scanner import Found
from erllama_core.stream.utf8 import Characters

_TAIL_TOKENS: Final = 256
"""How much of a prompt's end is searched for a block that it opens."""


class _State(enum.Enum):
    OUTSIDE = enum.auto()
    INSIDE = enum.auto()
    CAPPED = enum.auto()
    """The model still thinks, but as many deltas as were asked for have been delivered."""


class Thinking(MarkedProcessor):
    """Makes ThinkingDelta and ThinkingEnd of what is between the markers."""

    def __init__(
        self,
        outlet: Outlet,
        markers: ThinkingMarkers,
        *,
        opened: bool,
        budget: int | None,
        begin_signature: Callable[[], RunningSignature],
    ) -> None:
        self._before = marker_automaton(markers.start)
        self._within = marker_automaton(markers.end)
        super().__init__(outlet, self._within if opened else self._before)
        self._state = _State.INSIDE if opened else _State.OUTSIDE
        self._left = budget
        """Deltas that may still be delivered; None: any number."""
        self._begin_signature = begin_signature
        self._of_block = begin_signature()
        self._of_all = begin_signature()
        self._characters = Characters()
        outlet.hold_span(opened)

    @classmethod
    def for_request(cls, request: ProcessorRequest) -> Thinking | None:
        """None for a model without markers, and for a request without thinking."""
        markers = request.thinking_markers
        if markers is None or not request.thinking:
            return None
        return cls(
            request.outlet,
            markers,
            opened=opens_thinking(request.prompt, request.vocabulary, markers),
            budget=request.thinking_budget_tokens,
            begin_signature=request.begin_signature,
        )

    def finish(self) -> None:
        super().finish()
        if self._state is _State.INSIDE:
            self._deliver(last=True)
        if self._state is _State.INSIDE:
            self._end_block()

    def _between(self, token: int, data: bytes, channel: Channel) -> None:
        if self._state is not _State.INSIDE:
            self._outlet.send(token, data, channel)
        elif channel is Channel.TEXT:
            self._gathered += data

    def _met(self, token: int, found: Found) -> None:
        if self._state is _State.INSIDE:
            self._deliver(last=True)
            if self._state is _State.INSIDE:
                self._end_block()
        elif self._outlet.span_behind:
            self._pass_on(token, found)
            return
        elif self._state is _State.OUTSIDE:
            self._state = _State.CAPPED if self._left == 0 else _State.INSIDE
            self._outlet.hold_span(self._state is _State.INSIDE)
            self._scanner.expect(self._within)
            return
        self._state = _State.OUTSIDE
        self._scanner.expect(self._before)

    def _deliver(self, *, last: bool = False) -> None:
        data = self._characters.feed(bytes(self._gathered))
        self._gathered.clear()
        if last:
            data += self._characters.rest()
        if not data:
            return
        self._of_block.update(data)
        self._of_all.update(data)
        self._outlet.emit(ThinkingDelta(data.decode("utf-8", "replace"), data))
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self._state = _State.CAPPED
                self._end_block()
                rest = self._characters.rest()
                if rest:
                    self._outlet.send(-1, rest, Channel.TEXT)

    def _end_block(self) -> None:
        self._outlet.hold_span(False)
        self._outlet.emit(ThinkingEnd(self._of_block.digest(), self._of_all.digest()))
        self._of_block = self._begin_signature()


def opens_thinking(prompt: Prompt, vocabulary: Vocabulary, markers: ThinkingMarkers) -> bool:
    """Whether the prompt ends within a block: the model goes on thinking.

    What counts is the last start marker, with no end marker and no control token behind it:
    that is, in the turn that the model is to speak. Where no control token is before it
    either, nothing tells turns apart, and it must end the prompt but for white space.
    """
    start, end = markers.start.encode(), markers.end.encode()
    control = vocabulary.control_tokens
    text = bytearray()
    control_at = []
    for token in memoryview(prompt.packed)[-TOKEN_BYTES * _TAIL_TOKENS :].cast("I"):
        if token in control:
            control_at.append(len(text))
        text += vocabulary.piece(token)
    at = text.rfind(start)
    if at < 0:
        return False
    behind = at + len(start)
    if end in text[behind:] or (control_at and control_at[-1] >= behind):
        return False
    return not text[behind:].strip() or bool(control_at)

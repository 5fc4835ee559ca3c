"""Tool calls: the exact bytes that a model writes between two markers."""

from __future__ import annotations

import enum
from typing import Final

from erllama_core.interfaces.markers import END_OF_GENERATION, ToolCallMarkers
from erllama_core.interfaces.stream import (
    Channel,
    Outlet,
    ProcessorRequest,
    ToolCallDelta,
    ToolCallEnd,
)
from erllama_core.stream.marked import MarkedProcessor, marker_automaton
from erllama_core.stream.scanner import Found


class _State(enum.Enum):
    OUTSIDE = enum.auto()
    SYNTAX = enum.auto()
    PAYLOAD = enum.auto()


_MARKERS: Final = {
    # What ends a call ends it within a payload too: a payload that is never closed would
    # swallow the rest of the reply.
    _State.OUTSIDE: ("start",),
    _State.SYNTAX: ("start", "end", "payload_start"),
    _State.PAYLOAD: ("start", "end", "payload_end"),
}


class ToolCalls(MarkedProcessor):
    """Makes ToolCallDelta and ToolCallEnd of what is between the markers.

    Tokens of a call are drawn greedily, but for those between payload markers. A call that
    generation ends within is not whole and has no ToolCallEnd, unless its end marker says that
    the end of generation ends it.
    """

    def __init__(self, outlet: Outlet, markers: ToolCallMarkers) -> None:
        texts = markers.texts()
        self._names = {
            state: [name for name in names if name in texts] for state, names in _MARKERS.items()
        }
        self._automata = {
            state: marker_automaton(*[texts[name] for name in names])
            for state, names in self._names.items()
        }
        super().__init__(outlet, self._automata[_State.OUTSIDE])
        self._ends_with_generation = markers.end == END_OF_GENERATION
        self._state = _State.OUTSIDE
        self._call = bytearray()

    @classmethod
    def for_request(cls, request: ProcessorRequest) -> ToolCalls | None:
        """None for a model without markers."""
        markers = request.tool_call_markers
        return None if markers is None else cls(request.outlet, markers)

    def finish(self) -> None:
        super().finish()
        if self._state is not _State.OUTSIDE and self._ends_with_generation:
            self._end_call()

    def _between(self, token: int, data: bytes, channel: Channel) -> None:
        if self._state is _State.OUTSIDE:
            self._outlet.send(token, data, channel)
        else:
            self._gathered += data

    def _met(self, token: int, found: Found) -> None:
        name = self._names[self._state][found.number]
        if name == "start":
            if self._state is not _State.OUTSIDE:
                self._end_call()
            elif self._outlet.span_behind:
                self._pass_on(token, found)
                return
            self._outlet.hold_span(True)
            self._turn(_State.SYNTAX)
        elif name == "end":
            self._end_call()
        else:
            self._pass_on(token, found)
            self._turn(_State.PAYLOAD if name == "payload_start" else _State.SYNTAX)

    def _turn(self, state: _State) -> None:
        self._state = state
        self._scanner.expect(self._automata[state])
        self._outlet.use_sampler("greedy" if state is _State.SYNTAX else "request")

    def _end_call(self) -> None:
        if self._gathered:
            self._deliver()
        self._outlet.emit(ToolCallEnd(bytes(self._call)))
        self._call.clear()
        self._outlet.hold_span(False)
        self._turn(_State.OUTSIDE)

    def _deliver(self) -> None:
        data = bytes(self._gathered)
        self._gathered.clear()
        self._call += data
        self._outlet.emit(ToolCallDelta(data))

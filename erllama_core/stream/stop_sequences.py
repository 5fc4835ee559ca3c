"""Stop sequences: texts that end a reply where they begin."""

from __future__ import annotations

from erllama_core.interfaces.stream import Channel, Outlet, ProcessorRequest
from erllama_core.stream.marked import MarkedProcessor
from erllama_core.stream.scanner import Automaton, Found


class StopSequences(MarkedProcessor):
    """Ends the request at the first stop sequence, of which nothing is delivered.

    A control token has no text in the reply, and does not come between.
    """

    def __init__(self, outlet: Outlet, sequences: tuple[str, ...]) -> None:
        super().__init__(outlet, Automaton([sequence.encode() for sequence in sequences]))
        self._sequences = sequences

    @classmethod
    def for_request(cls, request: ProcessorRequest) -> StopSequences | None:
        """None for a request without stop sequences."""
        return cls(request.outlet, request.stop_sequences) if request.stop_sequences else None

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        if channel is Channel.TEXT:
            super().feed(token, data, channel)
        else:
            self._outlet.send(token, data, channel)

    def _met(self, token: int, found: Found) -> None:
        del token
        self._outlet.end(self._sequences[found.number])

"""What processors that look for texts in the stream share."""

from __future__ import annotations

import functools
from collections import deque

from erllama_core.interfaces.stream import Channel, Outlet
from erllama_core.stream.scanner import Automaton, Found, Run, Scanner


class MarkedProcessor:
    """A stream processor that does one thing with texts, and another with what is between.

    One that opens spans gathers their bytes in ``_gathered``, so that a token makes one event
    of them at most.
    """

    def __init__(self, outlet: Outlet, automaton: Automaton) -> None:
        self._outlet = outlet
        self._scanner = Scanner(automaton)
        self._gathered = bytearray()

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        scanner = self._scanner
        if not scanner.held and scanner.starts.isdisjoint(data):
            self._between(token, data, channel)
        else:
            self._scan(token, [(data, channel)])
        if self._gathered:
            self._deliver()

    def flush(self) -> None:
        while self._scanner.held:
            free, found = self._scanner.finish()
            for data, channel in free:
                self._between(-1, data, channel)
            if found is not None:
                self._met(-1, found)
                self._scan(-1, found.rest)
        if self._gathered:
            self._deliver()

    def finish(self) -> None:
        self.flush()

    def _scan(self, token: int, runs: list[Run]) -> None:
        waiting = deque(runs)
        while waiting:
            free, found = self._scanner.feed(*waiting.popleft())
            for data, channel in free:
                self._between(token, data, channel)
            if found is not None:
                waiting.extendleft(reversed(found.rest))
                self._met(token, found)

    def _pass_on(self, token: int, found: Found) -> None:
        """It stands where it is no marker."""
        for data, channel in found.runs:
            self._between(token, data, channel)

    def _between(self, token: int, data: bytes, channel: Channel) -> None:
        """Bytes that belong to none of the texts."""
        self._outlet.send(token, data, channel)

    def _met(self, token: int, found: Found) -> None:
        """One of the texts."""
        raise NotImplementedError

    def _deliver(self) -> None:
        """Make an event of what was gathered."""
        raise NotImplementedError


@functools.lru_cache(maxsize=128)
def marker_automaton(*markers: str) -> Automaton:
    """For the markers of a model, which all its requests share."""
    return Automaton([marker.encode() for marker in markers])

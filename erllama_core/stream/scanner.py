"""Finding the first of some byte strings in bytes that come in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs

from erllama_core.interfaces.stream import Channel

Run = tuple[bytes, Channel]
"""Bytes of one kind."""


class Automaton:
    """Aho-Corasick over some byte strings, none empty. Immutable: any scanners may share it.

    Nodes are the beginnings of the strings, node 0 the empty one.
    """

    def __init__(self, patterns: Sequence[bytes]) -> None:
        self.lengths: Final = tuple(map(len, patterns))
        self.starts: Final = frozenset(pattern[0] for pattern in patterns)
        """The bytes that a match may begin with."""
        self.none: Final = len(patterns)
        """Stands for no string, behind all others."""
        self.children: Final[list[dict[int, int]]] = [{}]
        self.depth: Final = [0]
        own = [self.none]
        for number, pattern in enumerate(patterns):
            node = 0
            for byte in pattern:
                below = self.children[node].get(byte)
                if below is None:
                    below = self.children[node][byte] = len(self.depth)
                    self.children.append({})
                    self.depth.append(self.depth[node] + 1)
                    own.append(self.none)
                node = below
            own[node] = min(own[node], number)
        self.fail: Final = [0] * len(own)
        """The longest shorter suffix of a node that is a node too."""
        self.match: Final = list(own)
        """The longest string that a node ends in."""
        self.first_below: Final = [self.none] * len(own)
        """Of the strings that a node is the beginning of, the one that is listed first."""
        for node in self._breadth_first():
            if self.match[node] == self.none:
                self.match[node] = self.match[self.fail[node]]
        for node in range(len(own) - 1, -1, -1):  # what is below a node has a larger number
            for below in self.children[node].values():
                first = min(own[below], self.first_below[below])
                self.first_below[node] = min(self.first_below[node], first)

    def _breadth_first(self) -> list[int]:
        """The nodes but the first, each behind all shorter ones; sets ``fail`` on the way."""
        order = []
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            order.append(node)
            for byte, below in self.children[node].items():
                suffix = self.fail[node]
                while suffix and byte not in self.children[suffix]:
                    suffix = self.fail[suffix]
                self.fail[below] = self.children[suffix].get(byte, 0)
                queue.append(below)
        return order


@attrs.frozen
class Found:
    """One of the strings, and what came with it."""

    number: int
    """Its place in the list."""
    runs: list[Run]
    """The string itself."""
    rest: list[Run]
    """What followed it and was fed already."""


class Scanner:
    """Finds the string that begins first; of those that begin there, the one listed first.

    Holds back the longest end of what was fed that may be the beginning of a match, and no
    more. A match is told once no better one can come.
    """

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self.starts = automaton.starts
        """While nothing is held, bytes that have none of these need not be fed."""
        self.held: list[Run] = []
        """What is held back."""
        self._length = 0
        self._node = 0
        self._best: tuple[int, int] | None = None
        """Where in what is held the best match begins, and its number."""

    def expect(self, automaton: Automaton) -> None:
        """Look for other strings. Only while nothing is held back."""
        self._automaton = automaton
        self.starts = automaton.starts

    def feed(self, data: bytes, channel: Channel) -> tuple[list[Run], Found | None]:
        """What is free to go now, and what was found behind it, if anything was."""
        automaton = self._automaton
        children, fail, match = automaton.children, automaton.fail, automaton.match
        none = automaton.none
        node, position, best = self._node, self._length, self._best
        self.held.append((data, channel))
        for byte in data:
            position += 1
            below = children[node].get(byte)
            while below is None and node:
                node = fail[node]
                below = children[node].get(byte)
            node = below or 0
            number = match[node]
            if number != none:
                candidate = (position - automaton.lengths[number], number)
                best = candidate if best is None else min(best, candidate)
            if best is not None and not self._can_be_beaten(best, node, position):
                return self._take_out(best)
        keep_from = position - automaton.depth[node]
        if best is not None:  # what can beat it began no later, so it is held too
            best = (best[0] - keep_from, best[1])
        free, self.held = _cut(self.held, keep_from)
        self._node, self._length, self._best = node, position - keep_from, best
        return free, None

    def finish(self) -> tuple[list[Run], Found | None]:
        """No more comes: what is free to go then is everything."""
        if self._best is not None:
            return self._take_out(self._best)
        free = self.held
        self._start_over()
        return free, None

    def _can_be_beaten(self, best: tuple[int, int], node: int, position: int) -> bool:
        """Whether a match that began no later than the best one may still become whole."""
        automaton = self._automaton
        start, number = best
        while node:
            begins = position - automaton.depth[node]
            if begins > start:
                return False
            if automaton.first_below[node] < (automaton.none if begins < start else number):
                return True
            node = automaton.fail[node]
        return False

    def _take_out(self, best: tuple[int, int]) -> tuple[list[Run], Found]:
        start, number = best
        before, behind = _cut(self.held, start)
        runs, rest = _cut(behind, self._automaton.lengths[number])
        self._start_over()
        return before, Found(number, runs, rest)

    def _start_over(self) -> None:
        self.held, self._length, self._node, self._best = [], 0, 0, None


def _cut(runs: list[Run], at: int) -> tuple[list[Run], list[Run]]:
    """The runs before and behind the byte ``at``."""
    left: list[Run] = []
    for number, (data, channel) in enumerate(runs):
        if at < len(data):
            right = [(data[at:], channel), *runs[number + 1 :]]
            return ([*left, (data[:at], channel)] if at else left), right
        left.append((data, channel))
        at -= len(data)
    return left, []

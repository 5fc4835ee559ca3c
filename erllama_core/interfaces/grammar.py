"""Grammars: what a reply has to look like, as a backend gets it.

The core reads and checks a request's grammar on the caller's thread; what it hands to a backend
is a :class:`Grammar`, which has both the text, in llama.cpp's GBNF, and the rules read from it.
A backend with an engine of its own for grammars needs the text alone; for one that has none,
:class:`GrammarState` follows a reply along the rules.

The rules are in the form that llama.cpp brings them into as well: repetitions and groups have
become rules of their own. A *stack* is a place in the grammar: positions of elements, the one
that comes next on top, below it where to go on after the rule that it stands in. A reply so far
can stand at several places at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

import attrs

LAST_CHARACTER: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)
_UTF8_LEAST: Final = {2: 0x80, 3: 0x800, 4: 0x10000}
"""The least character of so many bytes."""

Stack = tuple[int, ...]
"""Positions of elements; the last one is on top. Empty: the grammar may end here."""


@attrs.frozen
class CharSet:
    """Characters, as ascending, separate ranges ``(first, last)``, both ends included."""

    ranges: tuple[tuple[int, int], ...]
    _firsts: tuple[int, ...] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_firsts", tuple(first for first, _ in self.ranges))

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], *, negated: bool = False) -> CharSet:
        """From ranges in any order. NUL and surrogates, which no text has, are left out.

        ``negated``: all characters but those.
        """
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        if negated:
            ends = [0, *(last + 1 for _, last in merged)]
            starts = [*(first - 1 for first, _ in merged), LAST_CHARACTER]
            merged = [(a, b) for a, b in zip(ends, starts, strict=True) if a <= b]
        kept = []
        for first, last in merged:
            for low, high in ((1, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, LAST_CHARACTER)):
                if max(first, low) <= min(last, high):
                    kept.append((max(first, low), min(last, high)))
        return cls(tuple(kept))

    def __contains__(self, character: int) -> bool:
        return self.meets(character, character)

    def meets(self, first: int, last: int) -> bool:
        """Whether a character from ``first`` to ``last`` is in it."""
        place = bisect_right(self._firsts, last)
        return place > 0 and self.ranges[place - 1][1] >= first


Element = CharSet | int | None
"""A character of a set, a rule by its number, or None: the end of an alternative."""


@attrs.frozen(eq=False)
class Grammar:
    """A grammar that was read and checked. Immutable.

    Its rules have no left recursion: from any place a finite number of steps leads to the
    characters that may come next.
    """

    text: str
    """GBNF; the rule to begin with is ``root``."""
    elements: tuple[Element, ...]
    """Alternatives one behind the other, each with None at its end."""
    starts: tuple[tuple[int, ...], ...]
    """By rule number, where its alternatives begin in ``elements``."""
    root: int
    """Number of the rule to begin with."""

    def begin(self) -> GrammarState:
        """Before the first character."""
        stacks = tuple((start,) for start in self.starts[self.root])
        return GrammarState(self, self.opened(stacks))

    def opened(self, stacks: Iterable[Stack], most: int | None = None) -> tuple[Stack, ...]:
        """The same places, with rules replaced by what they begin with: on top of each stack is
        a set of characters, or the stack is empty.

        ``most``: raise OverflowError when more than so many stacks are met on the way.
        """
        elements, starts = self.elements, self.starts
        todo = list(stacks)
        seen: set[Stack] = set()
        found: dict[Stack, None] = {}
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            if most is not None and len(seen) > most:
                raise OverflowError("too many places in the grammar at once")
            if not stack:
                found[stack] = None
                continue
            top = elements[stack[-1]]
            if top is None:
                todo.append(stack[:-1])
            elif isinstance(top, int):
                below = stack[:-1]
                if elements[stack[-1] + 1] is not None:
                    below += (stack[-1] + 1,)
                todo.extend((*below, start) for start in starts[top])
            else:
                found[stack] = None
        return tuple(found)

    def step(
        self, stacks: Iterable[Stack], character: int, most: int | None = None
    ) -> tuple[Stack, ...]:
        """The places behind one more character; none when it does not fit. ``most``: as above."""
        elements = self.elements
        after = []
        for stack in stacks:
            if stack:
                top = elements[stack[-1]]
                assert isinstance(top, CharSet)
                if character in top:
                    after.append((*stack[:-1], stack[-1] + 1))
        return self.opened(after, most) if after else ()


@attrs.frozen(eq=False)
class GrammarState:
    """How far a reply has come in its grammar. Immutable."""

    grammar: Grammar
    stacks: tuple[Stack, ...]
    pending: bytes = b""
    """The first bytes of a character that is not whole yet."""

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a whole one."""
        return not self.pending and () in self.stacks

    def allows(self, data: bytes) -> bool:
        """Whether the text may go on with these bytes, which need not be whole characters."""
        return bool(data) and self.after(data) is not None

    def after(self, data: bytes) -> GrammarState | None:
        """The state after more bytes; None when they do not fit."""
        split = _split(self.pending + data)
        if split is None:
            return None
        text, pending = split
        stacks = self.stacks
        for character in text:
            stacks = self.grammar.step(stacks, ord(character))
            if not stacks:
                return None
        if pending and not self._may_become(stacks, pending):
            return None
        return GrammarState(self.grammar, stacks, pending)

    def _may_become(self, stacks: Iterable[Stack], pending: bytes) -> bool:
        """Whether some character that begins with these bytes may come next."""
        first, last = characters_from(pending)
        for stack in stacks:
            if stack:
                top = self.grammar.elements[stack[-1]]
                assert isinstance(top, CharSet)
                if top.meets(first, last):
                    return True
        return False


def _split(data: bytes) -> tuple[str, bytes] | None:
    """The whole characters, and the bytes of one that is cut off; None for invalid UTF-8."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.end < len(data) or error.reason != "unexpected end of data":
            return None
        return data[: error.start].decode(), data[error.start :]


def characters_from(pending: bytes) -> tuple[int, int]:
    """The first and the last character whose UTF-8 begins with these bytes.

    ``pending``: the valid beginning of a character of several bytes, but not all of it.
    """
    lead = pending[0]
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    value = lead & (0x7F >> size)
    for byte in pending[1:]:
        value = value << 6 | byte & 0x3F
    bits = 6 * (size - len(pending))
    first, last = value << bits, (value + 1 << bits) - 1
    first, last = max(first, _UTF8_LEAST[size]), min(last, LAST_CHARACTER)
    if first < _SURROGATES[0] <= last:
        last = _SURROGATES[0] - 1
    return first, last

"""What a chat template may use up: time, steps, and characters that it builds.

A template is a program out of a model file. Python's own limits do not hold it: a string can be
multiplied to any length in one operation, a list of two references to a list of two references,
and so on, is written out in 2**n characters, and neither can be interrupted. So an operation whose
result or duration depends on its operands is paid for before it is done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any, Final

from jinja2 import TemplateError

from erllama_core.model.chat_guard import MAX_DEPTH

MAX_STEPS: Final = 1_000_000
"""Rounds of loops, calls of macros and methods, filters: a thousand times a long chat's."""
MAX_SECONDS: Final = 5.0
"""Of the rendering thread's own time; a chat of a thousand turns takes a hundredth of it."""
MAX_CHARACTERS: Final = 16 << 20
CHARACTERS_PER_INPUT: Final = 128
"""So many more for each character of the messages and variables, and one step more."""
MAX_BITS: Final = 1 << 14
"""Of an integer."""
OBJECT: Final = 64
"""Characters that an object counts for, whatever is in it."""
_REFERENCE: Final = 8
_SCALAR: Final = 8
_WRITTEN_OUT: Final = 10
"""What a character of a string can become when a list that it is in is written out."""
_STEPS_PER_LOOK: Final = 64
_LONG: Final = 1 << 16
"""What costs so much is followed by a look at the clock."""

_CONTAINERS: Final = (list, tuple, dict, Mapping, set, frozenset, ItemsView, ValuesView)


class TooMuch(TemplateError):
    """The template would take longer, or build more, than a template may."""


class Budget:
    """What one rendering has left. One thread; every method may raise TooMuch."""

    __slots__ = ("_characters", "_ends_at", "_input", "_next_look", "_sizes", "_steps")

    def __init__(self, given: object) -> None:
        """``given``: what the template works on, which is measured only when it matters."""
        self._steps = MAX_STEPS
        self._next_look = MAX_STEPS - _STEPS_PER_LOOK
        self._characters = MAX_CHARACTERS
        self._input: object = given
        self._ends_at = time.thread_time() + MAX_SECONDS
        self._sizes: dict[int, tuple[int, object]] = {}
        """By id, with the object, so that no other one gets the id."""

    def step(self, characters: int = 0) -> None:
        """One more round, call or filter, which builds so much."""
        self._steps -= 1
        if self._steps < self._next_look:
            self._look()
        if characters:
            self.pay(characters)

    def pay(self, characters: int) -> None:
        """Take note of what is about to be built."""
        self._characters -= characters
        if self._characters < 0:
            self._extend()
        if characters > _LONG:
            self._look_at_clock()

    def pay_for(self, value: Any) -> None:
        """For all of a value: it is compared, hashed, or made part of a text."""
        if type(value) is str:
            self.pay(len(value))
        elif isinstance(value, _CONTAINERS):
            self.pay(_WRITTEN_OUT * self.size(value))
        elif isinstance(value, str):
            self.pay(_WRITTEN_OUT * len(value))

    def pay_to_search(self, value: Any) -> None:
        """For looking at all of a value, which only takes long in a text that is long."""
        self.step()
        if type(value) is not str:
            self.pay_for(value)
        elif len(value) > _LONG:
            self._look_at_clock()

    def pay_for_items(self, value: Any, each: int = _REFERENCE) -> None:
        """For a sequence of its items; nothing for what has no length."""
        try:
            count = len(value)
        except TypeError:
            return
        self.pay(each * count)

    def check_bits(self, bits: float) -> None:
        """Refuse an integer that would have so many."""
        if bits > MAX_BITS:
            raise TooMuch(f"it computes an integer of more than {MAX_BITS} bits")

    def size(self, value: Any) -> int:
        """Characters of a value and all that is in it, as often as it is in it."""
        return self._size(value, 0)

    def _size(self, value: Any, depth: int) -> int:
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return _SCALAR
        known = self._sizes.get(id(value))
        if known is not None:
            return known[0]
        if depth == MAX_DEPTH:
            raise TooMuch(f"it works on a value that is nested more than {MAX_DEPTH} deep")
        self._sizes[id(value)] = (0, value)  # one that holds itself is written out as "..."
        below = depth + 1
        items: Iterable[Any] = value
        if isinstance(value, Mapping):
            items = itertools.chain(value.keys(), value.values())
        total = _SCALAR
        for item in items:
            total += 4 + (len(item) if type(item) is str else self._size(item, below))
        self._sizes[id(value)] = (total, value)
        return total

    def count(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, each a step."""
        for item in items:
            self.step(OBJECT)
            yield item

    def listed(self, items: Any) -> Any:
        """A list of what an iterator yields; anything else as it is."""
        return list(self.count(items)) if isinstance(items, Iterator) else items

    def split(self, cut: Callable[[int], list[str]], most: int) -> list[str]:
        """The parts that ``cut`` makes with so many cuts at most; -1: any number."""
        while True:
            affordable = max(1, self._characters // OBJECT)
            cuts = affordable if most < 0 else min(most, affordable)
            parts = cut(cuts)
            self.pay(OBJECT * len(parts))
            if len(parts) <= cuts or cuts == most:
                return parts
            # There was more to be had than it seemed.
            self._characters += OBJECT * len(parts)

    def _extend(self) -> None:
        """Allow more for what was given, once."""
        given, self._input = self._input, None
        if given is not None:
            size = self.size(given)
            self._characters += CHARACTERS_PER_INPUT * size
            self._steps += size
        if self._characters < 0:
            raise TooMuch(
                f"it builds more than {MAX_CHARACTERS} characters and "
                f"{CHARACTERS_PER_INPUT} for each that it was given"
            )

    def _look(self) -> None:
        if self._steps < 0:
            self._extend()
            if self._steps < 0:
                raise TooMuch(f"it takes more than {MAX_STEPS} steps")
        self._next_look = self._steps - _STEPS_PER_LOOK
        self._look_at_clock()

    def _look_at_clock(self) -> None:
        if time.thread_time() > self._ends_at:
            raise TooMuch(f"it takes longer than {MAX_SECONDS:g} s")

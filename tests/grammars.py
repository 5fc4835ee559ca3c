"""Texts of a grammar, for tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from erllama_core.errors import InvalidGrammar
from erllama_core.interfaces.grammar import CharSet, Grammar, GrammarState

ENDING = '"]}0123456789 '
"""Characters that lead out of JSON's strings, arrays and objects."""


def refusal(read: Callable[[Any], Grammar], given: Any) -> InvalidGrammar | None:
    """The error that reading something raises; None when it is read."""
    try:
        read(given)
    except InvalidGrammar as error:
        return error
    return None


def matches(grammar: Grammar, text: str) -> bool:
    """Whether the text is a whole one."""
    state = follow(grammar, text)
    return state is not None and state.may_end


def follow(grammar: Grammar, text: str) -> GrammarState | None:
    """The state after a text, byte by byte; None when it does not fit."""
    state: GrammarState | None = grammar.begin()
    for byte in text.encode():
        if state is None:
            return None
        state = state.after(bytes([byte]))
    return state


def some_text(grammar: Grammar, rng: random.Random, patience: int = 30) -> str | None:
    """A text of the grammar, drawn character by character; None when it does not end.

    After ``patience`` characters those are drawn that tend to end a JSON text.
    """
    state, text = grammar.begin(), ""
    for n_characters in range(400):
        if state.may_end and (rng.random() < 0.3 or n_characters > patience):
            return text
        choices = _choices(state, rng)
        if not choices:
            return text if state.may_end else None
        ending = [c for c in choices if c in ENDING]
        if n_characters > patience and ending:
            # Closing comes first; digits and blanks go on for a while.
            choices = [c for c in ending if c in '"]}'] or ending
        character = rng.choice(choices)
        after = state.after(character.encode())
        assert after is not None
        state, text = after, text + character
    return None


def _choices(state: GrammarState, rng: random.Random) -> list[str]:
    """A character of each range that can come next."""
    found: dict[int, None] = {}
    for stack in state.stacks:
        if stack:
            top = state.grammar.elements[stack[-1]]
            assert isinstance(top, CharSet)
            for first, last in top.ranges:
                found[rng.randint(first, min(last, first + 100))] = None
                found[first] = None
    return [chr(code) for code in found if not 0xD800 <= code <= 0xDFFF]

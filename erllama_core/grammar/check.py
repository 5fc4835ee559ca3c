"""What a grammar amounts to: whether it can be followed, by llama.cpp too, in bounded time.

llama.cpp follows a grammar by keeping every place at which the reply can stand, as a stack. It
does not end on a left recursion that it has not seen (it sees those alone where the rule in
front is literally empty), it searches for one along every way there is, which can take for ever,
and some grammars double the places with each character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.limits import MOST_LEFTMOST, MOST_PLACES, MOST_SEARCH
from erllama_core.interfaces.grammar import CharSet, Element, Grammar, Stack

_PROBE_STEPS: Final = 80
"""Characters that a reply is followed for, at most."""
_PROBE_PATIENCE: Final = 12
"""Characters that may come without the places becoming more."""
_PROBE_WIDTH: Final = 2
"""Beginnings of replies that are followed at once."""
_PROBE_CHARACTERS: Final = 8
"""Characters that are tried after each of them."""
_PROBE_STACKS: Final = 60_000
"""Places looked at in all; then the probe ends."""

_Alternative = Sequence[Element]


def check_grammar(grammar: Grammar) -> None:
    """Raises InvalidGrammar for a grammar that nobody should try to follow."""
    rules = [[_alternative(grammar, start) for start in starts] for starts in grammar.starts]
    empty = _may_be_empty(rules)
    _check_left_recursion(rules, empty)
    if all(not alternative for alternative in rules[grammar.root]):
        raise InvalidGrammar("root is empty: a reply would have no text")
    _check_places(grammar)


def has_end(grammar: Grammar) -> bool:
    """Whether some text is whole; without one a reply under the grammar never ends by itself."""
    rules = [[_alternative(grammar, start) for start in starts] for starts in grammar.starts]
    return grammar.root in _closed(rules, over_characters=True)


def _alternative(grammar: Grammar, start: int) -> _Alternative:
    end = start
    while grammar.elements[end] is not None:
        end += 1
    return grammar.elements[start:end]


def _may_be_empty(rules: Sequence[Sequence[_Alternative]]) -> set[int]:
    return _closed(rules, over_characters=False)


def _closed(rules: Sequence[Sequence[_Alternative]], *, over_characters: bool) -> set[int]:
    """Rules with an alternative made of such rules alone, and perhaps of characters."""
    users: list[list[tuple[int, int]]] = [[] for _ in rules]
    missing: list[list[int]] = []
    todo = []
    for number, alternatives in enumerate(rules):
        missing.append([])
        for place, alternative in enumerate(alternatives):
            references = [e for e in alternative if isinstance(e, int)]
            lacks = len(references)
            if not over_characters:
                lacks += sum(isinstance(element, CharSet) for element in alternative)
            missing[-1].append(lacks)
            for rule in references:
                users[rule].append((number, place))
            if not lacks:
                todo.append(number)
    found: set[int] = set()
    while todo:
        rule = todo.pop()
        if rule in found:
            continue
        found.add(rule)
        for number, place in users[rule]:
            missing[number][place] -= 1
            if not missing[number][place]:
                todo.append(number)
    return found


def _check_left_recursion(rules: Sequence[Sequence[_Alternative]], empty: set[int]) -> None:
    """No rule begins with itself, and nobody who looks for that takes for ever."""
    begins = [list(_first_rules(alternatives, empty)) for alternatives in rules]
    sizes = [sum(map(len, alternatives)) + len(alternatives) for alternatives in rules]
    cost: dict[int, int] = {}
    depth: dict[int, int] = {}
    for number in range(len(rules)):
        under_way: dict[int, None] = {}
        todo = [number]
        while todo:
            rule = todo[-1]
            if rule in cost:
                todo.pop()
                continue
            if rule not in under_way:
                under_way[rule] = None
                for other in begins[rule]:
                    if other in under_way:
                        raise InvalidGrammar(
                            "left recursion: a rule begins with itself, at once or by way of "
                            "others or of what may be empty; a repetition of what may be empty "
                            "does too"
                        )
                    if other not in cost:
                        todo.append(other)
                continue
            del under_way[rule]
            todo.pop()
            cost[rule] = sizes[rule] + sum(cost[other] for other in begins[rule])
            depth[rule] = 1 + max((depth[other] for other in begins[rule]), default=0)
            if depth[rule] > MOST_LEFTMOST or cost[rule] > MOST_SEARCH:
                raise InvalidGrammar(
                    "too many rules that begin with one another; write fewer, or let them begin "
                    "with text"
                )


def _first_rules(alternatives: Iterable[_Alternative], empty: set[int]) -> Iterable[int]:
    """Rules that an alternative begins with, once for each time."""
    for alternative in alternatives:
        for element in alternative:
            if not isinstance(element, int):
                break
            yield element
            if element not in empty:
                break


def _check_places(grammar: Grammar) -> None:
    """Follow replies that make the places as many as can be, for a while.

    Greedily, so this is no proof; where places multiply, it is with every few characters.
    """
    too_many = InvalidGrammar(
        f"the grammar is too ambiguous: a reply can stand at more than {MOST_PLACES} places in it "
        "at once. Let alternatives begin differently, or bring together what they begin with"
    )
    try:
        ways = [grammar.opened(((start,) for start in grammar.starts[grammar.root]), MOST_PLACES)]
        looked_at = 0
        most, since = len(ways[0]), 0
        for number in range(_PROBE_STEPS):
            further: dict[tuple[Stack, ...], None] = {}
            for stacks in ways:
                for character in _telling_characters(grammar, stacks):
                    after = grammar.step(stacks, character, MOST_PLACES)
                    further[after] = None
                    looked_at += len(stacks) + len(after)
                if looked_at > _PROBE_STACKS:
                    return
            ways = sorted(further, key=_size, reverse=True)[:_PROBE_WIDTH]
            if not ways:
                return
            if len(ways[0]) > most:
                most, since = len(ways[0]), number
            elif number - since >= _PROBE_PATIENCE:
                return
    except OverflowError as error:
        raise too_many from error


def _size(stacks: tuple[Stack, ...]) -> tuple[int, int]:
    return len(stacks), sum(map(len, stacks))


def _telling_characters(grammar: Grammar, stacks: Iterable[Stack]) -> list[int]:
    """Some characters that can come next, those first that most places agree on."""
    sets = [grammar.elements[stack[-1]] for stack in stacks if stack]
    votes: dict[int, int] = {}
    for found in sets[:256]:
        assert isinstance(found, CharSet)
        for first, _ in found.ranges[:8]:
            votes[first] = 0
    chosen = list(votes)[:64]
    for character in chosen:
        votes[character] = sum(character in found for found in sets if isinstance(found, CharSet))
    return sorted(chosen, key=votes.__getitem__, reverse=True)[:_PROBE_CHARACTERS]

"""Reading GBNF, llama.cpp's notation for grammars.

As llama.cpp reads it (``llama_grammar_parser`` in ``src/llama-grammar.cpp``), rule for rule, but
for what it reads without complaint and cannot follow, which is refused here: a repetition whose
least is more than its most, sets without characters, a rule that is defined twice. Its elements
that name a token of one vocabulary (``<[17]>``) are refused as well.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn

import attrs

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.limits import (
    MOST_ELEMENTS,
    MOST_NESTING,
    MOST_REPEATS,
    MOST_TEXT_BYTES,
)
from erllama_core.interfaces.grammar import LAST_CHARACTER, CharSet, Element, Grammar

_NAME: Final = re.compile(r"[A-Za-z0-9-]+")
_DIGITS: Final = re.compile(r"[0-9]+")
_SPACE: Final = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES: Final = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n"} | {c: c for c in '\\"[]-'}
_EXCERPT: Final = 32
"""Characters of the text that an error shows."""

_Sequence = list[CharSet | int]


@attrs.define
class _Symbol:
    """A rule: one of the text, or one that a group or a repetition has become."""

    name: str
    mentioned_at: int
    alternatives: list[_Sequence] | None = None
    """None until it is defined."""


def read_gbnf(text: str) -> Grammar:
    """Read a grammar; what its rules amount to is not looked at.

    Raises InvalidGrammar, with the place.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _mistake(text, error.start, "a lone surrogate, which no text has") from error
    if size > MOST_TEXT_BYTES:
        raise InvalidGrammar(
            f"the grammar has {size} bytes of GBNF; {MOST_TEXT_BYTES} are the limit"
        )
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text: Final = text
        self._at = 0
        self._symbols: Final[list[_Symbol]] = []
        self._ids: Final[dict[str, int]] = {}
        self._n_elements = 0
        self._nesting = 0

    def read(self) -> Grammar:
        text = self._text
        nul = text.find("\0")
        if nul >= 0:
            self._fail("a NUL character", nul)
        self._skip(lines=True)
        while self._at < len(text):
            self._read_rule()
        root = self._ids.get("root")
        if root is None:
            self._fail("there is no rule named root, with which a reply begins", len(text))
        elements: list[Element] = []
        starts: list[tuple[int, ...]] = []
        for symbol in self._symbols:
            if symbol.alternatives is None:
                self._fail(f"the rule {symbol.name!r} is not defined", symbol.mentioned_at)
            places = []
            for sequence in symbol.alternatives:
                places.append(len(elements))
                elements += [*sequence, None]
            starts.append(tuple(places))
        return Grammar(text, tuple(elements), tuple(starts), root)

    # -------------------------------------------------------------- the syntax

    def _read_rule(self) -> None:
        begin = self._at
        name = self._match(_NAME, "a rule's name was expected")
        self._skip()
        if not self._text.startswith("::=", self._at):
            self._fail("'::=' was expected")
        self._at += 3
        rule = self._rule_of(name, begin)
        self._skip(lines=True)
        alternatives = self._read_alternatives(name, nested=False)
        if self._symbols[rule].alternatives is not None:
            self._fail(f"the rule {name!r} is defined a second time", begin)
        self._symbols[rule].alternatives = alternatives
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail("the end of the rule was expected, or more of it")
        self._skip(lines=True)

    def _read_alternatives(self, name: str, *, nested: bool) -> list[_Sequence]:
        alternatives = [self._read_sequence(name, nested=nested)]
        while self._peek() == "|":
            self._at += 1
            self._skip(lines=True)
            alternatives.append(self._read_sequence(name, nested=nested))
        return alternatives

    def _read_sequence(self, name: str, *, nested: bool) -> _Sequence:
        sequence: _Sequence = []
        last, weight = 0, 1  # where what was read last begins; rules that repeating it repeats
        while True:
            begin, character = self._at, self._peek()
            if character in {"*", "+", "?", "{"}:
                least, most = self._read_repetition(nested=nested)
                weight = self._repeat(name, sequence, last, weight, (least, most), begin)
                continue
            if character == '"':
                item, weight = self._read_literal(), 1
            elif character == "[":
                item, weight = [self._read_set()], 1
            elif character == ".":
                self._at += 1
                item, weight = [CharSet.of((), negated=True)], 1
            elif character == "(":
                item, weight = self._read_group(name)
            elif _NAME.match(character):
                mentioned = self._match(_NAME, "")
                item, weight = [self._rule_of(mentioned, begin)], 1
            elif character in {"<", "!"}:
                self._fail("elements that name a token are not supported; write its text")
            else:
                return sequence
            self._skip(lines=nested)
            last = len(sequence)
            self._count(len(item), begin)
            sequence += item

    def _read_literal(self) -> _Sequence:
        begin = self._at
        self._at += 1
        item: _Sequence = []
        while (character := self._peek()) != '"':
            if not character:
                self._fail("the text in quotes does not end", begin)
            at = self._at
            code = self._read_character()
            if not code:
                self._fail("a NUL character, which no reply has", at)
            item.append(CharSet(((code, code),)))
        self._at += 1
        return item

    def _read_set(self) -> CharSet:
        begin = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges = []
        while (character := self._peek()) != "]":
            if not character:
                self._fail("the set of characters does not end", begin)
            at = self._at
            first = last = self._read_character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                if not self._peek():
                    self._fail("the set of characters does not end", begin)
                last = self._read_character()
                if last < first:
                    self._fail("the range ends before it begins", at)
            ranges.append((first, last))
        self._at += 1
        found = CharSet.of(ranges, negated=negated)
        if not ranges or not found.ranges:
            self._fail("a set without characters", begin)
        return found

    def _read_character(self) -> int:
        text, at = self._text, self._at
        if text[at] != "\\":
            self._at += 1
            return ord(text[at])
        kind = text[at + 1 : at + 2]
        digits = _HEX_DIGITS.get(kind)
        if digits is None:
            if kind not in _ESCAPES:
                self._fail("an escape that GBNF does not have")
            self._at += 2
            return ord(_ESCAPES[kind])
        number = text[at + 2 : at + 2 + digits]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", number):
            self._fail(f"{digits} hexadecimal digits were expected after \\{kind}")
        code = int(number, 16)
        if code > LAST_CHARACTER or 0xD800 <= code <= 0xDFFF:
            self._fail("not a character of Unicode")
        self._at += 2 + digits
        return code

    def _read_group(self, name: str) -> tuple[_Sequence, int]:
        begin = self._at
        if self._nesting == MOST_NESTING:
            self._fail(f"more than {MOST_NESTING} groups within one another")
        self._at += 1
        self._skip(lines=True)
        before = len(self._symbols)
        rule = self._new_rule(name)
        self._nesting += 1
        self._symbols[rule].alternatives = self._read_alternatives(name, nested=True)
        self._nesting -= 1
        if self._peek() != ")":
            self._fail("')' was expected" if self._peek() else "a group does not end", begin)
        self._at += 1
        return [rule], max(1, len(self._symbols) - before)

    def _read_repetition(self, *, nested: bool) -> tuple[int, int | None]:
        begin, kind = self._at, self._peek()
        self._at += 1
        self._skip(lines=nested)
        if kind != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[kind]
        least = self._read_number(begin)
        most: int | None = least
        self._skip(lines=nested)
        if self._peek() == ",":
            self._at += 1
            self._skip(lines=nested)
            most = self._read_number(begin) if _DIGITS.match(self._peek()) else None
            self._skip(lines=nested)
        if self._peek() != "}":
            self._fail("'}' was expected")
        self._at += 1
        self._skip(lines=nested)
        if most is not None and most < least:
            self._fail(f"a repetition of at least {least} and at most {most}", begin)
        return least, most

    def _read_number(self, begin: int) -> int:
        digits = self._match(_DIGITS, "a number was expected").lstrip("0")
        if len(digits) > 4 or int(digits or "0") > MOST_REPEATS:
            self._fail(f"a repetition of more than {MOST_REPEATS}", begin)
        return int(digits or "0")

    def _repeat(
        self,
        name: str,
        sequence: _Sequence,
        last: int,
        weight: int,
        times: tuple[int, int | None],
        begin: int,
    ) -> int:
        """Rewrite what was read last; the rules that repeating it again would repeat.

        ``S{m,n}`` becomes S m times and S(n-m), where S(k) is S S(k-1) or nothing; ``S{m,}`` S m
        times and T, where T is S T or nothing.
        """
        least, most = times
        item = sequence[last:]
        if not item:
            self._fail("there is nothing before it to repeat", begin)
        weight *= (most or least) or 1
        if weight > MOST_REPEATS:
            self._fail(
                f"repetitions within one another come to {weight} rules; {MOST_REPEATS} are the "
                "limit",
                begin,
            )
        optional = 1 if most is None else most - least
        self._count((len(item) + 1) * (least + optional), begin)
        sequence[last:] = item * least
        rule = None
        for _ in range(optional):
            following = rule
            rule = self._new_rule(name)
            if most is None:
                following = rule
            again = [*item] if following is None else [*item, following]
            self._symbols[rule].alternatives = [again, []]
        if rule is not None:
            sequence.append(rule)
        return weight

    # ------------------------------------------------------------------- parts

    def _peek(self) -> str:
        """The next character; empty at the end."""
        return self._text[self._at : self._at + 1]

    def _skip(self, *, lines: bool = False) -> None:
        """Skip blanks and comments, and where ``lines`` ends of lines as well."""
        found = (_SPACE_AND_LINES if lines else _SPACE).match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _match(self, pattern: re.Pattern[str], otherwise: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            self._fail(otherwise)
        self._at = found.end()
        return found[0]

    def _rule_of(self, name: str, at: int) -> int:
        rule = self._ids.get(name)
        if rule is None:
            rule = self._ids[name] = len(self._symbols)
            self._symbols.append(_Symbol(name, at))
        return rule

    def _new_rule(self, name: str) -> int:
        self._symbols.append(_Symbol(name, self._at))
        self._count(1, self._at)
        return len(self._symbols) - 1

    def _count(self, n_elements: int, at: int) -> None:
        self._n_elements += n_elements
        if self._n_elements > MOST_ELEMENTS:
            self._fail(
                f"the grammar becomes too large here: more than {MOST_ELEMENTS} elements with "
                "all repetitions written out",
                at,
            )

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        raise _mistake(self._text, self._at if at is None else at, what)


def _mistake(text: str, at: int, what: str) -> InvalidGrammar:
    line = text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at)
    excerpt = text[at : at + _EXCERPT].partition("\n")[0]
    return InvalidGrammar(what, line=line, column=column, excerpt=excerpt)

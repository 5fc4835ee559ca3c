r"""Regular expressions, as far as JSON schemas tend to use them and a grammar can say it.

Characters, sets, ``.``, ``\d \w \s`` and their opposites, groups, alternatives, repetitions, and
``^`` and ``$`` at the ends. What ECMA 262 and Python understand differently is taken in the sense
that suits both: ``\d`` are the ASCII digits, ``\D`` other ASCII characters.
"""

from __future__ import annotations

from typing import Final, NoReturn

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.limits import MOST_NESTING, MOST_REPEATS
from erllama_core.grammar.schema.rules import Rules
from erllama_core.grammar.schema.strings import written
from erllama_core.interfaces.grammar import LAST_CHARACTER

_Ranges = list[tuple[int, int]]

_DIGIT: Final[_Ranges] = [(0x30, 0x39)]
_WORD: Final[_Ranges] = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_BLANK: Final[_Ranges] = [(0x09, 0x0D), (0x20, 0x20)]
_LINE_ENDS: Final[_Ranges] = [(0x0A, 0x0A), (0x0D, 0x0D), (0x85, 0x85), (0x2028, 0x2029)]
_CLASSES: Final = {"d": _DIGIT, "w": _WORD, "s": _BLANK}
_OPPOSITES: Final[dict[str, _Ranges]] = {
    # Within ASCII: what Python calls a digit, a letter or a blank beyond it, ECMA 262 does not.
    "D": [(0x01, 0x2F), (0x3A, 0x7F)],
    "W": [(0x01, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0x7F)],
    "S": [(0x01, 0x08), (0x0E, 0x1B), (0x21, 0x7F)],
}
_CLASS_ESCAPES: Final = frozenset("\\" + kind for kind in "dwsDWS")
_CONTROLS: Final = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_ANY: Final = "char*"


def pattern_of(rules: Rules, pattern: str, path: str) -> str:
    """What stands between the quotes of a string that the pattern is found in; an atom.

    Raises InvalidGrammar for an expression that is wrong, or more than the above.
    """
    return _Reader(rules, pattern, path).read()


class _Reader:
    def __init__(self, rules: Rules, pattern: str, path: str) -> None:
        self._rules: Final = rules
        self._pattern: Final = pattern
        self._path: Final = path
        self._at = 0
        self._nesting = 0

    def read(self) -> str:
        alternatives = []
        while True:
            before, after = _ANY, _ANY
            if self._peek() == "^":
                self._at += 1
                before = ""
            parts, _ = self._sequence()
            if self._peek() == "$":
                self._at += 1
                after = ""
            if before or after:
                self._rules.shared("char")
            alternatives.append(" ".join([before, *parts, after]).strip() or '""')
            if self._peek() != "|":
                break
            self._at += 1
        if self._peek():
            self._fail("what stands here")
        return self._rules.choice(self._rules.add(text) for text in alternatives)

    def _sequence(self) -> tuple[list[str], bool]:
        """Atoms one after another, and whether all of them may be empty."""
        parts: list[str] = []
        empty = True
        while (character := self._peek()) and character not in "|)$":
            begin = self._at
            atom, may_be_empty = self._item(character)
            least, most = self._repetition()
            if (least, most) != (1, 1):
                if may_be_empty and most != 0:
                    self._fail("a repetition of what may be empty", begin)
                atom = self._rules.repeated(atom, least, most, self._path)
            if atom:
                parts.append(atom)
            empty = empty and (may_be_empty or least == 0)
        return parts, empty

    def _item(self, character: str) -> tuple[str, bool]:
        if character == "(":
            return self._group()
        if character == "[":
            return self._written(self._set()), False
        self._at += 1
        if character == ".":
            return self._written(_other_than(_LINE_ENDS)), False
        if character == "\\":
            return self._written(self._escape()), False
        if character in "^*+?{}]":
            self._fail(f"{character!r} here", self._at - 1)
        return self._written([(ord(character), ord(character))]), False

    def _group(self) -> tuple[str, bool]:
        begin = self._at
        if self._nesting == MOST_NESTING:
            self._fail(f"more than {MOST_NESTING} groups within one another")
        self._at += 1
        if self._peek() == "?":
            if self._pattern[self._at + 1 : self._at + 2] != ":":
                self._fail("'(?' of this kind", begin)
            self._at += 2
        self._nesting += 1
        alternatives, empty = [], False
        while True:
            parts, may_be_empty = self._sequence()
            alternatives.append(" ".join(parts) or '""')
            empty = empty or may_be_empty
            if self._peek() != "|":
                break
            self._at += 1
        self._nesting -= 1
        if self._peek() != ")":
            self._fail("a group that does not end, or '$' in one", begin)
        self._at += 1
        return self._rules.choice(self._rules.add(text) for text in alternatives), empty

    def _repetition(self) -> tuple[int, int | None]:
        kind = self._peek()
        bounds: tuple[int, int | None]
        if kind and kind in "*+?":
            self._at += 1
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[kind]
        elif kind == "{":
            end = self._pattern.find("}", self._at)
            least, comma, most = self._pattern[self._at + 1 : max(end, 0)].partition(",")
            if not _is_count(least) or not (_is_count(most) or not most):
                self._fail("a '{' that begins no repetition")
            bounds = (int(least), (int(most) if most else None) if comma else int(least))
            if bounds[1] is not None and bounds[1] < bounds[0]:
                self._fail("a repetition whose least is more than its most")
            self._at = end + 1
        else:
            return 1, 1
        if self._peek() == "?":
            self._at += 1  # lazy: it finds the same texts
        if self._peek() and self._peek() in "*+{":
            self._fail("a repetition of a repetition")
        return bounds

    def _set(self) -> _Ranges:
        begin = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: _Ranges = []
        has_class = False
        while self._peek() != "]":
            has_class = has_class or self._pattern[self._at : self._at + 2] in _CLASS_ESCAPES
            first = self._set_item(begin)
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._set_item(begin)
                is_range = len(first) == len(last) == 1
                if not is_range or first[0][0] != first[0][1] or last[0][0] != last[0][1]:
                    self._fail("a range that is none", begin)
                if last[0][0] < first[0][0]:
                    self._fail("a range that ends before it begins", begin)
                first = [(first[0][0], last[0][0])]
            ranges += first
        self._at += 1
        if not ranges:
            self._fail("a set without characters", begin)
        if not negated:
            return ranges
        if not has_class:
            return _other_than(ranges)
        blanks = [(0x1C, 0x1F)] if _BLANK[0] in ranges else []
        return _within_ascii(_other_than(ranges + blanks))

    def _set_item(self, begin: int) -> _Ranges:
        character = self._peek()
        if not character:
            self._fail("a set that does not end", begin)
        self._at += 1
        if character == "\\":
            return self._escape()
        return [(ord(character), ord(character))]

    def _escape(self) -> _Ranges:
        kind = self._peek()
        self._at += 1
        if kind in _CLASSES:
            return _CLASSES[kind]
        if kind in _OPPOSITES:
            return _OPPOSITES[kind]
        if kind in _CONTROLS:
            return [(_CONTROLS[kind], _CONTROLS[kind])]
        if kind in {"x", "u"}:
            size = 2 if kind == "x" else 4
            digits = self._pattern[self._at : self._at + size]
            try:
                code = int(digits, 16)
            except ValueError:
                code = -1
            if len(digits) < size or code < 1 or 0xD800 <= code <= 0xDFFF:
                self._fail("not a character", self._at - 2)
            self._at += size
            return [(code, code)]
        if not kind or not kind.isascii() or kind.isalnum():
            self._fail("an escape of this kind", self._at - 2)
        return [(ord(kind), ord(kind))]

    def _written(self, ranges: _Ranges) -> str:
        return written(self._rules, ranges)

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        place = self._at if at is None else at
        raise InvalidGrammar(
            f"the pattern {self._pattern!r} has at character {place + 1} what a grammar cannot "
            f"say, or what is no pattern: {what}",
            path=self._path,
        )


def _is_count(digits: str) -> bool:
    return (
        digits.isascii() and digits.isdigit() and len(digits) <= 4 and int(digits) <= MOST_REPEATS
    )


def _within_ascii(ranges: _Ranges) -> _Ranges:
    return [(first, min(last, 0x7F)) for first, last in ranges if first <= 0x7F]


def _other_than(ranges: _Ranges) -> _Ranges:
    """All characters but these."""
    found: _Ranges = []
    begin = 1
    for first, last in sorted(ranges):
        if begin < first:
            found.append((begin, first - 1))
        begin = max(begin, last + 1)
    if begin <= LAST_CHARACTER:
        found.append((begin, LAST_CHARACTER))
    return found

"""The rules that a schema becomes, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.limits import MOST_REPEATS
from erllama_core.interfaces.grammar import LAST_CHARACTER

MOST_TEXT: Final = 1 << 19
"""Characters of GBNF that a schema may become."""

PLAIN: Final = (
    (0x20, 0x21),
    (0x23, 0x5B),
    (0x5D, 0xD7FF),
    (0xE000, LAST_CHARACTER),
)
"""Characters that stand for themselves in a JSON string: all but control characters, the quote
and the backslash."""

_HEX: Final = "[0-9a-fA-F]"
_SHARED: Final = {
    # An indent of 20 is deeper than models write; without a bound some never stop.
    "ws": r'" " | "\n" [ \t]{0,20} | ""',
    "char": r'plain | "\\" escape',
    "escape": r'["\\/bfnrt] | "u" (unit | high "\\u" low)',
    # Surrogates come in pairs alone, as a text with half a pair cannot be written down.
    "unit": f"[0-9a-cA-CeEfF] {_HEX}{{3}} | [dD] [0-7] {_HEX}{{2}}",
    "high": f"[dD] [89abAB] {_HEX}{{2}}",
    "low": f"[dD] [c-fC-F] {_HEX}{{2}}",
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    # Two digits of exponent keep it within what a double can hold.
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "member": r'string ":" ws value',
    "next-member": '"," ws member',
    "object": '"{" ws (member next-member* ws)? "}"',
    "next-value": '"," ws value',
    "array": '"[" ws (value next-value* ws)? "]"',
}
"""Rules that many schemas need, by name."""
_NEEDS: Final = {
    "char": ("plain", "escape"),
    "escape": ("unit", "high", "low"),
    "string": ("char",),
    "number": ("integer",),
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "member": ("string", "ws", "value"),
    "next-member": ("ws", "member"),
    "object": ("ws", "member", "next-member"),
    "next-value": ("ws", "value"),
    "array": ("ws", "value", "next-value"),
}


class Rules:
    """Rules by name. An *atom* is text that can be repeated and put into a sequence as it is."""

    def __init__(self) -> None:
        self._texts: Final[dict[str, str]] = {}
        self._names: Final[dict[str, str]] = {}
        self._size = 0

    def shared(self, name: str) -> str:
        """A rule that many schemas need, and those that it needs."""
        todo = [name]
        while todo:
            name_of_one = todo.pop()
            if name_of_one not in self._texts:
                text = characters(PLAIN) if name_of_one == "plain" else _SHARED[name_of_one]
                self.define(name_of_one, text)
                todo += _NEEDS.get(name_of_one, ())
        return name

    def add(self, text: str) -> str:
        """The name of a rule with this text, new or not."""
        name = self._names.get(text)
        if name is None:
            name = self._names[text] = self.reserve()
            self.define(name, text)
        return name

    def reserve(self) -> str:
        """A name for a rule that is defined later, so that it can mention itself."""
        name = f"r{len(self._texts)}"
        self._texts[name] = ""
        return name

    def define(self, name: str, text: str) -> None:
        """Raises OverflowError when all rules together become too large."""
        self._texts[name] = text
        self._size += len(name) + len(text)
        if self._size > MOST_TEXT:
            raise OverflowError("the rules become too large")

    def gbnf(self, root: str) -> str:
        """All rules, and one to begin with."""
        lines = [f"root ::= {root}", *(f"{name} ::= {text}" for name, text in self._texts.items())]
        return "\n".join(lines) + "\n"

    # ------------------------------------------------------------ larger parts

    def repeated(self, atom: str, least: int, most: int | None, path: str) -> str:
        """An atom so many times; empty for none."""
        if max(least, most or 0) > MOST_REPEATS:
            raise InvalidGrammar(f"more than {MOST_REPEATS} cannot be counted", path=path)
        if most == 0:
            return ""
        if (least, most) == (1, 1):
            return atom
        if not atom.isalnum():
            atom = self.add(atom)  # a group counts with all that is in it, a name as one
        counts = {(0, None): "*", (1, None): "+", (0, 1): "?"}
        bounds = f"{least}" if least == most else f"{least},{'' if most is None else most}"
        return atom + counts.get((least, most), f"{{{bounds}}}")

    def choice(self, atoms: Iterable[str]) -> str:
        """One of some atoms."""
        different = list(dict.fromkeys(atoms))
        return different[0] if len(different) == 1 else self.add(" | ".join(different))

    def one_of(self, texts: Iterable[str]) -> str:
        """One of some texts, letter by letter, so that few places are open at once."""
        return self._branch(sorted(set(texts)), 0)

    def _branch(self, texts: Sequence[str], at: int) -> str:
        """What follows the first ``at`` characters, in which all texts agree."""
        if len(texts) == 1:
            return literal(texts[0][at:])
        alternatives = []
        begin = 0
        if len(texts[0]) == at:
            alternatives.append('""')
            begin = 1
        while begin < len(texts):
            end = begin
            while end < len(texts) and texts[end][at] == texts[begin][at]:
                end += 1
            group = texts[begin:end]
            # Sorted, so the first and the last agree in what all do.
            common = at + 1
            shortest = min(len(group[0]), len(group[-1]))
            while common < shortest and group[0][common] == group[-1][common]:
                common += 1
            if end - begin == 1:
                alternatives.append(literal(group[0][at:]))
            else:
                rest = self._branch(group, common)
                alternatives.append(f"{literal(group[0][at:common])} {rest}")
            begin = end
        return self.add(" | ".join(alternatives))


def literal(text: str) -> str:
    """A text as it is; an atom."""
    return '"' + "".join(map(_in_quotes, text)) + '"'


def characters(ranges: Iterable[tuple[int, int]]) -> str:
    """One character of some ranges; an atom."""
    parts = []
    for first, last in ranges:
        parts.append(_in_set(first))
        if last > first:
            parts.append(("-" if last > first + 1 else "") + _in_set(last))
    return f"[{''.join(parts)}]"


def _in_quotes(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character >= " " and character != "\x7f" else _in_set(ord(character))


def _in_set(code: int) -> str:
    if code < 0x80 and chr(code).isalnum():
        return chr(code)
    if code <= 0xFF:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"

"""Strings: their characters as JSON writes them, their formats, and names of members."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from erllama_core.grammar.schema.rules import PLAIN, Rules, characters, literal

_SHORT_ESCAPES: Final = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}
_CONTROLS: Final = frozenset(range(1, 0x20))
_TWO: Final = "[0-9]{2}"
_DAYS: Final = (
    '("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    '("04" | "06" | "09" | "11") "-" ("0" [1-9] | [12] [0-9] | "30")',
    '"02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',  # a leap day only some years have
)
_CLOCK: Final = '("0" [0-9] | "1" [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_DATE: Final = f'("000" [1-9] | "00" [1-9] [0-9] | "0" [1-9] {_TWO} | [1-9] [0-9]{{3}}) "-" '
_TIME: Final = f'{_CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [-+] {_CLOCK})'
_BYTE: Final = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9])'
FORMATS: Final = {
    "date": _DATE + f"({' | '.join(_DAYS)})",
    "time": _TIME,
    "date-time": _DATE + f"({' | '.join(_DAYS)}) " + f'"T" {_TIME}',
    "uuid": ' "-" '.join(f"[0-9a-f]{{{n}}}" for n in (8, 4, 4, 4, 12)),
    "ipv4": f'{_BYTE} ("." {_BYTE}){{3}}',
}
"""What stands between the quotes, by ``format``."""


def written(rules: Rules, ranges: Iterable[tuple[int, int]]) -> str:
    """One character of some ranges, as it stands within a JSON string; an atom."""
    plain, escapes = [], []
    for first, last in ranges:
        for low, high in PLAIN:
            if max(first, low) <= min(last, high):
                plain.append((max(first, low), min(last, high)))
        escapes += [code for code in range(first, min(last, 0x5C) + 1) if not _is_plain(code)]
    parts = []
    if set(escapes) >= _CONTROLS:  # most sets have all of them: one rule for all
        parts.append(rules.add(" | ".join(literal(_escaped(code)) for code in sorted(_CONTROLS))))
        escapes = [code for code in escapes if code not in _CONTROLS]
    parts += [literal(_escaped(code)) for code in escapes]
    if plain:
        parts.insert(0, characters(plain))
    return rules.choice(parts)


def _is_plain(code: int) -> bool:
    return any(first <= code <= last for first, last in PLAIN)


def _escaped(code: int) -> str:
    if code in {0x22, 0x5C}:
        return "\\" + chr(code)
    short = _SHORT_ESCAPES.get(code)
    return f"\\{short}" if short else f"\\u{code:04x}"


def other_names(rules: Rules, names: Iterable[str]) -> str:
    """Names of members, in quotes, that are none of ``names``; an atom.

    A character that can stand for itself is not escaped in them, so that a name has one way to
    be written, and none of ``names`` can come in another.
    """
    units = tuple(sorted({tuple(map(ord, name)) for name in names}))
    anything = rules.add(f"{written(rules, [(1, 0x10FFFF)])}*")
    return rules.add(rf'"\"" {_others(rules, units, 0, anything)} "\""')


def _others(rules: Rules, names: Sequence[tuple[int, ...]], at: int, anything: str) -> str:
    """What follows ``at`` characters that all ``names`` begin with, so that it is none of them."""
    taken = sorted({name[at] for name in names if len(name) > at})
    free = []
    begin = 1
    for code in taken:
        if begin < code:
            free.append((begin, code - 1))
        begin = max(begin, code + 1)
    free.append((begin, 0x10FFFF))
    alternatives = [f"{written(rules, free)} {anything}"]
    for code in taken:
        further = [name for name in names if len(name) > at and name[at] == code]
        rest = _others(rules, further, at + 1, anything)
        alternatives.append(f"{written(rules, [(code, code)])} {rest}")
    if all(len(name) > at for name in names):
        alternatives.append('""')
    return rules.add(" | ".join(alternatives))

"""Numbers between bounds, digit by digit."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

import attrs

from erllama_core.grammar.schema.rules import Rules

_MOST_DIGITS: Final = 16
"""Of a whole number without a bound on that side."""
_DOUBLE_DIGITS: Final = 15
"""Decimal digits that a double tells apart: no reader rounds a number of so many across a bound."""


@attrs.frozen
class Bound:
    """One end of a range of numbers."""

    value: Decimal
    excluded: bool = False


def whole_numbers(rules: Rules, least: Bound | None, most: Bound | None) -> str | None:
    """Whole numbers in a range; None when there is none."""
    low = None if least is None else _whole(least, up=True)
    high = None if most is None else _whole(most, up=False)
    if low is None and high is None:
        return rules.shared("integer")
    parts = []
    if low is None or low < 0:
        first = 1 if high is None or high >= 0 else -high
        negative = _natural(rules, first, None if low is None else -low)
        if negative is not None:
            parts.append(rules.add(f'"-" {negative}'))
    if high is None or high >= 0:
        natural = _natural(rules, max(0, low or 0), high)
        if natural is not None:
            parts.append(natural)
    return rules.choice(parts) if parts else None


def numbers(rules: Rules, least: Bound | None, most: Bound | None) -> str | None:
    """Numbers in a range, without an exponent where there is a bound; None when there is none."""
    if least is None and most is None:
        return rules.shared("number")
    zero = Decimal(0)
    parts = []
    if least is None or least.value < zero:
        to = None if least is None else Bound(-least.value, least.excluded)
        if most is not None and most.value < zero:
            since = Bound(-most.value, most.excluded)
        else:
            since = Bound(zero, excluded=True)
        parts += [f'"-" {part}' for part in _not_negative(rules, since, to)]
    if most is None or most.value >= zero:
        since = least if least is not None and least.value > zero else Bound(zero)
        if least is not None and least.value == zero:
            since = least
        parts += list(_not_negative(rules, since, most))
    return rules.choice(rules.add(part) for part in parts) if parts else None


def _whole(bound: Bound, *, up: bool) -> int:
    whole = int(bound.value.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR))
    if bound.excluded and whole == bound.value:
        whole += 1 if up else -1
    return whole


def _natural(rules: Rules, low: int, high: int | None) -> str | None:
    """Whole numbers from ``low``, which is not negative."""
    if high is None:
        high = 10 ** max(_MOST_DIGITS, len(str(low))) - 1
    if low > high:
        return None
    parts = []
    for n_digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (n_digits - 1) if n_digits > 1 else 0)
        last = min(high, 10**n_digits - 1)
        parts += list(_of_length(str(first), str(last)))
    return rules.choice(rules.add(part) for part in parts)


def _of_length(low: str, high: str) -> Iterator[str]:
    """Digits from ``low`` to ``high``, which have the same length."""
    if low == high:
        yield f'"{low}"'
    elif low.strip("0") == "" and high.strip("9") == "":
        yield _digits(len(low), len(low))
    elif low[0] == high[0]:
        for rest in _of_length(low[1:], high[1:]):
            yield f'"{low[0]}" {rest}'
    else:
        rest_size = len(low) - 1
        first, last = int(low[0]), int(high[0])
        if low[1:].strip("0"):
            for rest in _of_length(low[1:], "9" * rest_size):
                yield f'"{low[0]}" {rest}'
            first += 1
        if high[1:].strip("9"):
            for rest in _of_length("0" * rest_size, high[1:]):
                yield f'"{high[0]}" {rest}'
            last -= 1
        if first <= last:
            yield f"{_digit(first, last)} {_digits(rest_size, rest_size)}".strip()


def _not_negative(rules: Rules, least: Bound, most: Bound | None) -> Iterator[str]:
    """Numbers from ``least``, which is not negative."""
    low, low_rest = _split(least)
    high, high_rest = (None, None) if most is None else _split(most)
    n_digits = max(1, _DOUBLE_DIGITS - len(str(low if high is None else high)))
    fraction = _Fraction(rules, n_digits)
    if high is not None and low > high:
        return
    if low == high:
        assert high_rest is not None
        yield from _with(f'"{low}"', fraction.between(low_rest, high_rest))
        return
    yield from _with(f'"{low}"', fraction.between(low_rest, None))
    last = None if high is None else high - 1
    between = _natural(rules, low + 1, last)
    if between is not None:
        yield from _with(between, fraction.between(None, None))
    if high_rest is not None:
        yield from _with(f'"{high}"', fraction.between(None, high_rest))


def _with(whole: str, fraction: str | None) -> Iterator[str]:
    if fraction is not None:
        yield f"{whole} {fraction}"


_End = tuple[str, bool]
"""Digits behind the point of a bound, and whether the bound itself is excluded."""


def _split(bound: Bound) -> tuple[int, _End]:
    whole, _, rest = format(bound.value, "f").partition(".")
    return int(whole), (rest.rstrip("0"), bound.excluded)


class _Fraction:
    """What stands behind the whole part of a number, the point included, or nothing."""

    def __init__(self, rules: Rules, n_digits: int) -> None:
        self._rules: Final = rules
        self._n_digits: Final = n_digits

    def between(self, least: _End | None, most: _End | None) -> str | None:
        """Fractions from ``least`` to ``most``, None being any; None when there are none."""
        n_digits = max(self._n_digits, *(len(end[0]) + 1 for end in (least, most) if end), 1)
        more = self._digits(least, most, n_digits, first=True)
        if _may_end(least, most):
            return self._rules.add('""') if more is None else self._rules.add(f'"." {more} | ""')
        return None if more is None else self._rules.add(f'"." {more}')

    def _digits(
        self, least: _End | None, most: _End | None, n_digits: int, *, first: bool = False
    ) -> str | None:
        """At most so many digits more, of which the first must be there if it is the ``first``.

        ``least`` and ``most`` are what is left of the bounds' digits while all before agrees with
        them; None once it does not.
        """
        may_end = not first and _may_end(least, most)
        if least == ("", False):
            least = None  # whatever follows is not less
        if n_digits == 0:
            return '""' if may_end else None
        if least is None and most is None:
            return _digits(int(first), n_digits)
        low = 0 if least is None else int(least[0][:1] or "0")
        high = 9 if most is None else int(most[0][:1] or "0")
        parts = [] if not may_end else ['""']
        begin = low
        while begin <= high:
            end = begin
            on_low = least is not None and begin == low
            on_high = most is not None and begin == high
            if not on_low and not on_high:
                end = high if most is None else high - 1
            rest = self._digits(
                (least[0][1:], least[1]) if on_low and least else None,
                (most[0][1:], most[1]) if on_high and most else None,
                n_digits - 1,
            )
            if rest is not None:
                parts.append(f"{_digit(begin, end)} {rest}")
            begin = end + 1
        return self._rules.add(" | ".join(parts)) if parts else None


def _may_end(least: _End | None, most: _End | None) -> bool:
    """Whether zeros from here on, or nothing, are within the bounds."""
    if least is not None and (least[0] or least[1]):
        return False
    return most is None or bool(most[0]) or not most[1]


def _digit(first: int, last: int) -> str:
    return f'"{first}"' if first == last else f"[{first}-{last}]"


def _digits(least: int, most: int) -> str:
    if most == 0:
        return '""'
    return f"[0-9]{{{least}}}" if least == most else f"[0-9]{{{least},{most}}}"

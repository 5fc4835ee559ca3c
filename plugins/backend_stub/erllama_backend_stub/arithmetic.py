"""Exponential and logarithm that are the same number on every machine.

``math.exp`` and ``math.log`` are the C library's and differ in the last bit from one to the
next, which is enough to draw another token. What is used here are the operations that IEEE
754 rounds in one way only.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable
from typing import Final

_LOG2_E: Final = 1.4426950408889634
# ln 2 in two parts, the first with zeros at its end, so that k * _LN2_HIGH is exact: the
# constants of fdlibm's e_exp.c.
_LN2_HIGH: Final = 6.93147180369123816490e-01
_LN2_LOW: Final = 1.90821492927058770002e-10
_TAYLOR: Final = tuple(1.0 / math.factorial(n) for n in range(14, -1, -1))
"""1/n!, highest power first; beyond the 14th no term reaches the last bit for |x| < 0.35."""
_LEAST: Final = -708.0
"""Below it the result is not a normal number; it is taken for zero."""
_LN: Final = decimal.Context(prec=25)


def exp(x: float) -> float:
    """The exponential of ``x``, for x up to 700; 0.0 below -708."""
    if x < _LEAST:
        return 0.0
    k = round(x * _LOG2_E)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    value = 0.0
    for coefficient in _TAYLOR:
        value = value * r + coefficient
    return math.ldexp(value, k)


def logsumexp(values: Iterable[float]) -> float:
    """The logarithm of the sum of the exponentials of at least one value."""
    values = tuple(values)
    top = max(values)
    total = math.fsum(exp(value - top) for value in values)
    return top + float(_LN.ln(decimal.Decimal(total)))

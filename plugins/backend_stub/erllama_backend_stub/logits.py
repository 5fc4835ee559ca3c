"""From a digest of cells to logits: the model's head.

Every logit is a pseudo-random number from 0 to 4, in steps of 2**-14. Tokens that are not
printable ASCII lie 512 lower, so that replies can be read; a token that must come (scripted,
or the end of a reply) lies 512 higher. All are exact in single precision.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from typing import Final

from erllama_backend_stub.arithmetic import logsumexp
from erllama_backend_stub.vocabulary import IM_END, N_TOKENS
from erllama_core.interfaces.backend import Mark

_FIRST_PRINTABLE: Final = 0x20
_LAST_PRINTABLE: Final = 0x7E
_STEP: Final = 2.0**-14
_FAR: Final = 512.0
"""At temperature 1 a token so far below is drawn once in e**508 times."""
_U64: Final = 2.0**64
_NUMBERS: Final = struct.Struct(f"<{N_TOKENS}HQ")


class LogitRow:
    """The logits at one position. Used by one thread."""

    def __init__(self, digest: bytes, forced: int | None, eog_rate: float) -> None:
        self._digest = digest
        self._forced = forced
        self._eog_rate = eog_rate

    @functools.cached_property
    def values(self) -> list[float]:
        """One logit per token of the vocabulary, in the order of ids."""
        *numbers, lot = _NUMBERS.unpack(hashlib.shake_256(self._digest).digest(_NUMBERS.size))
        values = [number * _STEP - _FAR for number in numbers]
        first, behind = _FIRST_PRINTABLE, _LAST_PRINTABLE + 1
        values[first:behind] = [number * _STEP for number in numbers[first:behind]]
        forced = self._forced
        if forced is None and lot < self._eog_rate * _U64:
            forced = IM_END
        if forced is not None:
            values[forced] = numbers[forced] * _STEP + _FAR
        return values

    def mark(self, size: int | None) -> Mark:
        """The ``size`` largest logits, equal ones in the order of ids; None: all."""
        values = self.values
        order = sorted(range(N_TOKENS), key=values.__getitem__, reverse=True)
        order = order[:size]
        return Mark(
            tokens=struct.pack(f"<{len(order)}I", *order),
            logits=struct.pack(f"<{len(order)}f", *[values[token] for token in order]),
            logsumexp=logsumexp(values),
            n_vocab=N_TOKENS,
        )

"""Which snapshots along one context are kept, when all of them would take too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs

KEPT_ENDS: Final = 3
"""The last ones along a context are kept in any case: where a turn opened its reply, where its
prompt ended, and where its reply did."""
_NEAR: Final = 64
"""Tokens from either end of a context within which one position is as good as another."""


@attrs.frozen
class Held:
    """A snapshot in a tier, with the logits beside it if there are any."""

    position: int
    size_bytes: int
    hits: int
    may_go: bool


def superfluous(held: Sequence[Held], end: int, most_bytes: int) -> list[int]:
    """Numbers of the snapshots to remove until what is left takes ``most_bytes``.

    ``held`` ascends by position, ``end`` is the context's length. Without a snapshot, whoever
    would have gone on from it goes on from the one before, and computes what lies between. Others
    are likely to leave a context shortly after its beginning, which many share, or to go on
    shortly before its end; so gaps are let grow in the middle.
    """
    left = list(range(len(held)))
    total = sum(item.size_bytes for item in held)
    gone: list[int] = []
    while total > most_bytes:
        best: int | None = None
        least = math.inf
        for place, number in enumerate(left[:-KEPT_ENDS]):
            if held[number].may_go:
                before = held[left[place - 1]].position if place else 0
                worth = _worth(held[number], before, end)
                if worth < least:
                    best, least = place, worth
        if best is None:
            break
        number = left.pop(best)
        gone.append(number)
        total -= held[number].size_bytes
    return gone


def _worth(item: Held, before: int, end: int) -> float:
    likely = 1 / (item.position + _NEAR) + 1 / (max(0, end - item.position) + _NEAR)
    return (item.position - before) * likely * (1 + math.log2(1 + item.hits))

"""Snapshots of what cannot be cut: where along a prompt they are taken, and their way to the cache.

A model that cannot rewind goes on from a stored context only where a snapshot of it was taken
while it stood there. So a prompt is computed in slices that end where others may want to go on:

* before the tokens that open the reply: the next turn's prompt may render the reply otherwise;
* where what is stored of other contexts ends: two contexts that begin alike will have a third.
  (The rule is Marconi's: Pan et al., "Marconi: Prefix Caching for the Era of Hybrid LLMs", 2024.)
* after control tokens, which is where messages begin and end, and at regular distances, both
  thinned to about one in ``snapshot_interval`` tokens.

Its end, and that of the reply, have a snapshot in any case.

Where the reply is opened and where contexts part, a prompt may also end. There the logits are kept
beside the snapshot, as at its end, so that such a prompt computes nothing. They are all logits, and
ordering those of a large vocabulary takes some 20 ms: nobody ends where a distance is full.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from erllama_core.cache.passage import SaveBuffer
from erllama_core.cache.policy import SavePolicy
from erllama_core.interfaces.backend import Mark

_CLOSE: Final = 4
"""Two positions are near to each other by less than this part of the interval."""
_SHORT: Final = 16
"""Near the beginning a position is too near to the next one if it is by this part of the distance
from the one before."""
_TAIL: Final = 32
"""A prompt whose last control token is further from its end does not open a reply with it."""


def positions(
    *,
    start: int,
    limit: int,
    interval: int,
    least: int,
    wanted: Iterable[int],
    offered: Sequence[int],
) -> list[int]:
    """Where to take snapshots of a prompt that is computed from ``start`` on, at most at ``limit``.

    ``wanted`` are taken in any case. Between them one is taken after every ``interval`` tokens, or
    a little sooner where one is ``offered`` (ascending), so that a slice of as many tokens ends
    there without a rest. Close to the beginning, which most contexts share, those that are offered
    are taken as often as the tokens before them double, ``least`` at the very least.
    """
    must = sorted({at for at in wanted if max(start, least - 1) < at <= limit})
    if not interval:
        return must
    ends = [*must, limit + 1]
    chosen: list[int] = []
    last = start
    for end in ends:
        while (at := _next(last, end, interval, least, offered)) is not None:
            chosen.append(at)
            last = at
        chosen.append(end)
        last = end
    return chosen[:-1]


def _next(last: int, end: int, interval: int, least: int, offered: Sequence[int]) -> int | None:
    """The first position behind ``last`` that is far enough from it and not too near to ``end``."""
    near = max(1, interval // _CLOSE)
    if last < interval:
        early = bisect.bisect_left(offered, last + max(least, last))
        if early < len(offered):
            at = offered[early]
            # The end of a system prompt is worth having, even if the question is a short one.
            if at <= last + interval and end - at > (at - last) // _SHORT:
                return at
    regular = last + interval
    if regular > end - near:
        return None
    before = bisect.bisect_right(offered, regular) - 1
    if before >= 0 and offered[before] > regular - near:
        return offered[before]
    return regular


def widened(interval: int, snapshot_bytes: int, *, n_ctx: int, bytes_max: int) -> int:
    """The interval, doubled until regular snapshots of the longest context fit into half of
    ``bytes_max``; the other half is for the ends of turns.
    """
    while interval < n_ctx and (n_ctx // interval) * snapshot_bytes > bytes_max // 2:
        interval *= 2
    return interval


def opening(prompt_tokens: int, opening_tokens: int, offered: Sequence[int]) -> int | None:
    """Where a prompt's last part, that opens the reply, begins.

    ``opening_tokens``: how many there are, 0 when that is not known. It is then taken to begin
    before the last control token; ``offered`` are the positions before and after all of them.
    """
    if opening_tokens:
        return prompt_tokens - opening_tokens
    if len(offered) > 1 and prompt_tokens - offered[-2] <= _TAIL:
        return offered[-2]
    return None


@attrs.frozen
class Taken:
    """What was taken where a sequence stood: a snapshot, logits, or both."""

    position: int
    pages: SaveBuffer | None
    mark: Mark | None


class SnapshotQueue:
    """A request's snapshots that were taken, and wait until the blocks before them are stored.

    A block is stored whole, and so may be a snapshot's position in the middle of it. The worker's
    alone.
    """

    def __init__(self) -> None:
        self.planned: frozenset[int] = frozenset()
        """Positions at which the request's snapshots are still to be taken, or were."""
        self.marked: frozenset[int] = frozenset()
        """Those of them at which the logits are, too."""
        self._taken: list[Taken] = []

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, taken: Taken) -> None:
        """Positions ascend."""
        self._taken.append(taken)

    def has(self, position: int) -> bool:
        return any(item.position == position for item in self._taken)

    def all(self) -> list[Taken]:
        """Take out all of them."""
        ready, self._taken = self._taken, []
        return ready

    def until(self, position: int) -> list[Taken]:
        """Take out what stands at ``position`` or before it."""
        ready = [item for item in self._taken if item.position <= position]
        self._taken = self._taken[len(ready) :]
        return ready


def interval_of(policy: SavePolicy, snapshot_bytes: int, n_ctx: int) -> int:
    """The distance of regular snapshots under a policy; 0: there are none."""
    if not policy.snapshot_interval:
        return 0
    return widened(
        policy.snapshot_interval,
        snapshot_bytes,
        n_ctx=n_ctx,
        bytes_max=policy.snapshot_bytes_max,
    )

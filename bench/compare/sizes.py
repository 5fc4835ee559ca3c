"""How much is measured."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """The targets hold for the defaults."""

    rounds: Mapping[int, int] = MappingProxyType({512: 5, 2048: 5, 6000: 3})
    """How often everybody takes a turn, for each length of the prompt in tokens."""
    tail_tokens: int = 32
    """What follows a prompt that was asked before, or what a branch does not share."""
    reply_tokens: int = 4
    floor_runs: int = 5
    turns: int = 10
    turn_reply_tokens: int = 48
    talk_rounds: int = 3
    talk_ctx: int = 4096
    """Tokens of the context that conversations are held in."""


QUICK = Sizes(
    rounds=MappingProxyType({128: 1}),
    tail_tokens=8,
    floor_runs=2,
    turns=3,
    turn_reply_tokens=6,
    talk_rounds=1,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""

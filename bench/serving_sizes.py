"""How much the benchmark of serving measures."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """The targets hold for the defaults."""

    streams: tuple[int, ...] = (1, 2, 4, 8)
    context_tokens: int = 1500
    tail_tokens: int = 12
    """What requests with a shared prefix do not share."""
    burst: int = 8
    burst_reply_tokens: int = 16
    burst_runs: int = 3
    decode_steps: int = 48
    decode_rounds: int = 6
    stalled_streams: int = 3
    stalled_tokens: int = 64
    """Of the prompts of streams that a long prompt comes between."""
    stalling_tokens: int = 4000
    stall_runs: int = 2
    tick_steps: int = 64
    tick_runs: int = 3


QUICK = Sizes(
    streams=(1, 2),
    context_tokens=80,
    burst=2,
    burst_reply_tokens=4,
    burst_runs=1,
    decode_steps=4,
    decode_rounds=1,
    stalled_streams=2,
    stalling_tokens=300,
    stall_runs=1,
    tick_steps=6,
    tick_runs=1,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""

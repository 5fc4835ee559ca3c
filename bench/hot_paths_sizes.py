"""How much the profile of the hot paths measures."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """The figures in the documentation are of the defaults."""

    runs: int = 7
    """A figure is the median of so many."""
    floor_bytes: int = 128_000_000
    streams: tuple[int, ...] = (1, 8)
    context_tokens: int = 2_000
    tick_steps: int = 48
    token_tokens: int = 100_000
    lookup_tokens: int = 32_000
    index_objects: int = 10_000
    written_blocks: int = 8


QUICK = Sizes(
    runs=1,
    floor_bytes=1_000_000,
    streams=(2,),
    context_tokens=200,
    tick_steps=6,
    token_tokens=200,
    lookup_tokens=2_048,
    index_objects=50,
    written_blocks=1,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""

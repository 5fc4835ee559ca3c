"""How much the cache's benchmark measures."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """How much is measured. The targets hold for the defaults."""

    runs: int = 5
    """A figure of time is the median of so many."""
    conversations: int = 10
    turns: int = 10
    index_objects: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    memory_objects: int = 100_000
    branches: int = 100_000
    prompt_tokens: int = 32_000
    scanned_objects: int = 10_000
    decoded_tokens: int = 256
    restored_blocks: int = 8
    trace_requests: int | None = None
    """None: all of the file."""


QUICK = Sizes(
    runs=2,
    conversations=2,
    turns=2,
    index_objects=(300, 600),
    memory_objects=500,
    branches=300,
    prompt_tokens=2_048,
    scanned_objects=50,
    decoded_tokens=8,
    restored_blocks=2,
    trace_requests=60,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""

"""How much the scenarios measure."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Sizes:
    """Each section takes less than four minutes at the defaults."""

    documents: int = 50
    instruction_tokens: int = 64
    """What the prompts of all documents begin with."""
    document_tokens: int = 400
    questions: int = 2
    """Of each document."""
    question_tokens: int = 16
    recomputed: int = 4
    """Of the documents: how many are also asked without a cache."""

    processes: int = 4
    shared_tokens: int = 800
    """What all prompts of all processes begin with."""
    own_tokens: int = 64
    asks: int = 2
    """Of each process, one after the other."""
    process_runs: int = 2

    turns: int = 20
    system_tokens: int = 200
    turn_tokens: int = 60
    """Of each message of the user."""
    turn_reply_tokens: int = 40

    lengths: tuple[int, ...] = (64, 256, 1024, 2048, 6000)
    """Of prompts that are restored, and computed."""
    recompute_runs: int = 3

    reply_tokens: int = 8


QUICK = Sizes(
    documents=2,
    document_tokens=80,
    questions=1,
    recomputed=1,
    processes=2,
    shared_tokens=300,
    asks=1,
    process_runs=1,
    turns=2,
    system_tokens=80,
    turn_reply_tokens=8,
    lengths=(64, 128),
    recompute_runs=1,
)
"""Sizes to see that everything runs; the numbers then mean nothing."""

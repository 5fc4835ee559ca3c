"""The status codes of :class:`~erllama_core.errors.DecodeFailed`."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """Why a step failed.

    The first four are what ``llama_decode`` returns for the same trouble (``llama.h``); the
    others are mistakes that llama.cpp would answer with wrong output.
    """

    NO_CELL = 1
    """A sequence, or the pool that all share, has no free cell for a token."""
    ABORTED = 2
    """``abort`` was called while the step ran."""
    INVALID_BATCH = -1
    """Rows that contradict the contract: position, sequence, size, or a token that is none."""
    COMPUTE_FAILED = -3
    """An injected fault."""
    MUST_DROP = -4
    """An earlier failure left the sequence undefined, and nobody has dropped it."""
    STATE_MISSING = -5
    """Ranges of a checkpoint sequence were imported, and no snapshot after them."""

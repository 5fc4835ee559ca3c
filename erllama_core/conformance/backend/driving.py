"""What tests do with the sequences of a context: compute, export, restore, compare."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from typing import Final

import attrs

from erllama_core.errors import ErllamaError
from erllama_core.interfaces.backend import Context, KVClass, Mark, RangeExport, RangeImport, Row

REFUSED: Final = (ErllamaError, ValueError)
"""What a call that makes no sense may raise."""


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32."""
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def unpack(packed: bytes | memoryview) -> list[int]:
    """The inverse of :func:`pack`."""
    data = bytes(packed)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def feed(context: Context, seq: int, tokens: Sequence[int]) -> list[float]:
    """Append tokens in one step; the logits after the last one, by token id."""
    context.step([Row(seq, context.length(seq), pack(tokens), logits=True)])
    return row_of(context.mark(0, None))


def row_of(mark: Mark) -> list[float]:
    """A whole mark's logits by token id; checks its form."""
    ids, logits = unpack(mark.tokens), list(array("f", mark.logits))
    assert len(ids) == len(logits) == mark.n_vocab, "a mark of size None has all logits"
    assert logits == sorted(logits, reverse=True), "the largest logit comes first"
    row = [float("nan")] * mark.n_vocab
    for token, logit in zip(ids, logits, strict=True):
        row[token] = logit
    return row


def decode(context: Context, seq: int, tokens: Sequence[int]) -> list[list[float]]:
    """Append tokens one by one; a row of logits for each."""
    return [feed(context, seq, [token]) for token in tokens]


def export(context: Context, seq: int, cuts: Sequence[int]) -> list[RangeImport]:
    """The blocks between cuts, exported by one call, as they would be imported."""
    ranges = [
        RangeExport(a, b, memoryview(bytearray(context.range_bytes(seq, a, b))))
        for a, b in itertools.pairwise(cuts)
    ]
    context.export_ranges(seq, ranges)
    return [RangeImport(r.start, r.end, r.end, r.into) for r in ranges]


def snapshot(context: Context, seq: int) -> memoryview:
    """What only exists while the sequence stands where it stands."""
    into = memoryview(bytearray(context.snapshot_bytes(seq)))
    context.export_snapshot(seq, into)
    return into


@attrs.frozen
class State:
    """All that is stored of a sequence, in whatever way its class has."""

    length: int
    blocks: tuple[RangeImport, ...]
    snapshot: memoryview | None

    @classmethod
    def of(cls, context: Context, seq: int) -> State:
        """Export it, in blocks as long as may be, or shorter."""
        length, longest = context.length(seq), context.max_block_tokens or 100
        blocks: tuple[RangeImport, ...] = ()
        if context.kv_class is not KVClass.WHOLE:
            cuts = [*range(0, length, min(longest, 100)), length]
            blocks = tuple(export(context, seq, cuts))
        part = None if context.kv_class is KVClass.SPAN else snapshot(context, seq)
        return cls(length, blocks, part)

    def restore(self, context: Context, seq: int) -> None:
        """Import it into an empty sequence."""
        if self.blocks:
            context.import_ranges(seq, self.blocks)
        if self.snapshot is not None:
            context.import_snapshot(seq, self.length, self.snapshot)


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two rows of logits; infinite where one is no number."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)

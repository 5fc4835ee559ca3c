"""Which operations on state a model's memory allows: claimed by kind, then proved."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
from llama_cpp import llama_cpp

from erllama_backend_llama.cell_check import CellCheck
from erllama_backend_llama.checkpoint import CheckpointRanges, Rest
from erllama_backend_llama.layout import BlobLayout, v_transposed
from erllama_backend_llama.separate import SeparateRanges
from erllama_backend_llama.state import (
    Ranges,
    RangeSizes,
    SequenceState,
    Snapshots,
    UnifiedRanges,
    WholeSnapshots,
)
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import KVClass, RangeExport, RangeImport

PROOF_TOKENS: Final = 3
"""Enough for two ranges, one of them of more than a token."""

_MROPE_TYPES: Final = frozenset({8, 24, 40})
"""``LLAMA_ROPE_TYPE_MROPE``, ``_VISION``, ``_IMROPE``: cells have more than one position."""


@attrs.frozen
class MemoryClass:
    """What is known of the memory; once it is proved, also how its state is moved."""

    kv_class: KVClass
    window: int
    """Tokens of the sliding window; 0: there is none."""
    has_cells: bool = True
    """Whether there are attention cells."""
    v_transposed: bool | None = None
    """How the V cache is laid out, which flash attention decides; None: not known."""
    ranges: Ranges | None = None
    """SPAN and CHECKPOINT."""
    snapshots: Snapshots | None = None
    """CHECKPOINT and WHOLE."""
    recurrent_state: bytes | None = None
    """Of the model's recurrent layers, as a snapshot: any that holds numbers; None: it has none."""

    def n_native(self, n_seq_max: int, *, unified: bool) -> int:
        """Sequences to open a context with, for ``n_seq_max`` that callers use.

        Ranges are moved by way of one more where cells are shared. Whole states need none, and
        with separate cells it would cost as many as any other sequence.
        """
        return n_seq_max + (unified and self.kv_class is not KVClass.WHOLE)


@attrs.frozen
class Pools:
    """How cells are shared out among native sequences."""

    unified: bool
    n_seq: int
    n_cells: int
    """In one pool."""

    @property
    def streams(self) -> int:
        return 1 if self.unified else self.n_seq


def claimed_class(model: Any, *, swa_full: bool, unified: bool) -> MemoryClass:
    """What the kind of the model's layers lets one expect, by what llama.cpp says of it.

    The window of a model that keeps its old cells can be cut in pieces no longer than itself, by
    sharing them, which takes one pool of cells; otherwise it is a part that cannot be cut, like
    the recurrent layers of a hybrid model. A recurrent model has nothing else, so that its
    snapshots are whole states. So are those of a hybrid model with a window: llama.cpp exports its
    window with the cells and not with the recurrent layers, while both have to be taken live.
    """
    window = max(0, int(llama_cpp.llama_model_n_swa(model)))
    if llama_cpp.llama_model_is_recurrent(model):
        kv_class = KVClass.WHOLE
    elif llama_cpp.llama_model_is_hybrid(model):
        kv_class = KVClass.WHOLE if window else KVClass.CHECKPOINT
    elif window and not (swa_full and unified):
        kv_class = KVClass.CHECKPOINT
    else:
        kv_class = KVClass.SPAN
    return MemoryClass(kv_class, window, not llama_cpp.llama_model_is_recurrent(model))


def _unified_ranges(
    state: SequenceState, *, window: int, scratch: int, cells: CellCheck
) -> UnifiedRanges:
    """For sequence 0, which holds PROOF_TOKENS tokens. Raises StateRejected unless sizes grow
    by the same for each token.
    """
    measured = []
    for tokens in range(1, PROOF_TOKENS + 1):
        state.share(0, scratch, 0, tokens)
        measured.append(state.size(scratch))
        state.empty(scratch)
    steps = {after - before for before, after in itertools.pairwise(measured)}
    if len(steps) != 1 or min(steps) <= 0:
        raise StateRejected(f"sizes of 1, 2, 3 tokens are not linear: {measured}")
    per_token = steps.pop()
    sizes = RangeSizes(fixed=measured[0] - per_token, per_token=per_token)
    return UnifiedRanges(state, scratch=scratch, sizes=sizes, window=window, cells=cells)


def prove_span(state: SequenceState, ranges: Ranges, decode: Callable[[int, int], None]) -> None:
    """Prove on sequence 0, which holds PROOF_TOKENS tokens, that ranges can be moved.

    A sequence put together from exported ranges must export the bytes that it was made of,
    and go on. Raises StateRejected with what differs.
    """
    bounds = ((0, 2), (2, PROOF_TOKENS), (0, PROOF_TOKENS))
    before = _exported(ranges, bounds)
    state.empty(0)
    # The first range is cut short and restored again behind the cut, as a branch would be.
    ranges.restore(0, 0, [RangeImport(0, 2, 1, memoryview(before[0]))])
    if not state.cut(0, 0):
        raise StateRejected("a sequence could not be cut")
    for (start, end), data in zip(bounds[:2], before, strict=False):
        ranges.restore(0, start, [RangeImport(start, end, end, memoryview(data))])
    if _exported(ranges, bounds) != before:
        raise StateRejected("a restored sequence exports other bytes than it was made of")
    if not state.cut(0, 2):
        raise StateRejected("a sequence could not be cut")
    decode(2, PROOF_TOKENS)


def prove_checkpoint(
    state: SequenceState,
    ranges: Ranges,
    snapshots: Snapshots,
    decode: Callable[[int, int], None],
) -> None:
    """Prove on sequence 0, which is empty, that ranges and snapshots make up its states.

    At an earlier position and at the last one a sequence put together from both must export the
    bytes that it was made of, and go on. Raises StateRejected with what differs.
    """
    taken = {}
    for start, end in ((0, 2), (2, PROOF_TOKENS)):
        decode(start, end)
        taken[end] = _snapshot(snapshots, 0)
    blocks = _exported(ranges, ((0, 2), (2, PROOF_TOKENS)))
    for stop in (PROOF_TOKENS, 2, 1):
        state.empty(0)
        first, second = blocks
        chain = [RangeImport(0, 2, min(2, stop), memoryview(first))]
        if stop > 2:
            chain.append(RangeImport(2, PROOF_TOKENS, PROOF_TOKENS, memoryview(second)))
        ranges.restore(0, 0, chain)
        if not ranges.can_stand_at(0, stop):
            raise StateRejected("a restored chain of ranges has not the cells that it should have")
        if stop not in taken:
            continue
        snapshots.write(0, stop, memoryview(taken[stop]))
        if not ranges.can_stand_at(0, stop):
            raise StateRejected("a restored snapshot changes the cells under it")
        bounds = [(item.start, item.end) for item in chain]
        if _exported(ranges, bounds, stop) != blocks[: len(chain)]:
            raise StateRejected("a restored sequence exports other ranges than it was made of")
        if _snapshot(snapshots, 0) != taken[stop]:
            raise StateRejected("a restored sequence exports another snapshot than it was made of")
        if stop < PROOF_TOKENS:
            decode(stop, PROOF_TOKENS)


def prove_whole(state: SequenceState) -> None:
    """Prove on sequence 0, which holds PROOF_TOKENS tokens, that its state can be restored.

    Raises StateRejected with what differs.
    """
    before = bytearray(state.size(0))
    state.read(0, memoryview(before))
    state.empty(0)
    state.write(0, memoryview(before), None, PROOF_TOKENS)
    after = bytearray(len(before))
    state.read(0, memoryview(after))
    if after != before:
        raise StateRejected("a restored sequence exports other bytes than it was made of")


def prove(
    claim: MemoryClass,
    state: SequenceState,
    pools: Pools,
    *,
    rope_type: int,
    is_recurrent: bool,
    scratch: int | None,
    decode: Callable[[int, int], None],
) -> tuple[MemoryClass, str | None]:
    """The class that holds, and, when it is less than was claimed, why.

    ``decode(start, end)`` computes these tokens of sequence 0, which is empty, as all others
    are, and is again afterwards. ``is_recurrent``: the model has recurrent layers. Raises
    StateRejected if not even whole states can be restored.
    """
    has_more_positions = rope_type in _MROPE_TYPES
    try:
        rest = None
        if claim.kv_class is KVClass.CHECKPOINT:
            rest = Rest(state, empty_seq=0, window=claim.window)
        decode(0, PROOF_TOKENS)
        blob = bytearray(state.size(0))
        state.read(0, memoryview(blob))
        transposed = v_transposed(
            blob,
            tokens=PROOF_TOKENS,
            streams=pools.streams,
            has_more_positions=has_more_positions,
        )
        claim = attrs.evolve(claim, v_transposed=transposed)
        cells_of = functools.partial(
            CellCheck.read,
            tokens=PROOF_TOKENS,
            streams=pools.streams,
            has_more_positions=has_more_positions,
        )
        cells = cells_of(blob)
        if rest is not None:
            rest.learn(0, cells_of)
        why = None
        if claim.kv_class is not KVClass.WHOLE:
            try:
                proved = _prove_ranges(
                    claim, state, pools, rest, blob, cells, has_more_positions, scratch, decode
                )
            except StateRejected as error:
                state.clear()
                decode(0, PROOF_TOKENS)
                why = str(error)
            else:
                return proved, None
        prove_whole(state)
        snapshots = WholeSnapshots(state, cells)
        return (
            attrs.evolve(
                claim,
                kv_class=KVClass.WHOLE,
                snapshots=snapshots,
                recurrent_state=_snapshot(snapshots, 0) if is_recurrent else None,
            ),
            why,
        )
    finally:
        state.clear()


def _prove_ranges(
    claim: MemoryClass,
    state: SequenceState,
    pools: Pools,
    rest: Rest | None,
    blob: bytearray,
    cells: CellCheck,
    has_more_positions: bool,
    scratch: int | None,
    decode: Callable[[int, int], None],
) -> MemoryClass:
    """What is claimed, with the means; ``blob`` is the whole state of sequence 0, which is there.

    Raises StateRejected.
    """
    if rest is not None:
        del blob[len(blob) - rest.bytes_in_state(0) :]
    elif scratch is not None:
        unified = _unified_ranges(state, window=claim.window, scratch=scratch, cells=cells)
        prove_span(state, unified, decode)
        return attrs.evolve(claim, ranges=unified)
    layout = BlobLayout.read(
        blob,
        tokens=PROOF_TOKENS,
        streams=pools.streams,
        has_more_positions=has_more_positions,
    )
    ranges: Ranges
    if rest is not None and scratch is not None:
        ranges = CheckpointRanges(state, scratch=scratch, layout=layout, rest=rest)
    else:
        ranges = SeparateRanges(state, layout=layout, n_cells=pools.n_cells, rest=rest)
    if rest is None:
        prove_span(state, ranges, decode)
        return attrs.evolve(claim, ranges=ranges)
    recurrent = None if rest.is_window else _snapshot(rest, 0)
    state.empty(0)
    prove_checkpoint(state, ranges, rest, decode)
    return attrs.evolve(claim, ranges=ranges, snapshots=rest, recurrent_state=recurrent)


def _snapshot(snapshots: Snapshots, seq: int) -> bytes:
    data = bytearray(snapshots.size(seq))
    snapshots.read(seq, memoryview(data))
    return bytes(data)


def _exported(
    ranges: Ranges, bounds: Sequence[tuple[int, int]], length: int = PROOF_TOKENS
) -> list[bytearray]:
    exported = [bytearray(ranges.sizes.of(end - start)) for start, end in bounds]
    items = [
        RangeExport(start, end, memoryview(data))
        for (start, end), data in zip(bounds, exported, strict=True)
    ]
    ranges.export(0, length, items)
    return exported

"""Which operations on state a model's memory allows: claimed by kind, then proved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
from llama_cpp import llama_cpp

from erllama_backend_llama.layout import BlobLayout, v_transposed
from erllama_backend_llama.separate import SeparateRanges
from erllama_backend_llama.state import Ranges, RangeSizes, SequenceState, UnifiedRanges
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import KVClass, RangeExport, RangeImport

PROOF_TOKENS: Final = 3
"""Enough for two ranges, one of them of more than a token."""

_MROPE_TYPES: Final = frozenset({8, 24, 40})
"""``LLAMA_ROPE_TYPE_MROPE``, ``_VISION``, ``_IMROPE``: cells have more than one position."""


@attrs.frozen
class MemoryClass:
    """What is known of the memory; ``ranges`` for SPAN only."""

    kv_class: KVClass
    window: int
    """Tokens of the sliding window; 0: there is none."""
    v_transposed: bool | None = None
    """How the V cache is laid out, which flash attention decides; None: not known."""
    ranges: Ranges | None = None


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
    """What the kind of the model's layers lets one expect.

    Recurrent and hybrid models have state that cannot be cut. So has a sliding window whose
    old cells are not kept. The window of a model that keeps them can be cut in pieces no
    longer than itself, by sharing them, which takes one pool of cells.
    """
    window = max(0, int(llama_cpp.llama_model_n_swa(model)))
    is_whole = (
        llama_cpp.llama_model_is_recurrent(model)
        or llama_cpp.llama_model_is_hybrid(model)
        or (window > 0 and not (swa_full and unified))
    )
    return MemoryClass(KVClass.WHOLE if is_whole else KVClass.SPAN, window)


def _unified_ranges(state: SequenceState, *, window: int, scratch: int) -> UnifiedRanges:
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
    return UnifiedRanges(state, scratch=scratch, sizes=sizes, window=window)


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
    scratch: int | None,
    decode: Callable[[int, int], None],
) -> tuple[MemoryClass, str | None]:
    """The class that holds, and, when it is less than was claimed, why.

    ``decode(start, end)`` computes these tokens of sequence 0, which is empty, as all others
    are, and is again afterwards. Raises StateRejected if not even whole states can be restored.
    """
    has_more_positions = rope_type in _MROPE_TYPES
    try:
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
        if claim.kv_class is KVClass.SPAN:
            try:
                ranges: Ranges
                if scratch is not None:
                    ranges = _unified_ranges(state, window=claim.window, scratch=scratch)
                else:
                    layout = BlobLayout.read(
                        blob,
                        tokens=PROOF_TOKENS,
                        streams=pools.streams,
                        has_more_positions=has_more_positions,
                    )
                    ranges = SeparateRanges(state, layout=layout, n_cells=pools.n_cells)
                prove_span(state, ranges, decode)
            except StateRejected as error:
                state.clear()
                decode(0, PROOF_TOKENS)
                prove_whole(state)
                return attrs.evolve(claim, kv_class=KVClass.WHOLE), str(error)
            return attrs.evolve(claim, ranges=ranges), None
        prove_whole(state)
        return attrs.evolve(claim, kv_class=KVClass.WHOLE), None
    finally:
        state.clear()


def _exported(ranges: Ranges, bounds: Sequence[tuple[int, int]]) -> list[bytearray]:
    exported = [bytearray(ranges.sizes.of(end - start)) for start, end in bounds]
    items = [
        RangeExport(start, end, memoryview(data))
        for (start, end), data in zip(bounds, exported, strict=True)
    ]
    ranges.export(0, PROOF_TOKENS, items)
    return exported

"""Which operations on state a model's memory allows: claimed by kind, then proved."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any, Final

import attrs
from llama_cpp import llama_cpp

from erllama_backend_llama.state import RangeSizes, RangeTransfer, SequenceState
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import KVClass

PROOF_TOKENS: Final = 3
"""Enough for two ranges, one of them of more than a token."""

_MROPE_TYPES: Final = frozenset({8, 24, 40})
"""``LLAMA_ROPE_TYPE_MROPE``, ``_VISION``, ``_IMROPE``: cells have more than one position."""


@attrs.frozen
class MemoryClass:
    """What is known of the memory; ``sizes`` for SPAN only."""

    kv_class: KVClass
    window: int
    """Tokens of the sliding window; 0: there is none."""
    v_transposed: bool | None = None
    """How the V cache is laid out, which flash attention decides; None: not known."""
    sizes: RangeSizes | None = None


def claimed_class(model: Any, *, swa_full: bool) -> MemoryClass:
    """What the kind of the model's layers lets one expect.

    Recurrent and hybrid models have state that cannot be cut. So has a sliding window whose
    old cells are not kept. The window of a model that keeps them can be cut in pieces no
    longer than itself.
    """
    window = max(0, int(llama_cpp.llama_model_n_swa(model)))
    is_whole = (
        llama_cpp.llama_model_is_recurrent(model)
        or llama_cpp.llama_model_is_hybrid(model)
        or (window > 0 and not swa_full)
    )
    return MemoryClass(KVClass.WHOLE if is_whole else KVClass.SPAN, window)


def prove_span(state: SequenceState, *, window: int, scratch: int) -> RangeSizes:
    """Prove on sequence 0, which holds PROOF_TOKENS tokens, that ranges can be moved.

    Sizes must grow by the same for each token, and a sequence put together from exported
    ranges must export the bytes that it was made of. Raises StateRejected with what differs.
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
    transfer = RangeTransfer(state, scratch=scratch, sizes=sizes, window=window)
    ranges = ((0, 2), (2, PROOF_TOKENS), (0, PROOF_TOKENS))
    before = [_exported(transfer, start, end) for start, end in ranges]
    state.empty(0)
    # The first range is cut short and restored again behind the cut, as a branch would be.
    transfer.restore(0, 0, 2, 1, memoryview(before[0]))
    if not state.cut(0, 0):
        raise StateRejected("a sequence could not be cut")
    for (start, end), data in zip(ranges[:2], before, strict=False):
        transfer.restore(0, start, end, end, memoryview(data))
    after = [_exported(transfer, start, end) for start, end in ranges]
    if after != before:
        raise StateRejected("a restored sequence exports other bytes than it was made of")
    return sizes


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
    *,
    rope_type: int,
    scratch: int | None,
    decode: Callable[[int], None],
) -> tuple[MemoryClass, str | None]:
    """The class that holds, and, when it is less than was claimed, why.

    ``decode(n)`` computes tokens 0 to n-1 of sequence 0, which is empty, as all others are,
    and is again afterwards. Raises StateRejected if not even whole states can be restored.
    """
    try:
        decode(PROOF_TOKENS)
        blob = bytearray(state.size(0))
        state.read(0, memoryview(blob))
        layout = v_transposed(blob, has_more_positions=rope_type in _MROPE_TYPES)
        claim = attrs.evolve(claim, v_transposed=layout)
        if claim.kv_class is KVClass.SPAN and scratch is not None:
            try:
                sizes = prove_span(state, window=claim.window, scratch=scratch)
            except StateRejected as error:
                state.clear()
                decode(PROOF_TOKENS)
                prove_whole(state)
                return attrs.evolve(claim, kv_class=KVClass.WHOLE), str(error)
            return attrs.evolve(claim, sizes=sizes), None
        prove_whole(state)
        return attrs.evolve(claim, kv_class=KVClass.WHOLE), None
    finally:
        state.clear()


def v_transposed(blob: bytes | bytearray, *, has_more_positions: bool) -> bool | None:
    """What an exported state of PROOF_TOKENS tokens says of the layout of V; None if unclear.

    The layout of llama.cpp 0.3.36's bundled build: u32 magic, i32 sequence, u32 streams, u32
    cells, then per cell i32 position, u32 number of ids, three more i32 with M-RoPE,
    the ids; then u32 "V is transposed", u32 layers. Every field is checked on the way, so that
    another layout gives None and not a wrong answer.
    """
    cell = struct.Struct("<iI12xi" if has_more_positions else "<iIi")
    head = struct.Struct("<8xII")
    tail = struct.Struct("<II")
    if len(blob) < head.size + PROOF_TOKENS * cell.size + tail.size:
        return None
    if head.unpack_from(blob) != (1, PROOF_TOKENS):
        return None
    cells = [cell.unpack_from(blob, head.size + index * cell.size) for index in range(PROOF_TOKENS)]
    if any((position, ids) != (index, 1) for index, (position, ids, _) in enumerate(cells)):
        return None
    transposed, layers = tail.unpack_from(blob, head.size + PROOF_TOKENS * cell.size)
    return bool(transposed) if transposed in (0, 1) and 0 < layers < 4096 else None


def _exported(transfer: RangeTransfer, start: int, end: int) -> bytearray:
    data = bytearray(transfer.sizes.of(end - start))
    transfer.export(0, start, end, memoryview(data))
    return data

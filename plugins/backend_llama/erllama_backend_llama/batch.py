"""The arrays of one llama.cpp batch, made once and filled without work per token."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from llama_cpp import llama_cpp

from erllama_core.errors import InvalidPrompt
from erllama_core.interfaces.backend import Row

TOKEN: Final = np.dtype("<u4")
"""How tokens are packed."""

_FEW_BYTES: Final = 256
"""Of a few tokens Python finds the largest sooner than numpy does."""

Output = tuple[int, int]
"""A row's last token: its index in the batch, and how many rows lie before it there."""


class Batch:
    """Memory for ``n_batch`` tokens in the layout of ``struct llama_batch``.

    ``native`` points into the arrays and must not outlive this object.
    """

    def __init__(self, *, n_batch: int, n_seq: int, n_vocab: int) -> None:
        self._n_batch = n_batch
        self._n_vocab = n_vocab
        self._tokens = np.zeros(n_batch, dtype=TOKEN)
        self._positions = np.zeros(n_batch, dtype=np.int32)
        self._sequence_counts = np.ones(n_batch, dtype=np.int32)
        self._sequences = np.zeros(n_batch, dtype=np.uintp)
        self._wanted = np.zeros(n_batch, dtype=np.int8)
        # For a few values numpy takes longer than the memory's own views.
        self._token_bytes = self._tokens.data.cast("B")
        self._position_view = self._positions.data
        self._sequence_view = self._sequences.data
        self._wanted_bytes = self._wanted.data.cast("B")
        self._counting = np.arange(n_batch, dtype=np.int32)
        # Every token points at its sequence's entry of this one array.
        self._sequence_ids = np.arange(n_seq, dtype=np.int32)
        first = self._sequence_ids.ctypes.data
        self._pointers = [first + 4 * seq for seq in range(n_seq)]
        native = llama_cpp.llama_batch()
        native.n_tokens = 0
        native.token = _pointer(self._tokens, ctypes.c_int32)
        native.pos = _pointer(self._positions, ctypes.c_int32)
        native.n_seq_id = _pointer(self._sequence_counts, ctypes.c_int32)
        native.seq_id = _pointer(self._sequences, ctypes.POINTER(ctypes.c_int32))
        native.logits = _pointer(self._wanted, ctypes.c_int8)
        self.native: Final = native

    def fill(self, rows: Sequence[Row]) -> list[Output]:
        """Lay the rows out; for each, where its logits will be: those after its last token.

        They are computed for rows that do not want them, too: they show whether what was
        computed is numbers. The caller has checked sequences and positions. Raises ValueError
        for rows that do not fit or are no packed tokens, InvalidPrompt for ids outside the
        vocabulary.
        """
        # Separate cells: llama.cpp computes sequences together only where their numbers ascend.
        order = sorted(range(len(rows)), key=[row.seq for row in rows].__getitem__)
        ordered = [rows[number] for number in order]
        packed = b"".join([row.tokens for row in ordered])
        n_tokens = len(packed) // TOKEN.itemsize
        if n_tokens > self._n_batch:
            raise ValueError(
                f"a step of more than {self._n_batch} tokens; split it, or load the model "
                f"with a larger context_opts.n_batch"
            )
        largest = _largest(packed)
        if largest >= self._n_vocab:
            raise InvalidPrompt(
                f"token {largest} is outside the vocabulary of {self._n_vocab} tokens"
            )
        self._token_bytes[: len(packed)] = packed
        ends = self._place_single(ordered) if n_tokens == len(rows) else self._place(ordered)
        self.native.n_tokens = n_tokens
        outputs = [(0, 0)] * len(rows)
        for place, number in enumerate(order):
            outputs[number] = ends[place], place
        return outputs

    def _place_single(self, rows: Sequence[Row]) -> Sequence[int]:
        """As :meth:`_place`, for rows of one token: replies, whose callers wait for each step."""
        n = len(rows)
        self._position_view[:n] = array(self._position_view.format, [row.start for row in rows])
        self._sequence_view[:n] = array(
            self._sequence_view.format, [self._pointers[row.seq] for row in rows]
        )
        self._wanted_bytes[:n] = b"\1" * n
        return range(n)

    def _place(self, rows: Sequence[Row]) -> Sequence[int]:
        """Positions and sequences of rows of any length; the index of each one's last token."""
        ends = []
        offset = 0
        for row in rows:
            count = len(row.tokens) // TOKEN.itemsize
            end = offset + count
            np.add(self._counting[:count], row.start, out=self._positions[offset:end])
            self._sequences[offset:end] = self._pointers[row.seq]
            ends.append(end - 1)
            offset = end
        self._wanted[:offset] = 0
        self._wanted[ends] = 1
        return ends

    def want_all(self) -> None:
        """Have an output for every token laid out, as pooling takes."""
        self._wanted[: self.native.n_tokens] = 1


def _largest(packed: bytes) -> int:
    if len(packed) < _FEW_BYTES:
        return max(memoryview(packed).cast("I"))
    return int(np.frombuffer(packed, dtype=TOKEN).max())


def _pointer(values: np.ndarray[Any, Any], element: Any) -> Any:
    return ctypes.cast(values.ctypes.data, ctypes.POINTER(element))

"""Tokens and their logits as llama.cpp's samplers take them: ``struct llama_token_data``."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp

from erllama_core.interfaces.backend import Mark

Candidates = npt.NDArray[Any]
"""An array of :data:`CANDIDATE`."""
Logits = npt.NDArray[np.float32]

CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

assert CANDIDATE.itemsize == ctypes.sizeof(llama_cpp.llama_token_data)


@attrs.frozen(slots=True, eq=False)
class LiveRow:
    """A row of a context's last step: valid until the next one."""

    context: Any
    """The native context."""
    index: int
    """What llama.cpp calls the row."""
    logits: Logits
    largest: int
    """The token with the largest logit, the first of equal ones."""


def of_row(row: Logits) -> Candidates:
    """All tokens of a row, by id."""
    candidates = np.zeros(row.size, dtype=CANDIDATE)
    candidates["id"] = np.arange(row.size, dtype=np.int32)
    candidates["logit"] = row
    return candidates


def of_mark(mark: Mark, n_vocab: int) -> Candidates:
    """A mark's tokens. Raises ValueError for a mark of another vocabulary, or an empty one."""
    if mark.n_vocab != n_vocab:
        raise ValueError(
            f"a mark over {mark.n_vocab} tokens; this model's vocabulary has {n_vocab}"
        )
    tokens = np.frombuffer(mark.tokens, dtype="<u4")
    logits = np.frombuffer(mark.logits, dtype="<f4")
    if not 0 < tokens.size == logits.size or int(tokens.max()) >= n_vocab:
        raise ValueError("a mark holds tokens of the vocabulary, with one logit each")
    if np.isnan(logits).any():  # which llama.cpp would sort by
        raise ValueError("a mark holds logits that are no numbers")
    candidates = np.zeros(tokens.size, dtype=CANDIDATE)
    if mark.is_whole:
        # A chain without a cut draws in the order of its candidates: that of a fresh row.
        candidates["id"] = np.arange(tokens.size)
        candidates["logit"][tokens] = logits
    else:
        candidates["id"] = tokens
        candidates["logit"] = logits
    return candidates


def array_of(candidates: Candidates) -> Any:
    """``struct llama_token_data_array`` over ``candidates``, which must outlive it.

    Samplers shrink, sort, and may move it; only its own fields say where it is.
    """
    return llama_cpp.llama_token_data_array(
        data=ctypes.cast(candidates.ctypes.data, llama_cpp.llama_token_data_p),
        size=candidates.size,
        selected=-1,
        sorted=False,
    )

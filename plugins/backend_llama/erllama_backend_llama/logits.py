"""Marks: the largest logits of a row, in the order in which they are stored."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp

from erllama_core.interfaces.backend import Mark

Logits = npt.NDArray[np.float32]

# As llama_cpp.llama_get_logits, but for the address alone: a pointer object for every step costs
# more than the call.
_logits_of: Final = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    ("llama_get_logits", llama_cpp._lib)  # noqa: SLF001 - the binding has no public name for it
)


class StepLogits:
    """llama.cpp's own logits of the last step, not a copy; valid until the next one.

    Views are kept, as making one takes numpy longer than all else that a step does with it.
    """

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab: Final = n_vocab
        self._address = 0
        self._views: dict[int, Logits] = {}

    def rows(self, context: Any, n_rows: int) -> Logits | None:
        """A row of the vocabulary's size for each output; None where llama.cpp kept none."""
        address: int | None = _logits_of(context)
        if address is None:
            return None
        if address != self._address:
            self._address = address
            self._views.clear()
        view = self._views.get(n_rows)
        if view is None:
            size = n_rows * self._n_vocab
            flat = np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
            view = self._views[n_rows] = flat.reshape(n_rows, self._n_vocab)
        return view


def largest(rows: Logits) -> list[int]:
    """The token with the largest logit of each row, the first of equal ones.

    -1 for a row that cannot be sampled from. One NaN in the KV cells makes all of a row NaN,
    and sampling from that draws garbage without an error. The maximum shows it: NaN wins every
    comparison in numpy's.
    """
    best = rows.argmax(axis=1)
    sound = np.isfinite(rows[np.arange(len(rows)), best])
    found: list[int] = (best if sound.all() else np.where(sound, best, -1)).tolist()
    return found


def largest_of(row: Logits, size: int) -> npt.NDArray[np.int64]:
    """The tokens of the ``size`` largest logits, fewer than there are, by ascending id."""
    smallest = np.partition(row, row.size - size)[row.size - size]
    above = np.flatnonzero(row > smallest)
    # flatnonzero ascends, so of equal logits at the edge the lowest ids are kept.
    equal = np.flatnonzero(row == smallest)[: size - above.size]
    return np.sort(np.concatenate((above, equal)))


def make_mark(row: Logits, size: int | None) -> Mark:
    """The ``size`` largest logits, largest first, equal ones by ascending token id.

    ``size`` None, or at least the vocabulary's: all of them. ``row`` is numbers.
    """
    n_vocab = row.size
    if size is not None and size < 1:
        raise ValueError(f"a mark of {size} logits; 1 at least")
    chosen = np.arange(n_vocab) if size is None or size >= n_vocab else largest_of(row, size)
    # A stable sort keeps ascending ids among equal logits.
    chosen = chosen[np.argsort(-row[chosen], kind="stable")]
    peak = float(row.max())
    total = float(np.exp(row.astype(np.float64) - peak).sum())
    return Mark(
        tokens=chosen.astype("<u4").tobytes(),
        logits=row[chosen].astype("<f4").tobytes(),
        logsumexp=peak + math.log(total),
        n_vocab=n_vocab,
    )

"""What llama.cpp takes from a state without a look at it, looked at before.

It sets memory aside for as many cells as a state says that it has, and believes in their
positions: a cell with a negative one belongs to no range of positions, so that nothing but
clearing the whole memory removes it, and every later state of its sequence is spoilt. A checksum
is no help against state that was forged.
"""

from __future__ import annotations

import attrs
import numpy as np

from erllama_backend_llama.layout import HEAD_BYTES, BlobLayout
from erllama_core.errors import StateRejected


@attrs.frozen(eq=False)
class CellCheck:
    """The pools of cells that a state begins with. Immutable.

    Those of a sliding window come behind the others; a recurrent state, which has no cells, comes
    last, and is left to llama.cpp.
    """

    pools: tuple[BlobLayout, ...]

    @classmethod
    def read(
        cls, blob: bytes | bytearray, *, tokens: int, streams: int, has_more_positions: bool
    ) -> CellCheck:
        """Those of the state of sequence 0, which has ``tokens`` tokens; of a layout that is not
        known there are none.
        """
        pools: list[BlobLayout] = []
        head, at = bytes(blob[:HEAD_BYTES]), HEAD_BYTES
        while at < len(blob):
            try:
                pool, size = BlobLayout.read_pool(
                    head + bytes(blob[at:]),
                    tokens=tokens,
                    streams=streams,
                    has_more_positions=has_more_positions,
                )
            except StateRejected:
                break
            pools.append(pool)
            at += size - HEAD_BYTES
        return cls(tuple(pools))

    def check(self, data: memoryview, start: int | None, end: int) -> None:
        """Raise StateRejected unless each pool holds positions [start, end), once each.

        ``start`` None: any number of them that end there.
        """
        view, at = np.frombuffer(data, dtype=np.uint8), HEAD_BYTES
        for pool in self.pools:
            at = pool.check_pool(view, at, start, end)

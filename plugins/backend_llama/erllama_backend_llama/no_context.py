"""What a model has in place of a context when it cannot generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

from erllama_core.errors import NotSupported
from erllama_core.interfaces.backend import (
    ContextOptions,
    KVClass,
    Mark,
    RangeExport,
    RangeImport,
    Row,
    Sampler,
)


class NoContext:
    """A context without a state, in which nothing can be computed: see ``Context``."""

    kv_class: Final = KVClass.WHOLE
    max_block_tokens: Final = None
    exports_whole: Final = False

    def __init__(self, options: ContextOptions, reason: str) -> None:
        self.n_ctx: Final = options.n_ctx
        self.n_cells: Final = options.n_ctx
        self.n_seq_max: Final = options.n_seq_max
        self.n_batch: Final = options.n_batch
        self._reason: Final = reason

    def step(self, rows: Sequence[Row]) -> None:
        self._refuse(rows)

    def sample(self, row: int, sampler: Sampler, *, greedy: bool = False) -> int:
        self._refuse(row, sampler, greedy)

    def mark(self, row: int, size: int | None) -> Mark:
        self._refuse(row, size)

    def range_bytes(self, seq: int, start: int, end: int) -> int:
        self._refuse(seq, start, end)

    def export_ranges(self, seq: int, ranges: Sequence[RangeExport]) -> None:
        self._refuse(seq, ranges)

    def import_ranges(self, seq: int, ranges: Sequence[RangeImport]) -> None:
        self._refuse(seq, ranges)

    def snapshot_bytes(self, seq: int) -> int:
        self._refuse(seq)

    def export_snapshot(self, seq: int, into: memoryview) -> None:
        self._refuse(seq, into)

    def import_snapshot(self, seq: int, length: int, data: memoryview) -> None:
        self._refuse(seq, length, data)

    def abort(self) -> None:
        """Nothing runs."""

    def length(self, seq: int) -> int:
        del seq
        return 0

    def drop(self, seq: int) -> None:
        """Every sequence is empty."""

    def truncate(self, seq: int, length: int) -> bool:
        del seq
        return length == 0

    def share(self, source: int, target: int, length: int) -> bool:
        del source, target
        return length == 0

    def close(self) -> None:
        """Nothing to free. Idempotent."""

    def _refuse(self, *_: object) -> NoReturn:
        raise NotSupported(self._reason)

"""The context: sequences in their cells, and every way in which state comes and goes."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Final, NoReturn

from erllama_backend_stub.adapter import StubAdapter, adapted_key
from erllama_backend_stub.blob import BlobKind, blob_bytes, read_blob, write_blob
from erllama_backend_stub.cells import CellMaker, CellPool
from erllama_backend_stub.constrained import ConstrainedStubSampler
from erllama_backend_stub.faults import FaultPlan
from erllama_backend_stub.logits import LogitRow
from erllama_backend_stub.options import StubOptions
from erllama_backend_stub.sampler import StubSampler
from erllama_backend_stub.script import Script
from erllama_backend_stub.sequence import STATE_BYTES, Sequence
from erllama_backend_stub.status import Status
from erllama_backend_stub.vocabulary import size_of_vocabulary
from erllama_core.errors import DecodeAborted, DecodeFailed, StateRejected
from erllama_core.interfaces.backend import (
    ContextOptions,
    CostPrior,
    KVClass,
    Mark,
    RangeExport,
    RangeImport,
    Row,
    Sampler,
)


class StubContext:
    """See ``erllama_core.interfaces.backend.Context``, whose contract it also enforces.

    After a failed step SPAN sequences are as they were before it, others are empty. A failed
    import leaves its sequence undefined: until it is dropped, it cannot be truncated, shared,
    exported or imported into, and a step with it fails. A failed export changes nothing. All
    calls but ``abort`` must come from the thread of the first one, and none after ``close``:
    RuntimeError otherwise. A sequence number that does not exist is a
    ValueError, in a step DecodeFailed like every other mistake in its rows.
    """

    def __init__(
        self,
        options: StubOptions,
        context: ContextOptions,
        maker: CellMaker,
        script: Script | None,
        faults: FaultPlan,
    ) -> None:
        self._options = options
        self._script = script
        self._faults = faults
        self.kv_class: Final = options.state_class
        self.n_ctx: Final = context.n_ctx
        self.n_seq_max: Final = context.n_seq_max
        self.n_batch: Final = context.n_batch
        self.n_cells: Final = context.n_ctx * (1 if context.kv_unified else context.n_seq_max)
        self.max_block_tokens: Final = options.max_block_tokens
        self.exports_whole: Final = not context.kv_unified
        self._cell_bytes = maker.cell_bytes
        self._own_maker = maker
        self._adapters: tuple[tuple[StubAdapter, float], ...] = ()
        n_pools = 1 if context.kv_unified else context.n_seq_max
        self._pools = [CellPool(context.n_ctx, maker.cell_bytes) for _ in range(n_pools)]
        self._sequences = [
            Sequence(
                self._pool(seq),
                maker,
                recurrent=self.kv_class is KVClass.CHECKPOINT,
                keeps_tape=script is not None,
            )
            for seq in range(context.n_seq_max)
        ]
        self._rows: list[LogitRow | None] = []
        self._aborted = threading.Event()
        self._never = threading.Event()
        self._thread: int | None = None
        self._closed = False

    @property
    def cost_prior(self) -> CostPrior | None:
        """What the options declare; by default None, so that tests see what is stored reused."""
        declared_us = self._options.declared_us_per_token
        if declared_us is None:
            return None
        return CostPrior(compute_s_per_token=declared_us / 1e6, import_s_per_byte=1e-9)

    # -------------------------------------------------------------- guards

    def _enter(self) -> None:
        if self._closed:
            raise RuntimeError("the context is closed")
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        elif self._thread != here:
            raise RuntimeError("a context belongs to the thread that used it first")

    def _sequence(self, seq: int) -> Sequence:
        self._enter()
        if not 0 <= seq < self.n_seq_max:
            raise ValueError(f"there is no sequence {seq}; n_seq_max is {self.n_seq_max}")
        return self._sequences[seq]

    def _pool(self, seq: int) -> CellPool:
        return self._pools[seq % len(self._pools)]

    # ------------------------------------------------------------- compute

    def step(self, rows: Items[Row]) -> None:
        """Compute all rows, or none.

        Raises DecodeFailed with a :class:`Status`. Sleeps as long as the options say.
        """
        self._enter()
        if any(adapter.is_closed for adapter, _ in self._adapters):
            raise RuntimeError("an adapter of this context was closed")
        self._rows = []
        self._aborted.clear()
        try:
            tokens = [self._row_tokens(row) for row in rows]
            self._check_batch(rows, tokens)
            self._meet_fault()
            self._sleep([len(row_tokens) for row_tokens in tokens])
            if self._aborted.is_set():
                raise DecodeAborted("the step was aborted", code=int(Status.ABORTED))
        except DecodeFailed:
            for row in rows:
                if 0 <= row.seq < self.n_seq_max:
                    self._take_back(self._sequences[row.seq])
            raise
        for row, row_tokens in zip(rows, tokens, strict=True):
            sequence = self._sequences[row.seq]
            sequence.compute(row_tokens)
            self._rows.append(self._logits(sequence) if row.logits else None)

    def abort(self) -> None:
        """See the protocol. Ends a step that hangs or sleeps."""
        self._aborted.set()
        self._faults.gate.wake()

    def set_adapters(self, adapters: Items[tuple[StubAdapter, float]]) -> None:
        """Compute with these from now on. For the faults it counts as a step.

        When it fails, with none of the old ones nor the new. RuntimeError while any sequence
        has cells, for a closed adapter, and for a scale of 0.
        """
        self._enter()
        if any(len(sequence) or sequence.must_drop for sequence in self._sequences):
            raise RuntimeError("adapters are changed while sequences have cells")
        if any(adapter.is_closed or not scale for adapter, scale in adapters):
            raise RuntimeError("a closed adapter, or one of no effect, cannot be attached")
        self._aborted.clear()
        self._adapters = ()
        self._use_key(b"neither the old ones nor the new ones")
        self._meet_fault()
        self._adapters = tuple(adapters)
        self._use_key(adapted_key(self._own_maker.key, adapters))

    def _use_key(self, key: bytes) -> None:
        maker = CellMaker(key, self._cell_bytes)
        for sequence in self._sequences:
            sequence.maker = maker

    def _take_back(self, sequence: Sequence) -> None:
        """What a failed step leaves of a sequence that did not fail before."""
        if self.kv_class is not KVClass.SPAN and not sequence.must_drop:
            sequence.clear()

    def _row_tokens(self, row: Row) -> tuple[int, ...]:
        if not row.tokens or len(row.tokens) % 4:
            _fail(Status.INVALID_BATCH, f"a row of {len(row.tokens)} bytes of u32 tokens")
        tokens = struct.unpack(f"<{len(row.tokens) // 4}I", row.tokens)
        n_tokens = size_of_vocabulary(digraphs=self._options.digraphs)
        if (top := max(tokens)) >= n_tokens:
            _fail(Status.INVALID_BATCH, f"token {top} is outside the vocabulary of {n_tokens}")
        return tokens

    def _check_batch(self, rows: Items[Row], tokens: Items[tuple[int, ...]]) -> None:
        total = sum(map(len, tokens))
        if total > self.n_batch:
            _fail(Status.INVALID_BATCH, f"{total} tokens in one step; n_batch is {self.n_batch}")
        if len({row.seq for row in rows}) < len(rows):
            _fail(Status.INVALID_BATCH, "a sequence has more than one row")
        for row in rows:
            if not 0 <= row.seq < self.n_seq_max:
                _fail(
                    Status.INVALID_BATCH,
                    f"there is no sequence {row.seq}; n_seq_max is {self.n_seq_max}",
                )
            sequence = self._sequences[row.seq]
            if sequence.must_drop:
                _fail(Status.MUST_DROP, f"sequence {row.seq} failed before and was not dropped")
            if row.start != len(sequence):
                _fail(
                    Status.INVALID_BATCH,
                    f"a row starts at {row.start}; sequence {row.seq} ends at {len(sequence)}",
                )
            if self.kv_class is KVClass.CHECKPOINT and sequence.state is None:
                _fail(
                    Status.STATE_MISSING,
                    f"sequence {row.seq} has ranges, but no snapshot was imported after them",
                )
        needed = dict.fromkeys(map(id, self._pools), 0)
        for row, row_tokens in zip(rows, tokens, strict=True):
            pool = self._pool(row.seq)
            needed[id(pool)] += len(row_tokens)
            if needed[id(pool)] > pool.n_free:
                _fail(
                    Status.NO_CELL,
                    f"no cells for {needed[id(pool)]} tokens; {pool.n_free} of {self.n_ctx} are "
                    f"free",
                )

    def _meet_fault(self) -> None:
        fault = self._faults.next_step()
        if fault.hangs:
            deaf = self._faults.hang_deaf
            self._faults.gate.pass_through(self._never if deaf else self._aborted)
        if fault.fails:
            _fail(Status.COMPUTE_FAILED, f"injected fault in step {fault.ordinal}")

    def _sleep(self, lengths: Items[int]) -> None:
        prefilled = sum(length for length in lengths if length > 1)
        cost_us = prefilled * self._options.prefill_us_per_token
        if 1 in lengths:
            cost_us += self._options.decode_us
        if cost_us > 0:
            self._aborted.wait(cost_us / 1e6)

    def _logits(self, sequence: Sequence) -> LogitRow:
        forced = self._script.next_token(sequence.tape()) if self._script else None
        return LogitRow(sequence.digest(), forced, self._options.eog_rate)

    def _row(self, row: int) -> LogitRow:
        self._enter()
        found = self._rows[row] if 0 <= row < len(self._rows) else None
        if found is None:
            raise ValueError(f"row {row} of the last step has no logits")
        return found

    def sample(self, row: int, sampler: Sampler, *, greedy: bool = False) -> int:
        """See the protocol. Raises ValueError for a row without logits."""
        logits = self._row(row)
        if not isinstance(sampler, StubSampler | ConstrainedStubSampler):
            raise TypeError(f"a {type(sampler).__name__} is not a sampler of this model")
        return sampler.sample_row(logits, greedy=greedy)

    def mark(self, row: int, size: int | None) -> Mark:
        """See the protocol. Raises ValueError for a row without logits."""
        return self._row(row).mark(size)

    def logit(self, row: int, token: int) -> float:
        """See the protocol. Raises ValueError for a row without logits."""
        return self._row(row).values[token]

    # ----------------------------------------------------------- sequences

    def length(self, seq: int) -> int:
        sequence = self._sequence(seq)
        return 0 if sequence.must_drop else len(sequence)

    def drop(self, seq: int) -> None:
        self._sequence(seq).clear()

    def truncate(self, seq: int, length: int) -> bool:
        """See the protocol. Any class can keep everything or nothing, SPAN any length."""
        sequence = self._sequence(seq)
        if sequence.must_drop or not 0 <= length <= len(sequence):
            return False
        if length == len(sequence):
            return True
        if length == 0:
            sequence.clear()
            return True
        if self.kv_class is not KVClass.SPAN:
            return False
        sequence.cut(length)
        return True

    def share(self, source: int, target: int, length: int) -> bool:
        """See the protocol. Raises ValueError for a target that is not empty or a length that
        the source does not have; StateRejected for a sequence that must be dropped.
        """
        giver, taker = self._usable(source), self._usable(target)
        if giver is taker or len(taker) or not 0 < length <= len(giver):
            raise ValueError(
                f"{length} tokens of sequence {source}, which has {len(giver)}, cannot be shared "
                f"with sequence {target}, which has {len(taker)}"
            )
        if self.kv_class is KVClass.CHECKPOINT and giver.state is None:
            raise StateRejected(f"sequence {source} has ranges, but no state to share")
        if self.kv_class is not KVClass.SPAN and length != len(giver):
            return False
        taker.share(giver, length)
        return True

    # -------------------------------------------------------------- ranges

    def range_bytes(self, seq: int, start: int, end: int) -> int:
        """See the protocol. Raises StateRejected for a range that cannot be exported."""
        sequence = self._usable(seq)
        if self.kv_class is KVClass.WHOLE:
            raise StateRejected("a whole-state model has no ranges")
        if not 0 <= start < end <= len(sequence):
            raise StateRejected(
                f"range [{start}, {end}) is not in sequence {seq} of {len(sequence)} tokens"
            )
        self._check_block(start, end)
        return blob_bytes(self._cell_bytes, end - start)

    def export_ranges(self, seq: int, ranges: Items[RangeExport]) -> None:
        """See the protocol. Each range counts as an export of its own for the faults."""
        sequence = self._usable(seq)
        for item in ranges:
            self.range_bytes(seq, item.start, item.end)
        for item in ranges:
            units = sequence.read(item.start, item.end)
            self._export(BlobKind.RANGE, self._cell_bytes, units, item.into)

    def import_ranges(self, seq: int, ranges: Items[RangeImport]) -> None:
        """See the protocol; the tokens that the ranges stand for are not looked at."""
        sequence = self._usable(seq)
        with _undefined_if_rejected(sequence):
            if self.kv_class is KVClass.WHOLE:
                raise StateRejected("a whole-state model has no ranges")
            self._meet_import_fault()
            for item in ranges:
                self._import_range(seq, sequence, item)

    def _import_range(self, seq: int, sequence: Sequence, item: RangeImport) -> None:
        if item.start != len(sequence) or not item.start < item.stop <= item.end:
            raise StateRejected(
                f"range [{item.start}, {item.end}) up to {item.stop} cannot follow the "
                f"{len(sequence)} tokens of sequence {seq}"
            )
        self._check_block(item.start, item.end)
        count = item.stop - item.start
        units = read_blob(item.data, BlobKind.RANGE, self._cell_bytes, item.end - item.start)
        self._check_room(seq, count)
        sequence.put(units[: count * self._cell_bytes])

    def _check_block(self, start: int, end: int) -> None:
        if self.max_block_tokens is not None and end - start > self.max_block_tokens:
            raise StateRejected(
                f"range [{start}, {end}) is longer than max_block_tokens={self.max_block_tokens}"
            )

    # ----------------------------------------------------------- snapshots

    def snapshot_bytes(self, seq: int) -> int:
        """See the protocol. Raises StateRejected where there is nothing to take."""
        sequence = self._usable(seq)
        if self.kv_class is KVClass.SPAN:
            raise StateRejected("a span model has no snapshots")
        if self.kv_class is KVClass.WHOLE:
            return blob_bytes(self._cell_bytes, len(sequence))
        if sequence.state is None:
            raise StateRejected(f"sequence {seq} has ranges, but no state to take a snapshot of")
        return blob_bytes(STATE_BYTES, 1)

    def export_snapshot(self, seq: int, into: memoryview) -> None:
        self.snapshot_bytes(seq)
        sequence = self._sequences[seq]
        if sequence.state is not None:
            self._export(BlobKind.STATE, STATE_BYTES, sequence.state, into)
        else:
            units = sequence.read(0, len(sequence))
            self._export(BlobKind.WHOLE, self._cell_bytes, units, into)

    def import_snapshot(self, seq: int, length: int, data: memoryview) -> None:
        """See the protocol; the tokens that the snapshot stands for are not looked at.

        CHECKPOINT: ``length`` is the sequence's length, it is not cut to it.
        """
        sequence = self._usable(seq)
        with _undefined_if_rejected(sequence):
            if self.kv_class is KVClass.SPAN:
                raise StateRejected("a span model has no snapshots")
            self._meet_import_fault()
            if self.kv_class is KVClass.CHECKPOINT:
                if length != len(sequence):
                    raise StateRejected(
                        f"a snapshot at {length} tokens for sequence {seq} of {len(sequence)}"
                    )
                sequence.state = bytes(read_blob(data, BlobKind.STATE, STATE_BYTES, 1))
            else:
                if len(sequence):
                    raise StateRejected(f"sequence {seq} is not empty; a whole state needs that")
                units = read_blob(data, BlobKind.WHOLE, self._cell_bytes, length)
                self._check_room(seq, length)
                sequence.put(units)

    # --------------------------------------------------- state in and out

    def _usable(self, seq: int) -> Sequence:
        sequence = self._sequence(seq)
        if sequence.must_drop:
            raise StateRejected(f"sequence {seq} failed before and was not dropped")
        return sequence

    def _check_room(self, seq: int, count: int) -> None:
        if count > (free := self._pool(seq).n_free):
            raise StateRejected(f"no cells for {count} tokens; {free} of {self.n_ctx} are free")

    def _export(self, kind: BlobKind, unit_bytes: int, units: bytes, into: memoryview) -> None:
        fault = self._faults.next_export()
        if fault.fails:
            raise StateRejected(f"injected fault in export {fault.ordinal}")
        write_blob(into, kind, unit_bytes, units, short=fault.short)

    def _meet_import_fault(self) -> None:
        fault = self._faults.next_import()
        if fault.fails:
            raise StateRejected(f"injected fault in import {fault.ordinal}")

    def close(self) -> None:
        """See the protocol. From the context's thread, unless it was closed before."""
        if self._closed:
            return
        self._enter()
        self._closed = True
        self._rows = []
        self._sequences = []
        self._pools = []


@contextlib.contextmanager
def _undefined_if_rejected(sequence: Sequence) -> Iterator[None]:
    try:
        yield
    except StateRejected:
        sequence.must_drop = True
        raise


def _fail(status: Status, message: str) -> NoReturn:
    raise DecodeFailed(message, code=int(status))

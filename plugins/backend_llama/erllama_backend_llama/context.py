"""The context: KV state for several sequences, and the steps that extend it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_backend_llama import logits, native
from erllama_backend_llama.abort import AbortFlag
from erllama_backend_llama.adapter import LlamaAdapter
from erllama_backend_llama.batch import Batch, Output
from erllama_backend_llama.candidates import LiveRow
from erllama_backend_llama.constrained import ConstrainedLlamaSampler
from erllama_backend_llama.context_params import cost_prior, native_params
from erllama_backend_llama.healing import Healer
from erllama_backend_llama.kv_class import MemoryClass, Pools, claimed_class, prove
from erllama_backend_llama.sampler import LlamaSampler
from erllama_backend_llama.state import Ranges, SequenceState, Snapshots
from erllama_core.errors import (
    DecodeAborted,
    DecodeFailed,
    EngineClosed,
    InvalidPrompt,
    ModelLoadError,
    NotNumbers,
    NotSupported,
    StateRejected,
)
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
from erllama_core.interfaces.log import get_logger

log = get_logger(__name__)

_BROKEN: Final = -1
"""The length of a sequence whose import failed; it must be dropped."""
_ABORTED: Final = 2
ENCODES_ONLY: Final = (
    "this model is an encoder: it embeds text and cannot go on with it; use embed, or load a "
    "model that generates"
)

_LACKS: Final = "this model's state is of class {!r}, which has no {}"

DECODE_STATUS: Final = {
    1: "there are not enough free KV cells for this step; drop a sequence, or load the model "
    "with a larger context_opts.n_ctx",
    _ABORTED: "the step was aborted",
    -1: "llama.cpp refused the batch as invalid",
}
"""What ``llama_decode`` returns, by llama.h; 0 is success, below -1 a fatal error."""


def longest_context(model: Any, context: Any) -> int:
    """Tokens of one sequence of a context, at most."""
    return longest_text(model, int(llama_cpp.llama_n_ctx_seq(context)))


def longest_text(model: Any, n_ctx: int) -> int:
    """Tokens that a model can take in a context of so many.

    A model without rotary positions may have learned ones: a table with a row for each position
    of its training, beyond which llama.cpp aborts the process.
    """
    learned = (
        llama_cpp.llama_model_rope_type(model) == llama_cpp.LLAMA_ROPE_TYPE_NONE
        and not llama_cpp.llama_model_is_recurrent(model)
        and not llama_cpp.llama_model_is_hybrid(model)
    )
    return min(n_ctx, int(llama_cpp.llama_model_n_ctx_train(model))) if learned else n_ctx


class LlamaContext:
    """A ``llama_context``. One thread alone calls it, but for :meth:`abort`.

    In one pool of cells sequence n_seq_max, beyond those that callers use, is empty but during
    an export or an import. Positions
    and sequences are checked here: llama.cpp aborts the process on some that are out of range
    and accepts others. Raises ModelLoadError when it cannot be opened, NotSupported for a model
    that has no state and so generates nothing.
    """

    def __init__(self, model: Any, options: ContextOptions, *, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._unified = options.kv_unified
        self.cost_prior: Final[CostPrior] = cost_prior(model, options)
        claim = claimed_class(model, swa_full=options.swa_full, unified=options.kv_unified)
        n_seq_max = options.n_seq_max
        n_seq = claim.n_native(n_seq_max, unified=options.kv_unified)
        scratch = n_seq_max if n_seq > n_seq_max else None
        self._context: Any = _open(model, native_params(options, n_seq=n_seq, window=claim.window))
        self.adapters: tuple[LlamaAdapter, ...] = ()
        """Those that it computes with."""
        try:
            if not llama_cpp.llama_get_memory(self._context):
                raise NotSupported(ENCODES_ONLY)
            self._abort = AbortFlag(self._context)
            self._n_ctx = longest_context(model, self._context)
            self._n_cells = self._n_ctx * (1 if options.kv_unified else n_seq_max)
            self._n_batch = int(llama_cpp.llama_n_batch(self._context))
            self._n_seq_max = n_seq_max
            self._lengths = [0] * n_seq_max
            self._outputs: list[Output | None] = []
            self._step_logits = logits.StepLogits(n_vocab)
            self._logits: logits.Logits | None = None
            """Of the last step, a row for each of its rows, in the order of its batch."""
            self._largest: list[int] = []
            """The token with the largest logit of each."""
            self._stateless: set[int] = set()
            """Sequences with ranges whose snapshot is still to come."""
            self._batch = Batch(n_batch=self._n_batch, n_seq=n_seq, n_vocab=n_vocab)
            self._state = SequenceState(self._context)
            self._ranges: Ranges | None = None
            self._snapshots: Snapshots | None = None
            self._healer: Healer | None = None
            pools = Pools(options.kv_unified, n_seq, int(llama_cpp.llama_n_ctx_seq(self._context)))
            self.memory_class: Final = self._prove(model, claim, pools, scratch)
            self._ranges = self.memory_class.ranges
            self._snapshots = self.memory_class.snapshots
            self._healer = Healer(self._state, self.memory_class, n_seq=n_seq)
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------- properties

    @property
    def kv_class(self) -> KVClass:
        return self.memory_class.kv_class

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def n_cells(self) -> int:
        return self._n_cells

    @property
    def n_seq_max(self) -> int:
        return self._n_seq_max

    @property
    def n_batch(self) -> int:
        return self._n_batch

    @property
    def max_block_tokens(self) -> int | None:
        """The sliding window, for a model that has one and is SPAN class."""
        has_window = self.kv_class is KVClass.SPAN and self.memory_class.window > 0
        return self.memory_class.window if has_window else None

    @property
    def exports_whole(self) -> bool:
        return self._ranges is not None and self._ranges.exports_whole

    # ------------------------------------------------------------- compute

    def step(self, rows: Sequence[Row]) -> None:
        """Compute all rows in one native call; each sequence appears at most once.

        Raises DecodeFailed with llama.cpp's status; ValueError, with nothing changed, for rows
        that make no sense (InvalidPrompt for ids outside the vocabulary).
        """
        self._abort.reset()
        context = self._open_context()
        self._check_rows(rows)
        if self._healer is not None:
            self._healer.before_step(rows, self._lengths)
        self._outputs = []
        outputs = self._batch.fill(rows)
        status = int(llama_cpp.llama_decode(context, self._batch.native))
        if status != 0:
            for row in rows:
                self._take_back(row)
            words = DECODE_STATUS.get(status, "llama.cpp failed while computing the step")
            failure = DecodeAborted if status == _ABORTED else DecodeFailed
            raise failure(words, code=status)
        self._check_numbers(rows, outputs)
        lengths, given = self._lengths, self._outputs
        for row, output in zip(rows, outputs, strict=True):
            lengths[row.seq] = row.start + len(row.tokens) // 4
            given.append(output if row.logits else None)

    def set_adapters(self, adapters: Sequence[tuple[LlamaAdapter, float]]) -> None:
        """Compute with these from now on, and try it. Raises ValueError while there are tokens.

        The trial is also the step in which llama.cpp plans its graphs anew, and reads what
        :class:`NativeLock` guards: whoever calls this holds that lock. Raises DecodeFailed.
        """
        context = self._open_context()
        if any(self._lengths):
            raise ValueError("adapters are changed while all sequences are empty")
        natives, scales = None, None
        if adapters:
            kind = type(adapters[0][0].native)
            natives = (kind * len(adapters))(*(adapter.native for adapter, _ in adapters))
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        llama_cpp.llama_set_adapters_lora(context, natives, len(adapters), scales)
        before, self.adapters = self.adapters, tuple(adapter for adapter, _ in adapters)
        for adapter in self.adapters:
            adapter.attached()
        for adapter in before:
            adapter.detached()
        self.step([Row(0, 0, bytes(4), logits=True)])
        self.drop(0)

    def abort(self) -> None:
        """End the running step at its next graph node. Any thread; on the CPU alone."""
        self._abort.set()

    def _take_back(self, row: Row) -> None:
        """After a failed step: the sequence as it was before it, or, where not, empty.

        What llama.cpp has left of the step is not told; a recurrent state is half computed, while
        its last position claims otherwise.
        """
        ranges, seq = self._ranges, row.seq
        can_return = (
            ranges is not None
            and self.memory_class.kv_class is KVClass.SPAN
            and row.start > 0
            and self._state.cut(seq, row.start)
            and self._state.positions(seq)[1] == row.start - 1
            and ranges.can_stand_at(seq, row.start)
        )
        if not can_return:
            self.drop(seq)

    def _check_numbers(self, rows: Sequence[Row], outputs: Sequence[Output]) -> None:
        """Raise NotNumbers when a row came out as none; its sequence is then empty.

        The cells of such a row must be neither used nor saved: in one pool of cells, without
        flash attention, a single NaN among them makes every other sequence's next step NaN,
        and it stays there until the cells are zeroed.
        """
        self._logits = self._step_logits.rows(self._context, len(rows))
        if self._logits is None:
            for row in rows:
                self._take_back(row)
            raise DecodeFailed("llama.cpp kept no logits for rows that asked for them", code=0)
        self._largest = logits.largest(self._logits)
        if min(self._largest) >= 0:
            return
        spoilt = {
            row.seq
            for row, (_, place) in zip(rows, outputs, strict=True)
            if self._largest[place] < 0
        }
        for seq in spoilt:
            # One by one: what is healed when a sequence is dropped is what it leaves behind.
            if self._healer is not None:
                self._healer.note_spoilt(seq)
            self.drop(seq)
        for row in rows:
            if row.seq not in spoilt:
                self._take_back(row)
        raise NotNumbers(
            "the model computed logits that are not numbers; the weights or a restored state "
            "are damaged",
            code=0,
            seqs=spoilt,
            reaches_others=self._healer is not None and self._healer.reaches_others,
        )

    def sample(self, row: int, sampler: Sampler, *, greedy: bool = False) -> int:
        """Draw from the row's logits, which ``step`` found to be numbers."""
        index, place = self._output(row)
        if isinstance(sampler, LlamaSampler) and sampler.takes_largest(greedy=greedy):
            return self._largest[place]
        if not isinstance(sampler, LlamaSampler | ConstrainedLlamaSampler):
            raise TypeError(f"a sampler of this backend's new_sampler, got {sampler!r}")
        assert self._logits is not None
        live = LiveRow(self._context, index, self._logits[place], self._largest[place])
        return sampler.sample_row(live, greedy=greedy)

    def mark(self, row: int, size: int | None) -> Mark:
        """The row's largest logits."""
        _, place = self._output(row)
        assert self._logits is not None
        return logits.make_mark(self._logits[place], size)

    def logit(self, row: int, token: int) -> float:
        """Of one token of the row."""
        _, place = self._output(row)
        assert self._logits is not None
        return float(self._logits[place][token])

    # ----------------------------------------------------------- sequences

    def length(self, seq: int) -> int:
        self._check_sequence(seq)
        return max(0, self._lengths[seq])

    def drop(self, seq: int) -> None:
        if self._context is not None and self._is_sequence(seq):
            self._state.empty(seq)
            self._lengths[seq] = 0
            self._stateless.discard(seq)
            if self._healer is not None:
                self._healer.after_drop(seq, self._lengths)

    def truncate(self, seq: int, length: int) -> bool:
        self._open_context()
        current = self._length(seq)
        if not 0 <= length <= current:
            raise ValueError(f"sequence {seq} has {current} tokens, it cannot keep {length}")
        if length == current:
            return True
        if length == 0:
            self.drop(seq)
            return True
        if self.kv_class is not KVClass.SPAN:
            return False
        if self._ranges is None or not self._ranges.can_stand_at(seq, length):
            return False
        if not self._state.cut(seq, length):
            return False
        self._lengths[seq] = length
        return True

    def share(self, source: int, target: int, length: int) -> bool:
        """See the protocol. ValueError for a length that ``source`` does not have, or a
        ``target`` that is not empty.
        """
        self._open_context()
        current = self._length(source)
        if source == target or self._length(target) != 0 or not 0 < length <= current:
            raise ValueError(
                f"1 to {current} tokens of sequence {source} can be shared with another one "
                f"that is empty; {length} were asked for, with sequence {target}"
            )
        if self.kv_class is not KVClass.SPAN and length != current:
            return False
        self._check_has_state(source)
        if self._ranges is not None:
            done = self._ranges.share(source, target, length)
        elif self.memory_class.window or not self._unified:
            done = self._copy_whole(source, target, length)
        else:
            self._state.copy_all(source, target)
            done = True
        if done:
            self._lengths[target] = length
            if self._healer is not None:
                self._healer.note_shared(source, target)
        return done

    def _copy_whole(self, source: int, target: int, length: int) -> bool:
        # Not llama.cpp's own copy: a window that sheds cells is pinned by it.
        data = memoryview(bytearray(self._state.size(source)))
        try:
            self._state.read(source, data)
            self._state.write(target, data, None, length)
        except StateRejected:
            return False
        return True

    # --------------------------------------------------------------- state

    def range_bytes(self, seq: int, start: int, end: int) -> int:
        self._check_range(seq, start, end)
        return self._transfer().sizes.of(end - start)

    def export_ranges(self, seq: int, ranges: Sequence[RangeExport]) -> None:
        """Copy ranges out. Raises StateRejected when not all of one is there any more, which a
        sliding window's cells may not be; ValueError for a buffer of another size.
        """
        for item in ranges:
            expected = self.range_bytes(seq, item.start, item.end)
            if item.into.nbytes != expected:
                raise ValueError(f"the range has {expected} bytes, the buffer {item.into.nbytes}")
            if item.into.readonly:
                raise ValueError("a range is exported into writable memory, got a read-only view")
        if ranges:
            self._transfer().export(seq, self._length(seq), ranges)

    def import_ranges(self, seq: int, ranges: Sequence[RangeImport]) -> None:
        """Append stored ranges. Raises StateRejected; what was restored until then stays until
        the sequence is dropped, and nothing else is left behind.
        """
        self._open_context()
        transfer = self._transfer()
        length = self._length(seq)
        self._check_chain(length, ranges)
        if not ranges:
            return
        # Until the chain is complete and proved so.
        self._lengths[seq] = _BROKEN
        transfer.restore(seq, length, ranges)
        length = ranges[-1].stop
        if not transfer.can_stand_at(seq, length):
            raise StateRejected(f"the restored sequence lacks cells before position {length}")
        self._lengths[seq] = length
        if self.kv_class is KVClass.CHECKPOINT:
            self._stateless.add(seq)

    def snapshot_bytes(self, seq: int) -> int:
        return self._snapshots_of(seq).size(seq)

    def export_snapshot(self, seq: int, into: memoryview) -> None:
        self._snapshots_of(seq).read(seq, into)

    def import_snapshot(self, seq: int, length: int, data: memoryview) -> None:
        """Put the sequence at ``length`` tokens. Raises StateRejected; it must then be dropped."""
        self._open_context()
        snapshots = self._require_snapshots()
        there = length if self.kv_class is KVClass.CHECKPOINT else 0
        if self._length(seq) != there or not 0 < length <= self._n_ctx:
            raise ValueError(
                f"a snapshot is restored at 1 to {self._n_ctx} tokens, into a sequence that has "
                f"its ranges, or is empty where there are none; sequence {seq} has "
                f"{self._length(seq)} tokens, {length} were asked for"
            )
        self._lengths[seq] = _BROKEN
        snapshots.write(seq, length, data)
        if self._ranges is not None and not self._ranges.can_stand_at(seq, length):
            raise StateRejected("the snapshot changed the cells that were restored before")
        self._lengths[seq] = length
        self._stateless.discard(seq)

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            self._outputs = []
            self._logits = None
            llama_cpp.llama_free(context)
            for adapter in self.adapters:
                adapter.detached()
            self.adapters = ()

    # -------------------------------------------------------------- checks

    def _open_context(self) -> Any:
        if self._context is None:
            raise EngineClosed("the context was closed")
        return self._context

    def _is_sequence(self, seq: int) -> bool:
        return 0 <= seq < self._n_seq_max

    def _check_sequence(self, seq: int) -> None:
        if not 0 <= seq < self._n_seq_max:
            raise ValueError(f"sequences are 0 to {self._n_seq_max - 1}, got {seq}")

    def _length(self, seq: int) -> int:
        self._check_sequence(seq)
        length = self._lengths[seq]
        if length == _BROKEN:
            raise ValueError(f"sequence {seq} failed earlier and must be dropped first")
        return length

    def _check_rows(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError("a step needs at least one row")
        seen: set[int] = set()
        for row in rows:
            seq, start, size = row.seq, row.start, len(row.tokens)
            length = self._length(seq)
            if seq in seen:
                raise ValueError(f"sequence {seq} appears twice in one step")
            seen.add(seq)
            if start != length:
                raise ValueError(f"sequence {seq} has {length} tokens, the row starts at {start}")
            self._check_has_state(seq)
            if size == 0 or size % 4:
                raise ValueError(f"a row holds packed u32 tokens, at least one; got {size} bytes")
            if start + size // 4 > self._n_ctx:
                raise ValueError(
                    f"sequence {seq} would have {start + size // 4} tokens; the context has "
                    f"{self._n_ctx} cells"
                )

    def _check_range(self, seq: int, start: int, end: int) -> None:
        self._open_context()
        length = self._length(seq)
        if not 0 <= start < end <= length:
            raise ValueError(f"sequence {seq} has {length} tokens, not the range [{start}, {end})")
        self._check_block(start, end)

    def _check_block(self, start: int, end: int) -> None:
        limit = self.max_block_tokens
        if limit is not None and end - start > limit:
            raise ValueError(
                f"ranges of this model have at most {limit} tokens, its sliding window; "
                f"got [{start}, {end})"
            )

    def _check_chain(self, length: int, ranges: Sequence[RangeImport]) -> None:
        for part in ranges:
            if part.start != length or not part.start < part.stop <= part.end <= self._n_ctx:
                raise ValueError(
                    f"the range [{part.start}, {part.end}) up to {part.stop} does not continue "
                    f"a sequence of {length} tokens"
                )
            self._check_block(part.start, part.end)
            length = part.stop

    def _check_has_state(self, seq: int) -> None:
        if seq in self._stateless:
            raise ValueError(f"sequence {seq} has ranges, but no snapshot was imported after them")

    def _snapshots_of(self, seq: int) -> Snapshots:
        self._open_context()
        snapshots = self._require_snapshots()
        if self._length(seq) == 0:
            raise ValueError(f"sequence {seq} is empty; there is no state to export")
        self._check_has_state(seq)
        return snapshots

    def _require_snapshots(self) -> Snapshots:
        if self._snapshots is None:
            raise NotSupported(_LACKS.format(self.kv_class.value, "snapshots"))
        return self._snapshots

    def _transfer(self) -> Ranges:
        if self._ranges is None:
            raise NotSupported(_LACKS.format(self.kv_class.value, "ranges"))
        return self._ranges

    def _output(self, row: int) -> Output:
        output = self._outputs[row] if 0 <= row < len(self._outputs) else None
        if output is None:
            self._open_context()
            raise ValueError(f"row {row} of the last step has no logits")
        return output

    # ------------------------------------------------------------- opening

    def _prove(
        self, model: Any, claim: MemoryClass, pools: Pools, scratch: int | None
    ) -> MemoryClass:
        def decode(start: int, end: int) -> None:
            self._lengths[0] = start
            # One by one: a batch may be smaller than the proof.
            for position in range(start, end):
                token = (position % self._n_vocab).to_bytes(4, "little")
                self.step([Row(0, position, token, logits=False)])

        try:
            proved, why = prove(
                claim,
                self._state,
                pools,
                rope_type=int(llama_cpp.llama_model_rope_type(model)),
                is_recurrent=bool(
                    llama_cpp.llama_model_is_recurrent(model)
                    or llama_cpp.llama_model_is_hybrid(model)
                ),
                scratch=scratch,
                decode=decode,
            )
        except (DecodeFailed, InvalidPrompt, StateRejected) as error:
            raise ModelLoadError(
                "the model computes, but its state cannot be saved and restored, or it does not "
                "compute at all",
                reason=str(error),
            ) from error
        finally:
            self._lengths[0] = 0
        if why is not None:
            log.warning("llama.state.whole_only", reason=why)
        return proved


def _open(model: Any, params: Any) -> Any:
    with native.collect_log() as lines:
        context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ModelLoadError(
            "llama.cpp could not make a context; with too little memory lower "
            "context_opts.n_ctx, otherwise see the reason",
            reason=native.reason(lines),
        )
    return context

"""What every backend's context must do, in either mode of its cells.

A backend's tests derive from :class:`ContextContract` and say how a context is opened and how
far two computations of the same tokens may lie apart.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from erllama_core.errors import DecodeFailed, StateRejected
from erllama_core.interfaces.backend import Context, KVClass, RangeExport, RangeImport, Row

TOKENS: Sequence[int] = [(7 * index + index // 13) % 200 for index in range(300)]
OTHERS: Sequence[int] = [(5 * index + index // 11) % 200 for index in range(300)]
N_CTX = 512
N_SEQ = 3
NEXT = [5, 50, 17, 99]

Logits = npt.NDArray[np.float32]


def pack(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<u4").tobytes()


def feed(context: Context, seq: int, tokens: Sequence[int]) -> Logits:
    """Append tokens in one step; the logits after the last one, by token id."""
    context.step([Row(seq, context.length(seq), pack(tokens), logits=True)])
    return logits(context, 0)


def logits(context: Context, row_number: int) -> Logits:
    """Those of a row of the last step, by token id."""
    mark = context.mark(row_number, None)
    row = np.empty(mark.n_vocab, dtype=np.float32)
    row[np.frombuffer(mark.tokens, "<u4")] = np.frombuffer(mark.logits, "<f4")
    return row


def decode(context: Context, seq: int, tokens: Sequence[int]) -> Logits:
    """Append tokens one by one; a row of logits for each."""
    return np.stack([feed(context, seq, [token]) for token in tokens])


def export(context: Context, seq: int, cuts: Sequence[int]) -> list[RangeImport]:
    """The blocks between cuts, exported by one call."""
    ranges = [
        RangeExport(a, b, memoryview(bytearray(context.range_bytes(seq, a, b))))
        for a, b in pairwise(cuts)
    ]
    context.export_ranges(seq, ranges)
    return [RangeImport(r.start, r.end, r.end, r.into) for r in ranges]


def take_snapshot(context: Context, seq: int) -> memoryview:
    """What only exists while the sequence stands where it stands."""
    data = memoryview(bytearray(context.snapshot_bytes(seq)))
    context.export_snapshot(seq, data)
    return data


def states(context: Context) -> list[bytes]:
    """All that sequences hold, as bytes that do not depend on where it lies."""
    blocks = []
    for seq in range(context.n_seq_max):
        length = context.length(seq)
        cuts = [*range(0, length, 60), length]
        blocks.append(b"".join(b.data for b in export(context, seq, cuts)) if length else b"")
    return blocks


class ContextContract(abc.ABC):
    """See the module."""

    rounding: float = 0.0
    """How far logits of equal tokens may be apart that were computed beside other neighbours."""

    @abc.abstractmethod
    def open(self, *, unified: bool, kv_class: KVClass) -> Context:
        """A new context of N_CTX cells and N_SEQ sequences, closed when the test has ended."""

    @pytest.fixture(params=[True, False], ids=["unified", "separate"])
    def unified(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture
    def span(self, unified: bool) -> Iterator[Context]:
        context = self.open(unified=unified, kv_class=KVClass.SPAN)
        yield context
        context.close()

    @pytest.fixture
    def whole(self, unified: bool) -> Iterator[Context]:
        context = self.open(unified=unified, kv_class=KVClass.WHOLE)
        yield context
        context.close()

    @pytest.fixture
    def checkpoint(self, unified: bool) -> Iterator[Context]:
        context = self.open(unified=unified, kv_class=KVClass.CHECKPOINT)
        yield context
        context.close()

    def same(self, one: Logits, other: Logits) -> bool:
        return float(np.abs(one - other).max()) <= self.rounding

    def test_cells_are_counted_by_mode(self, span: Context, unified: bool) -> None:
        """Unified sequences share n_ctx tokens, separate ones have as many each."""
        assert span.kv_class is KVClass.SPAN
        assert (span.n_ctx, span.n_seq_max) == (N_CTX, N_SEQ)
        assert span.n_cells == (N_CTX if unified else N_CTX * N_SEQ)
        assert span.exports_whole is not unified
        # As much as there is room for, and one more.
        feed(span, 0, TOKENS)
        feed(span, 1, OTHERS[: N_CTX - len(TOKENS)])
        if unified:
            with pytest.raises(DecodeFailed):
                feed(span, 2, [1])
        else:
            feed(span, 2, TOKENS)
            feed(span, 1, OTHERS)

    def test_ranges_of_one_call_are_those_of_many(self, span: Context) -> None:
        """Exported together, in any order and with overlaps, ranges are what each is alone."""
        feed(span, 1, OTHERS[:50])
        feed(span, 0, TOKENS)
        bounds = [(256, 300), (0, 256), (100, 101), (0, 300)]
        together = [
            RangeExport(a, b, memoryview(bytearray(span.range_bytes(0, a, b)))) for a, b in bounds
        ]
        span.export_ranges(0, together)
        for item in together:
            (alone,) = export(span, 0, [item.start, item.end])
            assert alone.data == item.into

    def test_restored_sequences_hold_what_was_exported(self, span: Context) -> None:
        """In another sequence, in parts, up to the middle of a block: the same state again."""
        feed(span, 0, OTHERS[:70])
        feed(span, 1, TOKENS[:150])
        first, second = export(span, 1, [0, 90, 150])
        span.drop(1)
        span.import_ranges(2, [RangeImport(0, 90, 90, first.data)])
        assert span.length(2) == 90
        span.import_ranges(2, [RangeImport(90, 150, 130, second.data)])
        assert span.length(2) == 130
        fresh = self.open(unified=span.n_cells == span.n_ctx, kv_class=KVClass.SPAN)
        feed(fresh, 0, TOKENS[:130])
        assert self.same(decode(span, 2, NEXT), decode(fresh, 0, NEXT))
        fresh.close()

    def test_shared_prefix_goes_on_as_a_computed_one(self, span: Context) -> None:
        """A sharer computes what it would have alone, and so does the one it shares with."""
        expected = {}
        for length in (1, 128, 200):
            feed(span, 0, TOKENS[:length])
            expected[length] = decode(span, 0, NEXT)
            span.drop(0)
        feed(span, 0, TOKENS[:200])
        for length in (1, 128, 200):
            assert span.share(0, 1, length)
            assert [span.length(seq) for seq in range(N_SEQ)] == [200, length, 0]
            assert self.same(decode(span, 1, NEXT), expected[length])
            span.drop(1)
        assert self.same(decode(span, 0, NEXT), expected[200])

    def test_sharers_outlive_their_source(self, span: Context) -> None:
        """What is shared stays when the source is cut, dropped and used again at once."""
        feed(span, 0, TOKENS[:150])
        before = states(span)[0]
        assert span.share(0, 1, 150)
        span.truncate(0, 30)
        assert span.share(1, 2, 150)
        span.drop(0)
        feed(span, 0, OTHERS[:150])
        (theirs,) = export(span, 0, [0, 150])
        span.drop(0)
        span.import_ranges(0, [theirs])
        assert states(span)[1:] == [before, before]
        span.truncate(1, 20)
        span.drop(2)
        assert span.share(1, 2, 10)
        feed(span, 2, TOKENS[10:40])

    def test_whole_state_is_shared_only_whole(self, whole: Context) -> None:
        """Where state cannot be cut, all of it is shared or nothing, and nothing changes."""
        feed(whole, 0, TOKENS[:100])
        for length in (1, 99):
            assert not whole.share(0, 1, length)
            assert [whole.length(seq) for seq in range(N_SEQ)] == [100, 0, 0]
        assert whole.share(0, 1, 100)
        whole.drop(2)
        one, other = decode(whole, 0, NEXT), decode(whole, 1, NEXT)
        assert self.same(one, other)

    def test_ranges_and_an_earlier_snapshot_make_a_sequence(self, checkpoint: Context) -> None:
        """Ranges may be exported late and cut, if the snapshot was taken while it stood there."""
        feed(checkpoint, 0, TOKENS[:90])
        snapshot = take_snapshot(checkpoint, 0)
        feed(checkpoint, 0, TOKENS[90:200])
        blocks = export(checkpoint, 0, [0, 60, 150, 200])
        checkpoint.drop(0)
        feed(checkpoint, 1, OTHERS[:40])
        ranges = [blocks[0], RangeImport(60, 150, 90, blocks[1].data)]
        checkpoint.import_ranges(2, ranges[:1])
        checkpoint.import_ranges(2, ranges[1:])
        checkpoint.import_snapshot(2, 90, snapshot)
        assert [checkpoint.length(seq) for seq in range(N_SEQ)] == [0, 40, 90]
        feed(checkpoint, 0, TOKENS[:90])
        expected = decode(checkpoint, 0, NEXT)
        assert self.same(decode(checkpoint, 2, NEXT), expected)

    def test_ranges_alone_are_no_sequence(self, checkpoint: Context) -> None:
        """Until its snapshot is there a sequence can be neither extended, stored nor shared."""
        feed(checkpoint, 0, TOKENS[:60])
        snapshot = take_snapshot(checkpoint, 0)
        (block,) = export(checkpoint, 0, [0, 60])
        checkpoint.import_ranges(1, [block])
        refused = (DecodeFailed, StateRejected, ValueError)
        with pytest.raises(refused):
            take_snapshot(checkpoint, 1)
        with pytest.raises(refused):
            checkpoint.share(1, 2, 60)
        with pytest.raises(refused):
            checkpoint.import_snapshot(1, 59, snapshot)
        checkpoint.drop(1)
        checkpoint.import_ranges(1, [block])
        with pytest.raises(refused):
            feed(checkpoint, 1, [1])
        checkpoint.drop(1)
        checkpoint.import_ranges(1, [block])
        checkpoint.import_snapshot(1, 60, snapshot)
        assert not checkpoint.truncate(1, 59)
        assert self.same(feed(checkpoint, 1, [1]), feed(checkpoint, 0, [1]))

    def test_misuse_of_share_is_refused(self, span: Context) -> None:
        """Sharing what is not there, or with a sequence that has tokens, changes nothing."""
        feed(span, 0, TOKENS[:20])
        feed(span, 1, TOKENS[:5])
        before = states(span)
        for source, target, length in [
            (0, 1, 10),
            (0, 0, 10),
            (0, 2, 0),
            (0, 2, 21),
            (2, 2, 0),
            (2, 0, 1),
            (0, N_SEQ, 1),
            (-1, 2, 1),
        ]:
            with pytest.raises(ValueError, match="sequence"):
                span.share(source, target, length)
        assert states(span) == before

    def test_a_step_without_room_takes_nothing_away(self, span: Context, unified: bool) -> None:
        """When cells run out, every sequence of the step is what it was before and goes on."""
        feed(span, 0, TOKENS)
        feed(span, 1, OTHERS[:100])
        before = states(span)
        row = Row(1, 100, pack(OTHERS[:200]), logits=True)
        if unified:
            with pytest.raises(DecodeFailed):
                span.step([Row(0, 300, pack([1]), logits=True), row])
            assert states(span) == before
        else:
            span.step([Row(0, 300, pack([1]), logits=True), row])
            assert [span.length(seq) for seq in range(N_SEQ)] == [301, 300, 0]
        with pytest.raises(ValueError, match="no logits"):
            span.mark(2, None)

    def test_rows_may_be_in_any_order(self, span: Context) -> None:
        """Each row has its own sequence's logits, whatever the order of sequences in a step."""
        alone = []
        for seq in range(N_SEQ):
            alone.append(feed(span, seq, TOKENS[seq : seq + 20]))
            span.drop(seq)
        order = [2, 0, 1]
        span.step([Row(seq, 0, pack(TOKENS[seq : seq + 20]), logits=True) for seq in order])
        for number, seq in enumerate(order):
            assert self.same(logits(span, number), alone[seq])

    def test_abort_without_a_step_does_nothing(self, span: Context, whole: Context) -> None:
        """A step that begins after an abort is not aborted."""
        for context in (span, whole):
            context.abort()
            feed(context, 0, TOKENS[:10])
            context.abort()
            feed(context, 0, TOKENS[10:20])
            assert context.length(0) == 20

    def test_any_way_there(self, unified: bool) -> None:
        """However sequences come about, they compute what fresh ones do."""
        context = self.open(unified=unified, kv_class=KVClass.SPAN)
        reference = self.open(unified=unified, kv_class=KVClass.SPAN)
        rng = random.Random(3)
        held: list[list[int]] = [[] for _ in range(N_SEQ)]
        stored: list[tuple[list[int], int, memoryview]] = []
        for _ in range(60):
            seq, other = rng.sample(range(N_SEQ), 2)
            tokens = held[seq]
            match rng.choice(("feed", "feed", "cut", "share", "store", "load")):
                case "feed" if len(tokens) < 120:
                    text = rng.choice((TOKENS, OTHERS))
                    added = list(text[len(tokens) : len(tokens) + rng.randrange(1, 40)])
                    held[seq] = tokens + added
                    got = feed(context, seq, added)
                    reference.drop(0)
                    assert self.same(got, feed(reference, 0, held[seq]))
                case "cut":
                    keep = rng.randint(0, len(tokens))
                    assert context.truncate(seq, keep)
                    held[seq] = tokens[:keep]
                case "share" if tokens:
                    context.drop(other)
                    length = rng.randint(1, len(tokens))
                    assert context.share(seq, other, length)
                    held[other] = tokens[:length]
                case "store" if tokens:
                    start = rng.randrange(len(tokens))
                    (item,) = export(context, seq, [start, len(tokens)])
                    stored.append((tokens, start, item.data))
                case "load" if stored:
                    found, start, data = rng.choice(stored)
                    if tokens[:start] != found[:start]:
                        continue
                    assert context.truncate(seq, start)
                    stop = rng.randint(start + 1, len(found))
                    try:
                        context.import_ranges(seq, [RangeImport(start, len(found), stop, data)])
                        held[seq] = found[:stop]
                    except StateRejected:
                        assert unified
                        context.drop(seq)
                        held[seq] = []
            assert [context.length(n) for n in range(N_SEQ)] == list(map(len, held))
        context.close()
        reference.close()

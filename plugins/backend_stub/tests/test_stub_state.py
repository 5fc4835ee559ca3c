"""Equal contexts give equal output however they were reached; wrong state shows."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from erllama_backend_stub import StubContext, StubOptions, open_model
from erllama_core.errors import DecodeFailed, StateRejected
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    Mark,
    RangeExport,
    RangeImport,
    Row,
)

N_VOCAB = 265
PROBE = 65

tokens_of = st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=40)
kv_classes = st.sampled_from(["span", "checkpoint", "whole"])


def pack(tokens: Iterable[int]) -> bytes:
    tokens = list(tokens)
    return struct.pack(f"<{len(tokens)}I", *tokens)


def open_context(
    kv_class: str = "span",
    *,
    n_ctx: int = 128,
    n_seq_max: int = 4,
    kv_unified: bool = True,
    **options: Any,
) -> StubContext:
    return open_model(
        BackendRequest(
            model_path=None,
            options=StubOptions(kv_class=kv_class, **options),  # type: ignore[arg-type]
            context=ContextOptions(n_ctx=n_ctx, n_seq_max=n_seq_max, kv_unified=kv_unified),
        )
    ).open_context()


def feed(context: StubContext, seq: int, start: int, tokens: Sequence[int]) -> Mark:
    """All logits after some more tokens."""
    context.step([Row(seq, start, pack(tokens), logits=True)])
    return context.mark(0, None)


def cold(tokens: Sequence[int], kv_class: str = "span", **options: Any) -> Mark:
    """All logits after tokens that were computed in one step in a new context."""
    return feed(open_context(kv_class, **options), 0, 0, tokens)


def export(context: StubContext, seq: int, start: int, end: int) -> bytearray:
    data = bytearray(context.range_bytes(seq, start, end))
    context.export_ranges(seq, [RangeExport(start, end, memoryview(data))])
    return data


def snapshot(context: StubContext, seq: int) -> bytearray:
    data = bytearray(context.snapshot_bytes(seq))
    context.export_snapshot(seq, memoryview(data))
    return data


@attrs.frozen
class Stored:
    """What a cache would have of a context: blocks, and where needed a snapshot."""

    kv_class: str
    cuts: list[int]
    blocks: list[bytearray]
    snapshot: bytearray | None

    @property
    def length(self) -> int:
        return self.cuts[-1]

    def restore(self, context: StubContext, seq: int) -> None:
        starts = [0, *self.cuts]
        ranges = [
            RangeImport(start, end, end, memoryview(block))
            for start, end, block in zip(starts, self.cuts, self.blocks, strict=False)
        ]
        if ranges:
            context.import_ranges(seq, ranges)
        if self.snapshot is not None:
            context.import_snapshot(seq, self.length, memoryview(self.snapshot))


def store(kv_class: str, tokens: Sequence[int], cuts: Iterable[int] = ()) -> Stored:
    """Compute tokens and store their state, in blocks cut at ``cuts`` where there are any."""
    context = open_context(kv_class)
    feed(context, 0, 0, tokens)
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]
    blocks = []
    if kv_class != "whole":
        starts = [0, *ends]
        blocks = [export(context, 0, a, b) for a, b in zip(starts, ends, strict=False)]
    return Stored(kv_class, ends, blocks, None if kv_class == "span" else snapshot(context, 0))


# ------------------------------------------------------------ equal contexts


@given(
    kv_class=kv_classes,
    unified=st.booleans(),
    seq=st.integers(0, 3),
    tokens=tokens_of,
    neighbours=st.lists(tokens_of, max_size=2),
    chunk=st.integers(1, 20),
)
def test_output_is_independent_of_chunks_neighbours_sequence_and_buffers(
    kv_class: str,
    unified: bool,
    seq: int,
    tokens: list[int],
    neighbours: list[list[int]],
    chunk: int,
) -> None:
    """Neither how rows are cut, nor what is computed beside them, nor where, changes logits."""
    context = open_context(kv_class, kv_unified=unified)
    others = [other for other in range(4) if other != seq]
    fed = dict.fromkeys(others, 0)
    mark = None
    for start in range(0, len(tokens), chunk):
        rows = []
        for other, theirs in zip(others, neighbours, strict=False):
            part = theirs[fed[other] : fed[other] + 3]
            if part:
                rows.append(Row(other, fed[other], pack(part), logits=False))
                fed[other] += len(part)
        rows.append(Row(seq, start, pack(tokens[start : start + chunk]), logits=True))
        context.step(rows)
        mark = context.mark(len(rows) - 1, None)
    assert mark == cold(tokens, kv_class)


@given(tokens=tokens_of, other=tokens_of)
def test_different_tokens_give_different_logits(tokens: list[int], other: list[int]) -> None:
    """Logits identify the context: no two contexts share them."""
    assume(tokens != other)
    assert cold(tokens) != cold(other)


@given(
    kv_class=kv_classes,
    tokens=tokens_of,
    cuts=st.lists(st.integers(1, 39), max_size=4),
    seq=st.integers(0, 3),
    before=tokens_of,
)
def test_restored_state_continues_like_computed_state(
    kv_class: str, tokens: list[int], cuts: list[int], seq: int, before: list[int]
) -> None:
    """Export and import, whatever the blocks and wherever the cells, is invisible."""
    stored = store(kv_class, tokens, cuts)
    context = open_context(kv_class)
    # Leave stale cells behind, and take some, so that cells are not where they were.
    feed(context, seq, 0, before)
    feed(context, (seq + 1) % 4, 0, before)
    context.drop(seq)
    stored.restore(context, seq)
    assert feed(context, seq, stored.length, [PROBE]) == cold([*tokens, PROBE], kv_class)


@given(
    shared=st.lists(st.integers(0, N_VOCAB - 1), max_size=20),
    first=tokens_of,
    second=tokens_of,
    data=st.data(),
)
def test_a_block_cut_short_continues_with_a_block_of_another_context(
    shared: list[int], first: list[int], second: list[int], data: st.DataObject
) -> None:
    """Where two contexts part in the middle of a block, each one's cells serve the other."""
    source = open_context()
    feed(source, 0, 0, [*shared, *first])
    feed(source, 1, 0, [*shared, *second])
    leave = data.draw(st.integers(0, len(shared)))
    end = data.draw(st.integers(max(leave, 1), len(shared) + len(first)))
    whole = len(shared) + len(second)
    ranges = [RangeImport(leave, whole, whole, memoryview(export(source, 1, leave, whole)))]
    if leave:
        ranges.insert(0, RangeImport(0, end, leave, memoryview(export(source, 0, 0, end))))
    target = open_context()
    target.import_ranges(2, ranges)
    assert feed(target, 2, whole, [PROBE]) == cold([*shared, *second, PROBE])


@given(tokens=tokens_of, rest=tokens_of, data=st.data())
def test_truncated_sequences_continue_like_new_ones(
    tokens: list[int], rest: list[int], data: st.DataObject
) -> None:
    """What was cut off a span sequence leaves no trace."""
    keep = data.draw(st.integers(0, len(tokens)))
    context = open_context()
    feed(context, 0, 0, tokens)
    assert context.truncate(0, keep)
    assert feed(context, 0, keep, rest) == cold([*tokens[:keep], *rest])


@pytest.mark.parametrize("kv_class", ["checkpoint", "whole"])
def test_only_span_sequences_can_be_cut(kv_class: str) -> None:
    """The other classes keep all or nothing, and a refused cut changes nothing."""
    context = open_context(kv_class)
    feed(context, 0, 0, [1, 2, 3])
    assert not context.truncate(0, 2)
    assert context.truncate(0, 3)
    assert feed(context, 0, 3, [PROBE]) == cold([1, 2, 3, PROBE], kv_class)
    assert context.truncate(0, 0)
    assert feed(context, 0, 0, [PROBE]) == cold([PROBE], kv_class)


def test_no_sequence_can_be_cut_to_more_than_it_has() -> None:
    """A length beyond the end is refused, and nothing changes."""
    context = open_context()
    feed(context, 0, 0, [1, 2])
    assert not context.truncate(0, 3)
    assert feed(context, 0, 2, [PROBE]) == cold([1, 2, PROBE])


def test_weights_and_types_change_all_state() -> None:
    """Models with other weights or KV types compute other logits from equal tokens."""
    assert cold([1, 2, 3]) != cold([1, 2, 3], weights="other")
    model = open_model(
        BackendRequest(
            model_path=None, options=StubOptions(), context=ContextOptions(type_k="q8_0")
        )
    )
    assert cold([1, 2, 3]) != feed(model.open_context(), 0, 0, [1, 2, 3])


@pytest.mark.parametrize("cell_bytes", [16, 24, 256])
def test_cells_have_the_size_that_was_asked_for(cell_bytes: int) -> None:
    """A range is its cells and a head of constant size."""
    context = open_context(cell_bytes=cell_bytes)
    feed(context, 0, 0, [1, 2, 3])
    assert context.range_bytes(0, 0, 3) - context.range_bytes(0, 0, 1) == 2 * cell_bytes


# --------------------------------------------------------------- wrong state


def outcome(stored: Stored) -> Mark | None:
    """The logits after restoring something, or None where it was refused."""
    context = open_context(stored.kv_class)
    try:
        stored.restore(context, 0)
        return feed(context, 0, stored.length, [PROBE])
    except (StateRejected, DecodeFailed):
        return None


@given(kv_class=kv_classes, tokens=tokens_of, change=st.integers(1, 255), data=st.data())
def test_every_stored_byte_matters(
    kv_class: str, tokens: list[int], change: int, data: st.DataObject
) -> None:
    """Changing any one byte of any stored object is refused or changes the output."""
    stored = store(kv_class, tokens, [len(tokens) // 2])
    objects = [*stored.blocks, *([stored.snapshot] if stored.snapshot else [])]
    victim = data.draw(st.sampled_from(objects))
    victim[data.draw(st.integers(0, len(victim) - 1))] ^= change
    assert outcome(stored) != cold([*tokens, PROBE], kv_class)


@given(kv_class=kv_classes, tokens=tokens_of, data=st.data())
def test_every_stored_length_is_checked(
    kv_class: str, tokens: list[int], data: st.DataObject
) -> None:
    """An object with bytes missing or added is refused."""
    stored = store(kv_class, tokens)
    victim = data.draw(
        st.sampled_from([*stored.blocks, *([stored.snapshot] if stored.snapshot else [])])
    )
    if data.draw(st.booleans()):
        del victim[data.draw(st.integers(0, len(victim) - 1)) :]
    else:
        victim += bytes(data.draw(st.integers(1, 64)))
    assert outcome(stored) is None


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7]])
def test_swapped_blocks_change_the_output(kv_class: str, tokens: list[int]) -> None:
    """Two blocks of equal size in each other's place show, even if their tokens are equal."""
    stored = store(kv_class, tokens, [3])
    stored.blocks.reverse()
    found = outcome(stored)
    assert found is not None
    assert found != cold([*tokens, PROBE], kv_class)


@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
@pytest.mark.parametrize("position", [0, 2, 5])
def test_state_of_other_tokens_changes_the_output(kv_class: str, position: int) -> None:
    """State that was stored for a context with one other token shows."""
    tokens = [1, 2, 3, 4, 5, 6]
    stale = [*tokens]
    stale[position] = 9
    found = outcome(store(kv_class, stale, [3]))
    assert found is not None
    assert found != cold([*tokens, PROBE], kv_class)


def test_a_snapshot_and_ranges_both_matter() -> None:
    """A checkpoint sequence shows a snapshot of other tokens, and ranges of other tokens."""
    right, wrong = store("checkpoint", [1, 2, 3]), store("checkpoint", [1, 9, 3])
    expected = cold([1, 2, 3, PROBE], "checkpoint")
    assert outcome(right) == expected
    assert outcome(attrs.evolve(right, snapshot=wrong.snapshot)) != expected
    assert outcome(attrs.evolve(right, blocks=wrong.blocks)) != expected


def test_state_of_other_weights_changes_the_output() -> None:
    """State is accepted from any model of the same layout, and shows when it is another's."""
    source = open_context(weights="other")
    feed(source, 0, 0, [1, 2, 3])
    target = open_context()
    target.import_ranges(0, [RangeImport(0, 3, 3, memoryview(export(source, 0, 0, 3)))])
    assert feed(target, 0, 3, [PROBE]) != cold([1, 2, 3, PROBE])


# ------------------------------------------------------------- any way there


class AnyWay(RuleBasedStateMachine):
    """Sequences in a small context, against plain lists of the tokens they should hold."""

    N_SEQ = 3
    N_CTX = 24
    PLACES = st.integers(0, N_SEQ - 1)

    def __init__(self) -> None:
        super().__init__()
        self.held: list[list[int]] = [[] for _ in range(self.N_SEQ)]
        self.blocks: list[tuple[list[int], int, bytearray]] = []

    @initialize(unified=st.booleans())
    def begin(self, unified: bool) -> None:
        self.context = open_context(n_ctx=self.N_CTX, n_seq_max=self.N_SEQ, kv_unified=unified)
        self.unified = unified

    def room(self, seq: int) -> int:
        used = self.held if self.unified else [self.held[seq]]
        return self.N_CTX - sum(map(len, used))

    @rule(seq=PLACES, tokens=st.lists(st.integers(60, 63), min_size=1, max_size=8))
    def compute(self, seq: int, tokens: list[int]) -> None:
        fits = len(tokens) <= self.room(seq)
        if fits:
            self.held[seq] += tokens
            mark = feed(self.context, seq, len(self.held[seq]) - len(tokens), tokens)
            assert mark == cold(self.held[seq])
        else:
            with pytest.raises(DecodeFailed):
                feed(self.context, seq, len(self.held[seq]), tokens)
            self.drop(seq)

    @rule(seq=PLACES, data=st.data())
    def cut(self, seq: int, data: st.DataObject) -> None:
        keep = data.draw(st.integers(0, len(self.held[seq])))
        assert self.context.truncate(seq, keep)
        del self.held[seq][keep:]

    @rule(seq=PLACES)
    def drop(self, seq: int) -> None:
        self.context.drop(seq)
        self.held[seq] = []

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from([s for s in range(self.N_SEQ) if self.held[s]]))
        tokens = list(self.held[seq])
        start = data.draw(st.integers(0, len(tokens) - 1))
        end = data.draw(st.integers(start + 1, len(tokens)))
        self.blocks.append((tokens[:end], start, export(self.context, seq, start, end)))

    @precondition(lambda self: self.blocks)
    @rule(seq=PLACES, data=st.data())
    def load(self, seq: int, data: st.DataObject) -> None:
        tokens, start, block = data.draw(st.sampled_from(self.blocks))
        if len(self.held[seq]) < start or self.held[seq][:start] != tokens[:start]:
            return
        stop = data.draw(st.integers(start + 1, len(tokens)))
        assert self.context.truncate(seq, start)
        del self.held[seq][start:]
        item = RangeImport(start, len(tokens), stop, memoryview(block))
        if stop - start <= self.room(seq):
            self.context.import_ranges(seq, [item])
            self.held[seq] = tokens[:stop]
        else:
            with pytest.raises(StateRejected):
                self.context.import_ranges(seq, [item])
            self.drop(seq)

    @invariant()
    def stored_bytes_are_those_of_a_cold_run(self) -> None:
        for seq, tokens in enumerate(self.held):
            if tokens:
                fresh = open_context()
                feed(fresh, 0, 0, tokens)
                mine = export(self.context, seq, 0, len(tokens))
                assert mine == export(fresh, 0, 0, len(tokens))


TestAnyWay = AnyWay.TestCase
TestAnyWay.settings = settings(max_examples=40, stateful_step_count=25)

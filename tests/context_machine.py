"""Whatever is done to the sequences of a context, each computes what a fresh one does.

A state machine for any backend and KV class. It remembers in which steps the tokens of every
sequence, and of everything that was stored, were computed; a reference context that holds
nothing else computes the same tokens in the same steps, and the logits of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from context_contract import Logits, logits, pack
from erllama_core.errors import DecodeFailed, StateRejected
from erllama_core.interfaces.backend import Context, KVClass, RangeExport, RangeImport, Row

N_SEQ = 3
N_CTX = 512
_LONGEST = 150
_ALPHABET = 250


@attrs.frozen
class Way:
    """A context, and the steps in which it was computed."""

    tokens: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    in_company: bool = False
    """A step had rows of other sequences too, which rounds differently."""

    def then(self, tokens: Sequence[int], *, in_company: bool = False) -> Way:
        longer = (*self.tokens, *tokens)
        return Way(longer, (*self.ends, len(longer)), self.in_company or in_company)

    def until(self, length: int) -> Way:
        """Up to the end of one of the steps."""
        ends = self.ends[: self.ends.index(length) + 1]
        return Way(self.tokens[:length], ends, self.in_company)

    def goes_on_from(self, other: Way) -> bool:
        count = len(other.ends)
        return self.ends[:count] == other.ends and self.tokens[: len(other.tokens)] == other.tokens


@attrs.frozen
class Stored:
    """What was exported of a context."""

    way: Way
    blocks: tuple[RangeImport, ...]
    snapshot: bytes | None


@attrs.frozen(kw_only=True)
class Setup:
    """What a machine runs on."""

    open: Callable[[], Context]
    """A context of N_SEQ sequences with N_CTX cells or more; the machine closes it."""
    rounding: float = 0.0
    """How far logits may be apart; those of other tokens are off by 0.1 and more."""
    rounding_in_company: float = 0.06
    """The same where several sequences were computed in one step."""
    failing: Callable[[], AbstractContextManager[Any]] | None = None
    """A step within it is aborted when a part of it has been computed."""
    poison: Callable[[bytes], bytes] | None = None
    """A snapshot with something in it that is not a number."""
    contains_poison: bool = True
    """Whether other sequences are unharmed by it."""


def run_machine(setup: Setup, *, examples: int, steps: int) -> None:
    """Run a machine over so many contexts, with so many steps each."""

    class Machine(ContextMachine):
        pass

    Machine.setup_ = setup
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True
        ),
    )


SEQS = st.integers(0, N_SEQ - 1)
SIZES = st.one_of(st.integers(1, 3), st.integers(4, 40))


class ContextMachine(RuleBasedStateMachine):
    setup_: Setup
    stored = Bundle("stored")

    @initialize()
    def begin(self) -> None:
        self.context = self.setup_.open()
        self.reference = self.setup_.open()
        self.ways = [Way() for _ in range(N_SEQ)]
        self.known: list[Way] = [Way() for _ in range(N_SEQ)]
        """What the reference's sequences hold."""
        self.taken: list[list[tuple[int, bytes]]] = [[] for _ in range(N_SEQ)]
        """By sequence: positions at which a snapshot was taken, of which no ranges are stored."""

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.close()
            self.reference.close()

    @property
    def kv_class(self) -> KVClass:
        return self.context.kv_class

    # ------------------------------------------------------------- helpers

    def tokens(self, branch: int, start: int, count: int) -> list[int]:
        """Tokens of one of a few texts, so that contexts begin alike and then differ."""
        return [
            (7 * at + at // 13 + branch * (at // 50)) % _ALPHABET
            for at in range(start, start + count)
        ]

    def expected(self, way: Way) -> Logits:
        """Those after a context that was computed in these steps and no others."""
        seq = max(
            range(N_SEQ),
            key=lambda n: len(self.known[n].ends) if way.goes_on_from(self.known[n]) else -1,
        )
        before = self.known[seq]
        if not way.goes_on_from(before) or before.ends == way.ends:
            before = Way()
            self.reference.drop(seq)
        for start, end in pairwise((len(before.tokens), *way.ends[len(before.ends) :])):
            tokens = pack(way.tokens[start:end])
            self.reference.step([Row(seq, start, tokens, logits=True)])
        self.known[seq] = way
        return logits(self.reference, 0)

    def check(self, got: Logits, way: Way) -> None:
        off = float(np.abs(got - self.expected(way)).max())
        setup = self.setup_
        bound = setup.rounding_in_company if way.in_company else setup.rounding
        assert off <= bound, f"off by {off} after {way.ends}"

    def one_with_tokens(self, seq: int) -> int:
        """A sequence that has any, if there is one."""
        found: int = max((seq, *range(N_SEQ)), key=lambda n: bool(self.ways[n].tokens))
        return found

    def forget(self, seq: int) -> None:
        self.ways[seq] = Way()
        self.taken[seq] = []

    def room(self, seq: int, count: int) -> bool:
        used = sum(len(way.tokens) for way in self.ways)
        return (
            len(self.ways[seq].tokens) + count <= _LONGEST and used + count <= self.context.n_cells
        )

    def snapshot(self, seq: int) -> bytes | None:
        if self.kv_class is KVClass.SPAN:
            return None
        data = bytearray(self.context.snapshot_bytes(seq))
        self.context.export_snapshot(seq, memoryview(data))
        return bytes(data)

    def blocks(self, seq: int, length: int, cuts: Sequence[int]) -> tuple[RangeImport, ...]:
        if self.kv_class is KVClass.WHOLE:
            return ()
        at = sorted({0, length, *(cut % length for cut in cuts)})
        longest = self.context.max_block_tokens
        if longest is not None:
            at = sorted({*at, *range(0, length, longest)})
        ranges = [
            RangeExport(a, b, memoryview(bytearray(self.context.range_bytes(seq, a, b))))
            for a, b in pairwise(at)
        ]
        self.context.export_ranges(seq, ranges)
        return tuple(RangeImport(r.start, r.end, r.end, r.into.toreadonly()) for r in ranges)

    def load(self, seq: int, item: Stored, stop: int | None = None) -> None:
        length = len(item.way.tokens) if stop is None else stop
        used = [
            RangeImport(b.start, b.end, min(b.end, length), b.data)
            for b in item.blocks
            if b.start < length
        ]
        if used:
            self.context.import_ranges(seq, used)
        if item.snapshot is not None:
            self.context.import_snapshot(seq, length, memoryview(item.snapshot))

    # --------------------------------------------------------------- rules

    @rule(seq=SEQS, branch=st.integers(0, 2), count=SIZES)
    def feed(self, seq: int, branch: int, count: int) -> None:
        if self.room(seq, count):
            way = self.ways[seq]
            tokens = self.tokens(branch, len(way.tokens), count)
            self.context.step([Row(seq, len(way.tokens), pack(tokens), logits=True)])
            self.ways[seq] = way.then(tokens)
            self.check(logits(self.context, 0), self.ways[seq])

    @rule(branch=st.integers(0, 2), count=SIZES)
    def feed_all(self, branch: int, count: int) -> None:
        """A row of each sequence that has tokens, in one step."""
        rows, ways = [], {}
        total = 0
        for seq, way in enumerate(self.ways):
            fits = total + count <= self.context.n_batch and self.room(seq, total + count)
            if way.tokens and fits:
                tokens = self.tokens(branch, len(way.tokens), count)
                rows.append(Row(seq, len(way.tokens), pack(tokens), logits=True))
                ways[seq] = way.then(tokens, in_company=True)
                total += count
        if rows:
            self.context.step(rows)
            for number, (seq, way) in enumerate(ways.items()):
                self.ways[seq] = way
                self.check(logits(self.context, number), way)

    @rule(seq=SEQS)
    def take_snapshot(self, seq: int) -> None:
        """While the sequence stands there; ranges may come later."""
        seq = self.one_with_tokens(seq)
        data = self.snapshot(seq) if self.ways[seq].tokens else None
        if data is not None:
            self.taken[seq].append((len(self.ways[seq].tokens), data))

    @rule(seq=SEQS, cuts=st.lists(st.integers(1, _LONGEST), max_size=3), target=stored)
    def store(self, seq: int, cuts: list[int]) -> Stored:
        """All of a sequence."""
        seq = self.one_with_tokens(seq)
        way = self.ways[seq]
        if not way.tokens:
            return Stored(way, (), None)
        blocks = self.blocks(seq, len(way.tokens), cuts)
        return Stored(way, blocks, self.snapshot(seq))

    @rule(seq=SEQS, cuts=st.lists(st.integers(1, _LONGEST), max_size=3), target=stored)
    def store_late(self, seq: int, cuts: list[int]) -> Stored:
        """The ranges of a sequence that has gone on since a snapshot was taken."""
        seq = next((n for n in range(N_SEQ) if self.taken[n]), seq)
        if not self.taken[seq]:
            return Stored(Way(), (), None)
        length, data = self.taken[seq].pop()
        blocks = self.blocks(seq, len(self.ways[seq].tokens), cuts)
        return Stored(self.ways[seq].until(length), blocks, data)

    @rule(seq=SEQS, item=stored, branch=st.integers(0, 2), count=st.integers(0, 3))
    def restore(self, seq: int, item: Stored, branch: int, count: int) -> None:
        """And go on at once: what follows covers up what was wrong with a state before it."""
        self.context.drop(seq)
        self.forget(seq)
        if item.way.tokens and self.room(seq, _LONGEST):
            self.load(seq, item)
            self.ways[seq] = item.way
            if count:
                self.feed(seq, branch, count)

    @rule(seq=SEQS, item=consumes(stored), how=st.sampled_from(["short", "long", "zeros"]))
    def refuse(self, seq: int, item: Stored, how: str) -> None:
        """Bytes that are no state are refused, and leave nothing behind."""
        if not item.way.tokens or not self.room(seq, _LONGEST):
            return

        def damaged(data: Any) -> memoryview:
            data = bytes(data)
            bad = {"short": data[:-1], "long": data + b"\0", "zeros": bytes(len(data))}[how]
            return memoryview(bad)

        blocks = item.blocks
        snapshot = item.snapshot
        if snapshot is not None:
            snapshot = bytes(damaged(snapshot))
        else:
            last = blocks[-1]
            blocks = (
                *blocks[:-1],
                RangeImport(last.start, last.end, last.stop, damaged(last.data)),
            )
        self.context.drop(seq)
        self.forget(seq)
        try:
            self.load(seq, Stored(item.way, blocks, snapshot))
        except StateRejected:
            self.context.drop(seq)
        else:
            raise AssertionError("accepted")

    @rule(source=SEQS, taker=SEQS)
    def share(self, source: int, taker: int) -> None:
        length = len(self.ways[source].tokens)
        if source != taker and length:
            self.context.drop(taker)
            self.forget(taker)
            if self.room(taker, length):
                assert self.context.share(source, taker, length)
                self.ways[taker] = self.ways[source]

    @rule(seq=SEQS)
    def drop(self, seq: int) -> None:
        self.context.drop(seq)
        self.forget(seq)

    @rule(seq=SEQS, branch=st.integers(0, 2), count=st.integers(8, 40))
    def abort(self, seq: int, branch: int, count: int) -> None:
        """A step that is aborted leaves the sequence as it was, or empty."""
        failing = self.setup_.failing
        if failing is None or not self.room(seq, count):
            return
        length = len(self.ways[seq].tokens)
        tokens = self.tokens(branch, length, count)
        with failing():
            try:
                self.context.step([Row(seq, length, pack(tokens), logits=True)])
            except DecodeFailed:
                pass
            else:
                raise AssertionError("it was not aborted")
        left = self.context.length(seq)
        assert left in {0, length}
        if left != length:
            self.forget(seq)

    @rule(seq=SEQS, item=stored)
    def poison(self, seq: int, item: Stored) -> None:
        """State that is no numbers is found by the first step, and is gone after it."""
        poison = self.setup_.poison
        if poison is None or item.snapshot is None or not self.room(seq, _LONGEST):
            return
        if not self.setup_.contains_poison:
            for other in range(N_SEQ):
                self.drop(other)
        self.context.drop(seq)
        self.forget(seq)
        bad = attrs.evolve(item, snapshot=poison(item.snapshot))
        self.load(seq, bad)
        try:
            self.context.step([Row(seq, len(item.way.tokens), pack([1]), logits=False)])
        except DecodeFailed:
            assert self.context.length(seq) == 0
        else:
            raise AssertionError("NaN was not noticed")

    @rule()
    def restart(self) -> None:
        """Another context; what was stored is all that is left."""
        self.context.close()
        self.context = self.setup_.open()
        for seq in range(N_SEQ):
            self.forget(seq)

    @invariant()
    def lengths_are_known(self) -> None:
        if hasattr(self, "context"):
            lengths = [self.context.length(seq) for seq in range(N_SEQ)]
            assert lengths == [len(way.tokens) for way in self.ways]

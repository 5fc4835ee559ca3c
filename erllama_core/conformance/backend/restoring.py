"""What stored state promises, whatever its KV class stores: tests of the kit."""

from __future__ import annotations

import random

import attrs
import pytest

from erllama_core.conformance.backend.driving import REFUSED, State, apart, decode, feed
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.errors import StateRejected
from erllama_core.interfaces.backend import Context


class RestoringPromises(BackendKit):
    """What stored state promises, whatever its KV class stores."""

    def test_what_is_restored_goes_on_the_same(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """State that was exported, in another sequence of another context, computes the same.

        If this fails: every cache hit is a wrong answer.
        """
        for length in (1, 2, 100, 257, 300):
            feed(context, 0, subject.tokens[:length])
            state = State.of(context, 0)
            expected = decode(context, 0, subject.tokens[-5:])
            state.restore(fresh, 1)
            assert fresh.length(1) == length
            got = decode(fresh, 1, subject.tokens[-5:])
            allowed = 0.0 if subject.restores_exactly else subject.rounding
            assert max(map(apart, got, expected)) <= allowed, f"{length} tokens"
            context.drop(0)
            fresh.drop(1)

    def test_exporting_changes_nothing(self, subject: BackendSubject, context: Context) -> None:
        """A sequence is exported twice with the same bytes, and goes on as if it had not been.

        If this fails: saving changes the reply that is being written.
        """
        feed(context, 0, subject.tokens[:50])
        first, second = State.of(context, 0), State.of(context, 0)
        assert [bytes(b.data) for b in first.blocks] == [bytes(b.data) for b in second.blocks]
        rows = decode(context, 0, subject.tokens[50:53])
        context.drop(0)
        first.restore(context, 0)
        assert max(map(apart, decode(context, 0, subject.tokens[50:53]), rows)) <= subject.rounding

    def test_restoring_disturbs_no_neighbour(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """While state comes in and goes, another sequence computes what it would alone.

        If this fails: a cache hit of one user changes the reply of another.
        """
        feed(context, 0, subject.tokens[:60])
        state = State.of(context, 0)
        context.drop(0)
        alone = [feed(fresh, 0, subject.tokens[100:140])]
        alone += decode(fresh, 0, subject.tokens[140:146])
        got = [feed(context, 1, subject.tokens[100:140])]
        for token in subject.tokens[140:146]:
            state.restore(context, 2)
            got += decode(context, 1, [token])
            context.drop(2)
        assert max(map(apart, got, alone)) <= subject.rounding

    def test_damaged_state_spoils_nothing_else(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """State that is too short is StateRejected; after a drop the sequence is as new.

        If this fails: a truncated object crashes the process, or is taken for a whole one.
        """
        feed(context, 0, subject.tokens[:60])
        state = State.of(context, 0)
        feed(context, 1, subject.tokens[100:130])
        for lost in (1, 2, 17, 200):
            with pytest.raises(REFUSED):
                _shortened(state, lost).restore(context, 2)
            context.drop(2)
            assert [context.length(seq) for seq in range(3)] == [60, 30, 0]
        state.restore(context, 2)
        row = feed(context, 2, [subject.tokens[60]])
        feed(fresh, 0, subject.tokens[:60])
        assert apart(row, feed(fresh, 0, [subject.tokens[60]])) <= subject.rounding

    def test_any_way_there(self, subject: BackendSubject, context: Context, fresh: Context) -> None:
        """However sequences come about, they compute what fresh ones do.

        If this fails: some sequence of steps, cuts, shares, exports and imports leaves a trace.
        """
        rng = random.Random(3)
        held: list[list[int]] = [[] for _ in range(context.n_seq_max)]
        stored: list[tuple[list[int], State]] = []
        for _ in range(50):
            seq, other = rng.sample(range(context.n_seq_max), 2)
            tokens = held[seq]
            match rng.choice(("feed", "feed", "cut", "share", "store", "load", "drop")):
                case "feed" if len(tokens) < 120:
                    at = rng.choice((0, 150))
                    added = list(subject.tokens[at : at + rng.randrange(1, 40)])
                    held[seq] = tokens + added
                    fresh.drop(0)
                    got, expected = feed(context, seq, added), feed(fresh, 0, held[seq])
                    assert apart(got, expected) <= subject.rounding
                case "cut":
                    keep = rng.randint(0, len(tokens))
                    if context.truncate(seq, keep):
                        held[seq] = tokens[:keep]
                case "share" if tokens:
                    context.drop(other)
                    length = rng.choice((len(tokens), rng.randint(1, len(tokens))))
                    held[other] = tokens[:length] if context.share(seq, other, length) else []
                case "store" if tokens:
                    stored.append((tokens, State.of(context, seq)))
                case "load" if stored:
                    context.drop(seq)
                    tokens, state = rng.choice(stored)
                    try:
                        state.restore(context, seq)
                        held[seq] = list(tokens)
                    except StateRejected:  # too few cells
                        context.drop(seq)
                        held[seq] = []
                case "drop":
                    context.drop(seq)
                    held[seq] = []
            assert [context.length(n) for n in range(context.n_seq_max)] == list(map(len, held))


def _shortened(state: State, lost: int) -> State:
    """A state whose last part lacks so many bytes at its end."""
    if state.snapshot is not None:
        keep = max(0, len(state.snapshot) - lost)
        return attrs.evolve(state, snapshot=state.snapshot[:keep])
    *others, last = state.blocks
    shorter = last.data[: max(0, len(last.data) - lost)]
    return attrs.evolve(state, blocks=(*others, attrs.evolve(last, data=shorter)))

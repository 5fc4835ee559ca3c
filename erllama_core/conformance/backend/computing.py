"""What the steps of a context promise: tests of the kit."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from erllama_core.conformance.backend.driving import (
    REFUSED,
    State,
    apart,
    decode,
    feed,
    pack,
    row_of,
)
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.errors import DecodeFailed
from erllama_core.interfaces.backend import BackendModel, Context, ContextOptions, Row


class ComputingPromises(BackendKit):
    """What the steps of a context promise."""

    def test_a_new_context_is_as_it_was_asked_for(
        self, context: Context, options: ContextOptions
    ) -> None:
        """Empty, with the sequences and cells that its options say.

        If this fails: the scheduler admits requests that do not fit, or too few.
        """
        assert context.n_seq_max == options.n_seq_max
        assert 0 < context.n_ctx <= options.n_ctx
        assert context.n_cells == context.n_ctx * (1 if options.kv_unified else options.n_seq_max)
        assert context.n_batch >= 1
        assert context.max_block_tokens is None or context.max_block_tokens >= 1
        assert [context.length(seq) for seq in range(context.n_seq_max)] == [0] * context.n_seq_max

    def test_slices_do_not_matter(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A prompt computed in one step, in parts, or token by token has the same logits.

        If this fails: a long prompt is answered otherwise when others are being served.
        """
        tokens = subject.tokens[:60]
        expected = feed(fresh, 0, tokens)
        for cuts in ((0, 60), (0, 1, 60), (0, 17, 18, 40, 60), range(61)):
            for a, b in itertools.pairwise(cuts):
                row = feed(context, 0, tokens[a:b])
            assert apart(row, expected) <= subject.rounding
            context.drop(0)

    def test_neighbours_do_not_matter(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence computes the same beside others, in one step with them or not.

        If this fails: sequences read each other's cells: one user's prompt changes another
        user's reply.
        """
        tokens, others = subject.tokens[:40], subject.tokens[100:160]
        alone = [feed(fresh, 0, tokens[:30]), *decode(fresh, 0, tokens[30:])]
        feed(context, 2, others)
        rows = [Row(1, 0, pack(others[:25]), logits=False), Row(0, 0, pack(tokens[:30]), True)]
        context.step(rows)
        together = [row_of(context.mark(1, None))]
        for step, token in enumerate(tokens[30:]):
            context.step(
                [
                    Row(2, 60 + step, pack([others[step]]), logits=True),
                    Row(0, 30 + step, pack([token]), logits=True),
                ]
            )
            together.append(row_of(context.mark(1, None)))
        assert all(apart(a, b) <= subject.rounding for a, b in zip(alone, together, strict=True))
        assert [context.length(seq) for seq in range(3)] == [40, 25, 70]

    def test_order_of_rows_does_not_matter(self, subject: BackendSubject, context: Context) -> None:
        """Each row has its own sequence's logits, whatever the order of sequences in a step.

        If this fails: two requests get each other's tokens.
        """
        alone = []
        for seq in range(3):
            alone.append(feed(context, seq, subject.tokens[seq * 30 : seq * 30 + 20]))
            context.drop(seq)
        order = [2, 0, 1]
        context.step(
            [Row(s, 0, pack(subject.tokens[s * 30 : s * 30 + 20]), logits=True) for s in order]
        )
        for number, seq in enumerate(order):
            assert apart(row_of(context.mark(number, None)), alone[seq]) <= subject.rounding
        assert apart(alone[0], alone[1]) > subject.rounding, "the prompts differ"

    def test_dropping_leaves_nothing(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence that was dropped is like a new one, and can be dropped again.

        If this fails: the next request on the sequence continues somebody else's context.
        """
        context.drop(0)
        feed(context, 0, subject.tokens[100:200])
        context.drop(0)
        assert context.length(0) == 0
        row = feed(context, 0, subject.tokens[:30])
        assert apart(row, feed(fresh, 0, subject.tokens[:30])) <= subject.rounding

    def test_logits_are_those_that_were_asked_for(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """A row without logits, and one that is not there, cannot be sampled.

        If this fails: a token is drawn from another request's logits.
        """
        rows = [Row(0, 0, pack(subject.tokens[:9]), False), Row(1, 0, pack([5, 6]), True)]
        context.step(rows)
        for number in (0, 2, -1):
            with pytest.raises(REFUSED):
                context.mark(number, None)
        context.mark(1, None)

    def test_steps_that_make_no_sense_change_nothing(
        self, subject: BackendSubject, context: Context, model: BackendModel
    ) -> None:
        """Unknown tokens, sequences and positions are refused, and what was computed stays.

        If this fails: the native library is handed what makes it abort, or goes on from a hole.
        """
        tokens = subject.tokens[:10]
        feed(context, 0, tokens)
        n_tokens = model.vocabulary.n_tokens
        for rows in (
            [Row(0, 11, pack([1]), True)],
            [Row(0, 9, pack([1]), True)],
            [Row(1, 0, b"", True)],
            [Row(1, 0, pack([n_tokens]), True)],
            [Row(3, 0, pack([1]), True)],
            [Row(-1, 0, pack([1]), True)],
            [Row(1, 0, pack([1]), True), Row(1, 1, pack([1]), True)],
        ):
            with pytest.raises(REFUSED):
                context.step(rows)
            assert context.length(1) == 0
            if context.length(0) == 0:  # after a failed step it may be empty, and is then as new
                context.drop(0)
                feed(context, 0, tokens)
            assert context.length(0) == 10

    def test_a_step_without_room_takes_nothing_away(
        self, subject: BackendSubject, context: Context, options: ContextOptions
    ) -> None:
        """When cells run out, every sequence of the step is what it was, or empty.

        If this fails: one request too many destroys those that run.
        """
        if not options.kv_unified:
            pytest.skip("each sequence has cells of its own")
        before_row = feed(context, 0, subject.tokens[:100])
        feed(context, 1, subject.tokens[:100])
        before = State.of(context, 1)
        too_many = pack([subject.tokens[n % 300] for n in range(context.n_ctx - 150)])
        try:
            context.step([Row(2, 0, too_many, logits=True)])
        except DecodeFailed:
            assert context.length(2) == 0
        else:
            pytest.skip("its sequences do not take cells away from each other")
        assert [context.length(seq) for seq in (0, 1)] == [100, 100]
        after = State.of(context, 1)
        assert [bytes(b.data) for b in after.blocks] == [bytes(b.data) for b in before.blocks]
        assert feed(context, 0, [subject.tokens[100]]) != before_row, "it goes on"

    def test_an_abort_ends_no_step_that_comes_later(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """``abort`` while nothing runs has no effect.

        If this fails: cancelling one request fails the next one.
        """
        context.abort()
        feed(context, 0, subject.tokens[:10])
        with ThreadPoolExecutor(1) as other:
            other.submit(context.abort).result()
        feed(context, 0, subject.tokens[10:20])
        assert context.length(0) == 20

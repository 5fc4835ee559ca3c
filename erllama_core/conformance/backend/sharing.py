"""What sequences promise that are cut, or begin with the same cells: tests of the kit."""

from __future__ import annotations

import contextlib

import pytest

from erllama_core.conformance.backend.driving import REFUSED, apart, decode, feed
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.interfaces.backend import Context, KVClass


class SharingPromises(BackendKit):
    """What sequences promise that are cut, or begin with the same cells."""

    def test_truncating_keeps_the_beginning(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence that was cut computes as if it had never been longer; or it is not cut.

        If this fails: a branch of a conversation remembers the branch that was left.
        """
        feed(context, 1, subject.tokens[200:240])
        for length in (59, 30, 1, 0):
            feed(context, 0, subject.tokens[:60])
            if context.truncate(0, length):
                assert context.length(0) == length
                feed(fresh, 0, subject.tokens[:length]) if length else None
                got, expected = decode(context, 0, [3, 9]), decode(fresh, 0, [3, 9])
                assert max(map(apart, got, expected)) <= subject.rounding, length
                fresh.drop(0)
            else:
                assert context.kv_class is not KVClass.SPAN, "SPAN sequences can be cut"
                assert context.length(0) == 60, "False: nothing has changed"
            context.drop(0)
        assert context.length(1) == 40
        with contextlib.suppress(*REFUSED):
            assert not context.truncate(1, 41)
        assert context.length(1) == 40

    def test_a_shared_beginning_goes_on_as_a_computed_one(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """The one that shares, and the one it shares with, compute what each would alone.

        If this fails: agents with one system prompt read each other's questions.
        """
        feed(context, 0, subject.tokens[:80])
        for length in (80, 40, 1):
            if context.share(0, 1, length):
                assert context.length(1) == length
                feed(fresh, 0, subject.tokens[:length])
                got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
                assert max(map(apart, got, expected)) <= subject.rounding, length
                fresh.drop(0)
                context.drop(1)
            else:
                assert context.kv_class is not KVClass.SPAN, "SPAN sequences can be shared"
                assert context.length(1) == 0, "False: nothing has changed"
        feed(fresh, 0, subject.tokens[:80])
        got, expected = decode(context, 0, [3, 9]), decode(fresh, 0, [3, 9])
        assert max(map(apart, got, expected)) <= subject.rounding
        for source, target, length in ((0, 0, 1), (0, 1, 0), (0, 1, 83), (2, 1, 1), (0, 3, 1)):
            with pytest.raises(REFUSED):
                context.share(source, target, length)

    def test_sharers_outlive_their_source(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """What is shared stays when the source is dropped and used again at once.

        If this fails: a finished request takes the cells of those that go on from it.
        """
        feed(context, 0, subject.tokens[:80])
        if not context.share(0, 1, 80):
            return
        context.drop(0)
        feed(context, 0, subject.tokens[150:230])
        feed(fresh, 0, subject.tokens[:80])
        got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
        assert max(map(apart, got, expected)) <= subject.rounding

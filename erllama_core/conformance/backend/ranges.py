"""What ranges and their buffers promise: tests of the kit."""

from __future__ import annotations

import attrs
import pytest

from erllama_core.conformance.backend.driving import REFUSED, apart, decode, export, feed
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.interfaces.backend import Context, KVClass, RangeExport


class RangePromises(BackendKit):
    """What ranges and their buffers promise."""

    def test_ranges_of_one_call_are_those_of_many(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """SPAN, CHECKPOINT: exported together, in any order, ranges are what each is alone.

        If this fails: a block's bytes depend on what was saved with it, and do not fit others.
        """
        if context.kv_class is KVClass.WHOLE:
            return
        feed(context, 1, subject.tokens[200:250])
        feed(context, 0, subject.tokens[:100])
        bounds = [(56, 100), (0, 56), (20, 21), (0, 60)]
        together = [
            RangeExport(a, b, memoryview(bytearray(context.range_bytes(0, a, b))))
            for a, b in bounds
        ]
        context.export_ranges(0, together)
        for item in together:
            (alone,) = export(context, 0, [item.start, item.end])
            assert alone.data == item.into

    def test_ranges_go_where_they_came_from_only(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """SPAN, CHECKPOINT: a hole, another order, or a stop outside the block is refused.

        If this fails: a context is restored with a part missing, and answers nonsense.
        """
        if context.kv_class is KVClass.WHOLE:
            return
        feed(context, 0, subject.tokens[:90])
        first, second, third = export(context, 0, [0, 30, 60, 90])
        for wrong in (
            [second],
            [first, third],
            [first, first],
            [attrs.evolve(first, stop=0)],
            [attrs.evolve(first, stop=31)],
            [attrs.evolve(first, stop=20), second],
        ):
            with pytest.raises(REFUSED):
                context.import_ranges(1, wrong)
            context.drop(1)
        assert context.length(0) == 90
        for start, end in ((0, 91), (30, 30), (40, 30), (-1, 3)):
            with pytest.raises(REFUSED):
                context.range_bytes(0, start, end)

    def test_a_block_can_be_cut_at_its_end(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """SPAN: a restored chain may stop in the middle of its last block, anywhere.

        If this fails: off by one at a block's edge: the prompt that leaves a stored one within a
        block gets a token too many or too few.
        """
        if context.kv_class is not KVClass.SPAN:
            return
        feed(context, 0, subject.tokens[:90])
        first, second = export(context, 0, [0, 45, 90])
        for stop in (46, 47, 60, 89, 90):
            context.import_ranges(1, [first, attrs.evolve(second, stop=stop)])
            assert context.length(1) == stop
            feed(fresh, 0, subject.tokens[:stop])
            got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
            assert max(map(apart, got, expected)) <= subject.rounding, stop
            context.drop(1)
            fresh.drop(0)

    def test_buffers_have_exactly_the_right_size(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """An export into a buffer of another size, or one that cannot be written, is refused.

        If this fails: the native side writes beyond the buffer's end.
        """
        feed(context, 0, subject.tokens[:40])
        if context.kv_class is not KVClass.WHOLE:
            size = context.range_bytes(0, 0, 40)
            for into in (bytearray(size - 1), bytearray(size + 1), bytes(size)):
                with pytest.raises((*REFUSED, TypeError)):
                    context.export_ranges(0, [RangeExport(0, 40, memoryview(into))])
        if context.kv_class is not KVClass.SPAN:
            size = context.snapshot_bytes(0)
            for into in (bytearray(size - 1), bytearray(size + 1), bytes(size)):
                with pytest.raises((*REFUSED, TypeError)):
                    context.export_snapshot(0, memoryview(into))
        assert context.length(0) == 40

"""Copying a sequence's state into save buffers while it stands still."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from erllama_core.cache.counters import SaveReason
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.passage import DURABLE_REASONS, SaveBuffer
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.space import ModelSpace, NewBlock
from erllama_core.interfaces.backend import Context, KVClass, RangeExport
from erllama_core.interfaces.log import get_logger, told
from erllama_core.model.request import Request
from erllama_core.model.snapshots import Taken, interval_of, opening, positions

log = get_logger("erllama.model")


class Saver:
    """What of a request is saved, and when. Used by the worker, between two steps.

    Nothing here waits: what finds no room on its way to the tiers is not saved, and a request
    goes on as if it had been.
    """

    def __init__(self, context: Context, space: ModelSpace, policy: SavePolicy) -> None:
        self._context: Final = context
        self._space: Final = space
        self._policy = policy
        self._align: Final = space.align_tokens
        self._snapshot_bytes = 0
        """Of the last snapshot: that of another one is much the same."""

    def set_policy(self, policy: SavePolicy) -> None:
        """Go by another policy from now on; what was saved by the old one stays."""
        self._policy = policy

    def saves(self, tokens: int) -> bool:
        """Whether a context of that length is saved at all."""
        return self._space.has_tiers and tokens >= self._policy.min_tokens

    def shortfall(self, prompt: int, context: int, drops: int = 0) -> str | None:
        """What of a context, its prompt a part of it, is saved late or not at all, and why.

        ``drops``: saves that found no room. Thread-safe.
        """
        policy = self._policy
        if not self._space.has_tiers:
            return "nothing is saved: the model has no tier"
        if context < policy.min_tokens:
            return (
                f"nothing is saved: {context} tokens are less than min_tokens ({policy.min_tokens})"
            )
        if drops:
            return (
                f"{drops} saves were dropped, as too much waited to be written "
                "(max_inflight_bytes) or memory_budget_bytes had no room; what is missing is "
                "tried again when the reply has ended"
            )
        boundary = policy.cold_boundary(prompt, self._align)
        if boundary == prompt:
            return None
        if prompt < policy.cold_min_tokens:
            why = f"it is shorter than cold_min_tokens ({policy.cold_min_tokens})"
        elif prompt < policy.min_tokens:
            why = f"it is shorter than min_tokens ({policy.min_tokens})"
        else:
            why = (
                f"cold_max_tokens is {policy.cold_max_tokens or 'not set'}, boundary_trim_tokens "
                f"{policy.boundary_trim_tokens}, and only whole blocks are saved short of its end"
            )
        return (
            f"{boundary} of the prompt's {prompt} tokens are saved while it is computed, the rest "
            f"when the reply has ended: {why}"
        )

    def plan(self, request: Request) -> None:
        """A request's sequence stands where computing begins: see where slices have to end."""
        plan: list[int] = []
        wanted: list[int] = []
        prompt = request.prompt_tokens
        boundary = self._policy.cold_boundary(prompt, self._align)
        if self._takes_snapshots and boundary and self.saves(prompt):
            assert request.keys is not None
            text = request.keys.text
            offered = [] if text is None else text.points()
            at = opening(prompt, request.opening_tokens, offered)
            wanted = [request.saved, boundary, *([] if at is None else [at])]
            plan = positions(
                start=request.computed,
                limit=min(boundary, prompt - 1),  # the end has one in any case
                interval=interval_of(self._policy, self._snapshot_bytes, self._context.n_ctx),
                least=max(1, self._policy.min_tokens),
                wanted=wanted,
                offered=offered,
            )
        request.snapshots.planned = frozenset(plan)
        request.snapshots.marked = request.snapshots.planned.intersection(wanted)
        request.stops.update(plan)

    def let_go(self, request: Request) -> None:
        """A request has ended or lost its state: what it was to store later is not stored."""
        for taken in request.snapshots.all():
            if taken.pages is not None:
                self._space.forgo(taken.pages)

    @property
    def _takes_snapshots(self) -> bool:
        return self._space.kv_class is not KVClass.SPAN

    def after_prefill(self, request: Request, row: int | None) -> None:
        """A part of the prompt was computed; ``row``: where its last logits are, if it has any."""
        with self._unharmed(request):
            self._after_prefill(request, row)

    def _after_prefill(self, request: Request, row: int | None) -> None:
        prompt = request.prompt_tokens
        boundary = self._policy.cold_boundary(prompt, self._align)
        if not boundary or not self.saves(prompt):
            return
        if request.computed in request.snapshots.planned:
            self._take_snapshot(request, row)
        if request.computed < prompt:
            row = None  # what is stored with the blocks from here on is that of the end
        reached = min(boundary, request.computed)
        if reached < boundary:
            reached -= reached % self._align
        goes_on = row is None and (boundary == prompt or reached < boundary)
        if self._context.exports_whole and goes_on:
            return  # a long prompt's beginning would be copied with every part of it
        self._save_blocks(request, reached, "cold")
        if row is not None and boundary == prompt:
            self._save_end(request, row, "cold")

    def after_token(self, request: Request) -> None:
        """The reply has grown by a token."""
        interval = self._policy.continued_interval
        aligned = request.computed - request.computed % self._align
        if not interval or request.computed - request.saved < interval or aligned <= request.tried:
            return
        if self.saves(request.computed):
            request.tried = aligned  # what finds no room now is tried again a block later
            with self._unharmed(request):
                self._save_blocks(request, aligned, "continued")

    def at_end(self, request: Request, row: int | None, reason: SaveReason = "finish") -> None:
        """The context is whole, or as whole as it will get."""
        if not request.computed or not self.saves(request.computed):
            return
        request.is_last_save = reason == "shutdown"
        with self._unharmed(request):
            assert request.keys is not None
            # Its beginning may have been evicted since it was saved, and the rest hangs on it.
            request.saved = self._covered(request)
            self._save_blocks(request, request.computed, reason)
            self._save_end(request, row, reason)
            self._thin(request)
            self._space.touch(request.keys, request.computed)
            if reason in DURABLE_REASONS:
                self._space.make_durable(request.keys, request.computed)

    def before_loss(self, request: Request, reason: SaveReason = "evict") -> bool:
        """A request that has ended is about to lose its sequence: save what is not stored.

        Whether there was anything.
        """
        if not self.saves(request.computed):
            return False
        with self._unharmed(request):
            if self._is_stored(request):
                return False
        self.at_end(request, None, reason)
        return True

    def _is_stored(self, request: Request) -> bool:
        """Whether all that a sequence holds could be restored."""
        keys, position = request.keys, request.computed
        assert keys is not None
        if self._takes_snapshots and not self._space.has_snapshot(keys, position):
            return False
        return self._covered(request) >= position

    def _covered(self, request: Request) -> int:
        """Tokens of a sequence that are stored in blocks."""
        assert request.keys is not None
        return self._space.covered(request.keys, request.computed)

    @contextmanager
    def _unharmed(self, request: Request) -> Iterator[None]:
        """Whatever saving raises ends this save, and never the request."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a backend's own code, or the cache's
            self._space.count_unsaved()
            log.warning("save.failed", request=request.id, model=request.model, error=told(error))

    def _save_blocks(self, request: Request, end: int, reason: SaveReason) -> None:
        keys = request.keys
        assert keys is not None
        blocks: list[tuple[NewBlock, SaveBuffer]] = []
        try:
            position = self._lay_out(request, keys, end, blocks)
            self._export(request, blocks)
            while blocks:
                self._space.submit_block(keys, *blocks.pop(0), reason)
        except BaseException:
            for _, pages in blocks:
                self._space.forgo(pages)
            raise
        request.saved = position
        ready = request.snapshots.until(position)
        for taken in ready:
            if taken.pages is not None:
                self._space.submit_snapshot(keys, taken.position, taken.pages, reason)
            if taken.mark is not None:
                self._space.submit_mark(keys, taken.position, taken.mark, reason)
        if ready:
            self._thin(request)

    def _lay_out(
        self,
        request: Request,
        keys: ContextKeys,
        end: int,
        blocks: list[tuple[NewBlock, SaveBuffer]],
    ) -> int:
        """Add the blocks that are missing before ``end``, while there is room; up to where."""
        position = request.saved
        while position < end:
            block = self._space.next_block(keys, position, end)
            if block is None:
                return end
            size = self._block_bytes(request, block)
            pages = self._reserve(request, size)
            if pages is None:
                break
            blocks.append((block, pages))
            position = block.end
        return position

    def _block_bytes(self, request: Request, block: NewBlock) -> int:
        """Where only whole states are stored, a block says which tokens they belong to."""
        if self._space.kv_class is KVClass.WHOLE:
            return 0
        return self._context.range_bytes(request.seq, block.start, block.end)

    def _export(self, request: Request, blocks: Sequence[tuple[NewBlock, SaveBuffer]]) -> None:
        """Copy all of them at once: it may cost as much as copying one."""
        if not blocks or self._space.kv_class is KVClass.WHOLE:
            return
        started = time.perf_counter_ns()
        ranges = [RangeExport(block.start, block.end, pages.view) for block, pages in blocks]
        self._context.export_ranges(request.seq, ranges)
        self._space.add_pack_time(time.perf_counter_ns() - started)

    def _save_end(self, request: Request, row: int | None, reason: SaveReason) -> None:
        """What is kept of the very position at which the sequence stands."""
        keys = request.keys
        assert keys is not None
        position = request.computed
        space = self._space
        if self._takes_snapshots and not space.has_snapshot(keys, position):
            pages = self._snapshot(request)
            if pages is not None:
                space.submit_snapshot(keys, position, pages, reason)
        if row is not None and not space.has_mark(keys, position):
            space.submit_mark(keys, position, self._context.mark(row, space.mark_size), reason)

    def _take_snapshot(self, request: Request, row: int | None) -> None:
        """Take one where the sequence stands, and keep it until the blocks before it are stored;
        with the logits that are in ``row``, where others may end.
        """
        keys, position = request.keys, request.computed
        assert keys is not None
        if request.snapshots.has(position):
            return
        there = self._space.has_snapshot(keys, position)
        pages = None if there else self._snapshot(request)
        mark = None
        if (
            row is not None
            and position in request.snapshots.marked
            and (there or pages is not None)
            and not self._space.has_mark(keys, position)
        ):
            mark = self._context.mark(row, self._space.mark_size)
        if pages is not None or mark is not None:
            request.snapshots.add(Taken(position, pages, mark))

    def _snapshot(self, request: Request) -> SaveBuffer | None:
        self._snapshot_bytes = self._context.snapshot_bytes(request.seq)
        return self._copy(
            request,
            self._snapshot_bytes,
            functools.partial(self._context.export_snapshot, request.seq),
        )

    def _thin(self, request: Request) -> None:
        if self._takes_snapshots:
            assert request.keys is not None
            self._space.thin_snapshots(
                request.keys, request.computed, self._policy.snapshot_bytes_max
            )

    def _copy(
        self, request: Request, size: int, export: Callable[[memoryview], None]
    ) -> SaveBuffer | None:
        pages = self._reserve(request, size)
        if pages is None:
            return None
        started = time.perf_counter_ns()
        try:
            export(pages.view)
        except BaseException:
            self._space.forgo(pages)
            raise
        self._space.add_pack_time(time.perf_counter_ns() - started)
        return pages

    def _reserve(self, request: Request, size: int) -> SaveBuffer | None:
        pages = self._space.reserve(size, beyond_bound=request.is_last_save)
        if pages is None:
            request.drops += 1
        return pages

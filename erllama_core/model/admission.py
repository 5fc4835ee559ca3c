"""Who gets a sequence next, and which one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Final

from erllama_core.model.request import Phase, Request
from erllama_core.model.roster import Roster
from erllama_core.model.sequences import LiveSequence, SequencePool

_HEADROOM: Final = 64
"""Cells of its reply that must be free for a request to be let in. What it needs beyond them is
taken from residents, or from requests that came later."""


class Admission:
    """Lets waiting requests in, in order. The worker's alone.

    ``may_begin``: whether a request may be let in at all now. ``guard`` does something for one
    request; ``start`` has one begin that has a sequence.
    """

    def __init__(
        self,
        pool: SequencePool,
        roster: Roster,
        *,
        may_begin: Callable[[Request], bool],
        guard: Callable[[Request, Callable[[Request], None]], None],
        start: Callable[[Request], None],
    ) -> None:
        self._pool: Final = pool
        self._roster: Final = roster
        self._may_begin: Final = may_begin
        self._guard: Final = guard
        self._start: Final = start
        self._orders: Final = itertools.count(1)

    def admit(self) -> bool:
        """Let in as many as can be, as long as the first one can; whether any was."""
        waiting = self._roster.waiting
        any_left = False
        while waiting:
            first = waiting[0]
            self._guard(first, self._let_in)
            if waiting and waiting[0] is first:
                break
            any_left = True
        return any_left

    def _let_in(self, request: Request) -> None:
        live = self._place_for(request) if self._may_begin(request) else None
        if live is not None:
            self._roster.admit(request)
            self._occupy(live, request)
            self._start(request)

    def _place_for(self, request: Request) -> LiveSequence | None:
        """The sequence that a request gets now; None when it has to wait."""
        session, keys = request.session, request.keys
        assert keys is not None
        own = None if session is None else session.live
        if own is not None and not own.is_idle:
            return None  # the last token of the turn before is still being computed
        if own is None and not self._pool.n_idle:
            return None  # on most ticks of a busy model: nothing is compared for that
        nearest, common = max(
            ((live, self._pool.common(live, keys)) for live in self._pool.all),
            key=lambda found: found[1],
        )
        if not self._has_room(request, common):
            return None
        if own is not None:
            return own
        return self._pool.claim(spare=nearest if common else None)

    def _has_room(self, request: Request, common: int) -> bool:
        """Whether there are cells for a request of which ``common`` tokens are in the context.

        Residents make room, and so do later requests, but not for this one to get in. One that
        had to give way before waits until all that it may ever need is there.
        """
        ledger, active = self._pool.ledger, self._roster.active
        if not ledger.is_pooled or not active:
            return True
        needed = request.length - common + min(_HEADROOM, request.max_tokens - request.length)
        if request.was_preempted:
            needed = request.max_tokens - common
        for other in active:
            left = other.max_tokens - other.computed
            if not other.was_preempted:
                left = min(left, max(0, other.length - other.computed) + _HEADROOM)
            if other.phase is Phase.FOLLOWING:
                left -= other.follow_until
            needed += left
        return needed <= ledger.free + self._pool.held

    def _occupy(self, live: LiveSequence, request: Request) -> None:
        """Let a request have a sequence, with as much of what is in it as is of use to it."""
        keys = request.keys
        assert keys is not None
        held, common = live.length, self._pool.common(live, keys)
        sticks = live.session is not None and live.session is request.session
        if live.is_resident and common < held:
            common = self._pool.cut(live, common)
        self._pool.occupy(live, request)
        request.computed = common
        if not request.is_counted:
            request.sticks = sticks and 0 < common == held
        if not request.order:
            request.order = next(self._orders)
            request.admitted_at = time.perf_counter()

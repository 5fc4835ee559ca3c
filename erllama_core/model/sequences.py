"""The sequences of a context: who has which, and what idle ones still hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Final

from erllama_core.cache.keys import ContextKeys, common_tokens
from erllama_core.interfaces.backend import Context, KVClass
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.model.cells import CellLedger
from erllama_core.model.request import Phase, Request
from erllama_core.model.session import Session

_GLANCE: Final = 32 * TOKEN_BYTES
"""What is compared of two contexts before all of them is: most differ early."""


class LiveSequence:
    """One sequence id. The worker's alone, but for the questions.

    Idle with a context it is a *resident*; a resident that has a session is *pinned*.
    """

    def __init__(self, seq: int) -> None:
        self.seq: Final = seq
        self.request: Request | None = None
        """Who uses it, or used it last and left its context; None: it is empty."""
        self.session: Session | None = None
        self.left_at = 0
        """When it became idle, in turns."""

    @property
    def is_idle(self) -> bool:
        request = self.request  # once: other threads ask while it changes hands
        return request is None or request.phase is Phase.ENDED

    @property
    def is_resident(self) -> bool:
        """Whether it is idle and holds a context."""
        request = self.request
        return request is not None and request.phase is Phase.ENDED

    @property
    def length(self) -> int:
        """Tokens whose state it holds."""
        return 0 if self.request is None else self.request.computed


class SequencePool:
    """All sequences of a context, and the cells that they hold. The worker's alone.

    ``before_drop`` sees a resident that is about to lose its cells. ``resident_cells_max``:
    cells that residents without a session may hold; None: an eighth of those in a pool.
    """

    def __init__(
        self,
        context: Context,
        before_drop: Callable[[Request], object],
        resident_cells_max: int | None = None,
    ) -> None:
        self._context: Final = context
        self._before_drop: Final = before_drop
        pooled = context.n_cells < context.n_seq_max * context.n_ctx
        self.ledger: Final = CellLedger(context.n_cells if pooled else None)
        if resident_cells_max is None and pooled:
            resident_cells_max = context.n_cells // 8
        self._resident_cells_max: Final = resident_cells_max
        self.all: Final = tuple(LiveSequence(seq) for seq in range(context.n_seq_max))
        self._turns: Final = itertools.count(1)

    # ------------------------------------------------------------------- looking

    @property
    def n_idle(self) -> int:
        return sum(live.is_idle for live in self.all)

    @property
    def n_pinned_idle(self) -> int:
        """Residents that are kept for a session."""
        return sum(live.is_resident and live.session is not None for live in self.all)

    @property
    def held(self) -> int:
        """Cells that residents hold and would give back if all of them were dropped."""
        return self.ledger.exclusive({live.seq for live in self.residents()})

    def donor(self, keys: ContextKeys, *, apart_from: LiveSequence) -> tuple[LiveSequence, int]:
        """Who holds most of a context, and how many of its tokens can be had from there.

        ``apart_from`` and 0 when nobody else holds any of it.
        """
        best, most = apart_from, 0
        for live in self.all:
            if live is not apart_from:
                common = self.common(live, keys)
                if common > most:
                    best, most = live, common
        return best, most

    def common(self, live: LiveSequence, keys: ContextKeys) -> int:
        """Leading tokens of a context that can be had from a sequence."""
        request = live.request
        if request is None or request.keys is None or not request.computed:
            return 0
        shared = min(shared_tokens(request.keys, keys), request.computed)
        if self._context.kv_class is KVClass.SPAN or shared == request.computed:
            return shared
        return 0

    # ------------------------------------------------------------------- changing

    def claim(self, *, spare: LiveSequence | None = None) -> LiveSequence | None:
        """A sequence for a request, emptied if need be; None when all are in use.

        ``spare`` is taken last, and as it is: what it holds is of use to the request.
        """
        for live in self.all:
            if live.request is None:
                return live
        residents = [live for live in self._in_order_of_loss() if live is not spare]
        if residents:
            self.drop(residents[0])
            return residents[0]
        return spare if spare is not None and spare.is_idle else None

    def occupy(self, live: LiveSequence, request: Request) -> None:
        """A request has the sequence now, with whatever it holds."""
        if live.session is not request.session:
            self.unpin(live)
        if live.request is not None:
            live.request.live = None
            request.unproven = live.request.unproven
        live.request = request
        request.live = live

    def leave(self, request: Request, session: Session | None) -> None:
        """A request has ended; its context stays as a resident, pinned if it has a session."""
        live = request.live
        assert live is not None
        live.left_at = next(self._turns)
        self.unpin(live)
        if session is not None:
            self.unpin_session(session)
            live.session, session.live = session, live

    def cut(self, live: LiveSequence, length: int) -> int:
        """Keep the first ``length`` tokens of a resident, or none; how many are left."""
        self.save(live)
        if not length or not self._context.truncate(live.seq, length):
            length = 0
            self._context.drop(live.seq)
        self.ledger.cut(live.seq, length)
        assert live.request is not None
        live.request.computed = length
        return length

    def save(self, live: LiveSequence) -> None:
        """See that a resident's context is stored: it is about to lose a part, or all."""
        if live.is_resident and live.request is not None:
            self._before_drop(live.request)

    def drop(self, live: LiveSequence) -> None:
        """Empty a sequence; a resident's context is saved first, where it is not yet."""
        self.save(live)
        self.forget(live)

    def forget(self, live: LiveSequence) -> None:
        """Empty a sequence, whatever it holds."""
        self._context.drop(live.seq)
        self.ledger.drop(live.seq)
        self.unpin(live)
        request, live.request = live.request, None
        if request is not None:
            request.computed = 0
            request.live = None

    def unpin(self, live: LiveSequence) -> None:
        """Its session has ended, or does without it from now on."""
        session, live.session = live.session, None
        if session is not None:
            session.live = None

    def unpin_session(self, session: Session) -> None:
        """The session does without its sequence from now on."""
        if session.live is not None:
            self.unpin(session.live)

    def abandon(self) -> None:
        """The context is gone. Any thread, once the one that used it does so no longer."""
        for live in self.all:
            self.unpin(live)

    def make_room(self, cells: int, *, apart_from: Collection[LiveSequence] = ()) -> bool:
        """Drop residents until so many cells are free; whether they are."""
        while self.ledger.free < cells:
            live = next((one for one in self._in_order_of_loss() if one not in apart_from), None)
            if live is None:
                return False
            self.drop(live)
        return True

    def bound_residents(self) -> None:
        """Drop residents without a session that hold more cells than such may."""
        most = self._resident_cells_max
        if most is None:
            return
        free = [live for live in self._in_order_of_loss() if live.session is None]
        while free and self._cells_of(free) > most:
            self.drop(free.pop(0))

    def _cells_of(self, lives: Sequence[LiveSequence]) -> int:
        """Cells that dropping all of these gives back."""
        if self.ledger.is_pooled:
            return self.ledger.exclusive({live.seq for live in lives})
        return sum(live.length for live in lives)

    def drop_all_idle(self, *, save: bool = True) -> int:
        """Drop every resident, pinned or not; how many there were."""
        residents = self.residents()
        for live in residents:
            if save:
                self.drop(live)
            else:
                self.forget(live)
        return len(residents)

    def residents(self) -> list[LiveSequence]:
        """Idle sequences that hold a context."""
        return [live for live in self.all if live.is_resident]

    def _in_order_of_loss(self) -> list[LiveSequence]:
        """Residents, those first that are missed least: without a session, left long ago."""
        return sorted(self.residents(), key=lambda live: (live.session is not None, live.left_at))


def shared_tokens(a: ContextKeys, b: ContextKeys) -> int:
    """How many leading tokens two contexts share; none in different namespaces."""
    if a.namespace != b.namespace:
        return 0
    if a.tokens[:_GLANCE] != b.tokens[:_GLANCE]:
        return common_tokens(bytes(a.tokens[:_GLANCE]), bytes(b.tokens[:_GLANCE]))
    return common_tokens(a.tokens, b.tokens)

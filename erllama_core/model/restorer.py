"""Bringing a request's sequence as far as anything that exists of its context brings it.

What exists: stored state, other sequences (residents, and requests that run), and what a
running request is about to compute. The longest wins; where they are equal, what is nearest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Final

import attrs

from erllama_core.cache.loader import Fetch
from erllama_core.cache.lookup import Match
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import Context, KVClass, Mark
from erllama_core.interfaces.log import get_logger, told
from erllama_core.model.explain import examine
from erllama_core.model.request import Phase, Request
from erllama_core.model.sequences import LiveSequence, SequencePool, shared_tokens
from erllama_core.results import CacheHit

log = get_logger("erllama.model")

RESIDENT: Final = "resident"
"""What results call state that another sequence held, where they name tiers."""

_ATTEMPTS: Final = 3
"""Look-ups after fetches that failed; none of them finds again what failed before."""
_WORTH_WAITING: Final = 32
"""Tokens that another request must be about to compute for this one to wait for them."""


class Restorer:
    """Look-up, fetch, import, share. Used by the worker; only a fetch leaves its thread.

    ``post`` runs something on the worker; what it raises there ends that request, as with
    ``guard``. ``running`` are the requests that have a sequence. ``respell`` has a request go
    on with other tokens of its text if there is room for them. When a request's sequence is as
    far as it gets, ``ready`` is called; with the logits at its end if they were stored, and, for
    one that wants a reply, the token drawn from them.
    """

    def __init__(
        self,
        context: Context,
        space: ModelSpace,
        pool: SequencePool,
        n_vocab: int,
        *,
        post: Callable[[Request, Callable[[Request], None]], None],
        guard: Callable[[Request, Callable[[Request], None]], None],
        running: Callable[[], Iterable[Request]],
        respell: Callable[[Request, bytes], bool],
        ready: Callable[[Request, Mark | None, int | None], None],
    ) -> None:
        self._context: Final = context
        self._space: Final = space
        self._pool: Final = pool
        self._n_vocab: Final = n_vocab
        self._post: Final = post
        self._guard: Final = guard
        self._running: Final = running
        self._respell: Final = respell
        self._ready: Final = ready
        self.last_hit: CacheHit | None = None
        """What the request found that was the last to be as far as it got."""
        self.outstanding = 0
        """Calls that other threads still owe; each one posts."""

    def start(self, request: Request, *, use_mark: bool = True) -> None:
        """Begin; the sequence holds the first ``computed`` tokens of the context, or none."""
        request.phase = Phase.LOADING
        self._look_up(request, use_mark=use_mark)

    def _look_up(self, request: Request, *, use_mark: bool = True, discover: bool = True) -> None:
        match = self._find(request, use_mark=use_mark)
        if match.length < request.length - 1:
            if not self._space.is_scanned:
                self.outstanding += 1
                self._space.when_scanned(self._again(request, use_mark, discover=discover))
                return
            again = self._again(request, use_mark, discover=False)
            assert request.keys is not None
            if discover and self._space.discover(request.keys, match, again):
                self.outstanding += 1
                return
        self._choose(request, match)

    def _again(self, request: Request, use_mark: bool, *, discover: bool) -> Callable[[], None]:
        """What another thread calls when more may be known; on the worker, it is looked up."""

        def look_up(request: Request) -> None:
            self.outstanding -= 1
            if request.phase is Phase.LOADING:
                self._look_up(request, use_mark=use_mark, discover=discover)

        return lambda: self._post(request, look_up)

    def _find(self, request: Request, *, use_mark: bool = True) -> Match:
        """What is stored of the context, or of the same text in other tokens if that is more."""
        may_sample = use_mark and not request.generated and self._mark_would_serve(request)
        assert request.keys is not None
        match = self._space.find(request.keys, may_sample=may_sample)
        if request.may_respell and match.length < request.length - 1:
            tokens = self._space.respell(request.keys, match)
            if tokens is not None and self._respell(request, tokens):
                request.respelt = True
                match = self._space.find(request.keys, may_sample=may_sample)
        return match

    def _choose(self, request: Request, match: Match) -> None:
        """Take the longest of what there is."""
        assert request.keys is not None
        if request.options.explain:
            request.finding = examine(self._space, request.keys, match, respelt=request.respelt)
        donor, length = self._live(request, match)
        if match.length > length:
            match = self._admitted(request, match)
        reach = max(length, match.length)
        leader, common = self._leader(request)
        if leader is not None and common - reach >= _WORTH_WAITING:
            self._follow(request, leader, common)
        elif donor is not None and length >= match.length:
            self._use_live(request, match, donor, length)
        else:
            self._fetch(request, match)

    # ------------------------------------------------------------------ sequences

    def _live(self, request: Request, match: Match) -> tuple[LiveSequence | None, int]:
        """The sequence from which most of the context can be had, and how much.

        The whole of it is of use where its logits are stored; else the last token is left to
        compute, which takes a sequence that can be cut.
        """
        own = request.live
        assert own is not None
        assert request.keys is not None
        donor, most = self._pool.donor(request.keys, apart_from=own)
        if request.computed >= most:
            donor, most = own, request.computed
        if most == request.length and match.mark is None:
            most = most - 1 if self._context.kv_class is KVClass.SPAN else 0
        return (donor, most) if most > 0 else (None, 0)

    def _use_live(self, request: Request, match: Match, donor: LiveSequence, length: int) -> None:
        if not self._take_from(request, donor, length):
            self._fetch(request, self._admitted(request, match))
            return
        self._note_read(request, length, (RESIDENT,))
        request.saved = min(length, match.covered)
        if match.mark is None or length < request.length:
            self._done(request, attrs.evolve(match, length=length, mark=None), None)
            return
        self._request_state(request, Match(match.covered, length, (), None, match.mark))

    def _take_from(self, request: Request, donor: LiveSequence, length: int) -> bool:
        """Give the request's sequence the first tokens of a donor, which may be itself."""
        own = request.live
        assert own is not None
        if donor is own:
            if self._context.truncate(own.seq, length):
                self._pool.ledger.cut(own.seq, length)
                request.computed = length
                return True
            return False
        self.empty(request)
        request.unproven = None if donor.request is None else donor.request.unproven
        try:
            shared = self._context.share(donor.seq, own.seq, length)
        except Exception as error:  # noqa: BLE001 - a backend's own mistake
            log.warning("share.refused", request=request.id, model=request.model, error=told(error))
            self._context.drop(own.seq)
            shared = False
        if not shared:
            return False
        self._pool.ledger.share(donor.seq, own.seq, length)
        request.computed = length
        return True

    def empty(self, request: Request) -> None:
        """Start over with an empty sequence."""
        live = request.live
        assert live is not None
        self._context.drop(live.seq)
        self._pool.ledger.drop(live.seq)
        request.computed = 0
        request.unproven = None
        if not request.is_counted:
            request.sticks = False

    # ------------------------------------------------------------- shared prefill

    def _leader(self, request: Request) -> tuple[Request | None, int]:
        """The running request that is going to compute most of this one's next tokens."""
        best: Request | None = None
        most = 0
        assert request.keys is not None
        for other in self._running():
            # Not one that waits itself: two could wait for each other.
            if other is request or other.phase not in {Phase.LOADING, Phase.PREFILLING}:
                continue
            assert other.keys is not None
            common = min(shared_tokens(other.keys, request.keys), request.length - 1)
            if other.computed < common and common > most:
                best, most = other, common
        return best, most

    def _follow(self, request: Request, leader: Request, common: int) -> None:
        self.empty(request)
        request.phase = Phase.FOLLOWING
        request.leader, request.follow_until = leader, common
        leader.stops.add(common)

    def settle_followers(self) -> None:
        """Before a step: let those share whose leader is as far as they need it to be."""
        for request in self._followers():
            if request.phase is Phase.FOLLOWING:  # as one before may have ended it
                self._guard(request, self._settle)

    def _settle(self, request: Request) -> None:
        leader = request.leader
        assert leader is not None
        if leader.computed >= request.follow_until:
            other, common = self._leader(request)
            if other is not None and common - request.follow_until >= _WORTH_WAITING:
                self._follow(request, other, common)  # one that goes on further
            else:
                self._share_with(request, leader)
        elif leader.phase not in {Phase.LOADING, Phase.FOLLOWING, Phase.PREFILLING}:
            # It went on with other tokens of its text.
            self.start(request)

    def hand_over(self, leader: Request) -> None:
        """A request, which runs no longer, loses its sequence: who waits carries on from there."""
        left = [request for request in self._followers() if request.leader is leader]
        if not left:
            return
        heir, *others = left
        for request in others:
            request.leader = heir
            request.follow_until = min(request.follow_until, heir.follow_until)
            heir.stops.add(request.follow_until)
        self._guard(heir, functools.partial(self._share_with, leader=leader))

    def _followers(self) -> list[Request]:
        return [request for request in self._running() if request.phase is Phase.FOLLOWING]

    def _share_with(self, request: Request, leader: Request) -> None:
        request.leader = None
        assert leader.keys is not None
        assert request.keys is not None
        # Compared anew: the leader may have gone on with other tokens of its text since.
        agreed = shared_tokens(leader.keys, request.keys)
        length = min(leader.computed, request.follow_until, agreed)
        whole = self._context.kv_class is KVClass.SPAN or length == leader.computed
        source = leader.live
        if not (length and whole and source and self._take_from(request, source, length)):
            self.start(request)
            return
        self._note_read(request, length, (RESIDENT,))
        request.saved = min(length, leader.saved)
        self._done(request, Match(covered=length, length=length), None)

    # ----------------------------------------------------------------- stored state

    def _fetch(self, request: Request, match: Match) -> None:
        self.empty(request)
        donor, base = self._base(request, match)
        spared = [live for live in (request.live, donor) if live is not None]
        if not self._pool.make_room(_cells(match) - base, apart_from=spared):
            free = self._pool.ledger.free + base
            # Ranges can be imported in part, the state of a whole sequence cannot.
            match = match.within(free) if match.pieces else Match(covered=match.covered)
            _note(request, "too few free cells to import all that is stored")
        if not match.length:
            request.saved = match.covered
            self._done(request, None, None)
            return
        self._request_state(request, match)

    def _base(self, request: Request, match: Match) -> tuple[LiveSequence | None, int]:
        """Another sequence that holds the first blocks of a match, and how many tokens they are.

        They are shared and not imported: cells that are there twice take room from others, and
        in one pool make every step longer.
        """
        if not self._pool.ledger.is_pooled or self._context.kv_class is not KVClass.SPAN:
            return None, 0
        assert request.keys is not None
        assert request.live is not None
        donor, common = self._pool.donor(request.keys, apart_from=request.live)
        if common >= match.length:
            return donor, match.length
        # A block is imported whole or not at all.
        base = max((p.entry.start for p in match.pieces if p.entry.start <= common), default=0)
        return (donor, base) if base else (None, 0)

    def _admitted(self, request: Request, match: Match) -> Match:
        """What of a match the cost gate lets through."""
        assert request.keys is not None
        match, request.gate = self._space.admit(request.keys, match, request.options.parent_key)
        if request.finding is not None:
            request.finding = attrs.evolve(request.finding, gate=request.gate)
        return match

    def _request_state(self, request: Request, match: Match) -> None:
        def done(fetch: Fetch) -> None:
            self._post(request, lambda request: self._arrived(request, fetch))

        fetch = self._space.fetch(match, done)
        if fetch is None:
            self.outstanding += 1
        else:
            self._fetched(request, fetch)

    def _arrived(self, request: Request, fetch: Fetch) -> None:
        self.outstanding -= 1
        self._fetched(request, fetch)

    def _fetched(self, request: Request, fetch: Fetch) -> None:
        """Everything is in memory, or something failed. On the worker."""
        if request.phase is not Phase.LOADING:  # it ended meanwhile
            fetch.release()
            return
        if fetch.failed:
            request.attempts += 1
            _note(request, "stored state was gone, damaged, or could not be read")
            if request.attempts < _ATTEMPTS:
                self.start(request)
            else:
                self._restart(request)
            return
        match, mark = fetch.match, fetch.mark
        lacks_cells = request.computed < match.length
        if mark is not None and not mark.serves(request.options.sampling()):
            fetch.release()
            self.start(request, use_mark=False)
        elif lacks_cells and not match.has_state:
            fetch.release()
            self.start(request)  # the cells that it had were taken meanwhile
        elif lacks_cells and not self._imported(request, fetch):
            self._restart(request)
        else:
            fetch.release()
            if not lacks_cells:
                request.restored_bytes += fetch.n_bytes
            self._done(request, match, mark)

    def _imported(self, request: Request, fetch: Fetch) -> bool:
        """Whether the backend took the state, which is released. Notes why not."""
        try:
            if self._import(request, fetch):
                return True
            _note(request, "the cells for what is stored were taken meanwhile")
        except Exception as error:  # noqa: BLE001 - StateRejected, or a backend's own mistake
            # The sequence may hold a part. What was refused once will be refused again, so
            # the prompt is computed: cache trouble never fails a request.
            log.warning(
                "restore.refused", request=request.id, model=request.model, error=told(error)
            )
            self._space.refused(fetch.match)
            _note(request, f"the backend refused the stored state: {error}")
        finally:
            fetch.release()
        return False

    def compute_all(self, request: Request) -> None:
        """What it read was none of its state: compute it, and read nothing more."""
        request.phase = Phase.LOADING
        request.read, request.sources = 0, ()
        _note(request, "what was stored turned out not to be numbers, and was thrown away")
        self._restart(request)

    def _restart(self, request: Request) -> None:
        """Compute it all."""
        self.empty(request)
        self._done(request, None, None)

    def _import(self, request: Request, fetch: Fetch) -> bool:
        """Whether there were cells enough."""
        match, live = fetch.match, request.live
        assert live is not None
        # Looked for anew: another one may have imported the same meanwhile, or have left.
        donor, base = self._base(request, match)
        if donor is not None and not self._take_from(request, donor, base):
            donor, base = None, 0
        if not self._pool.make_room(_cells(match) - base, apart_from=[live]):
            return False
        started = time.perf_counter()
        ranges = fetch.ranges()
        missing = [item for item in ranges if item.start >= base]
        shared_bytes = sum(len(item.data) for item in ranges if item.start < base)
        if missing:
            self._context.import_ranges(live.seq, missing)
        snapshot = fetch.snapshot()
        if snapshot is not None:
            self._context.import_snapshot(live.seq, match.length, snapshot)
        if self._space.gate is not None and (missing or snapshot is not None):
            n_bytes = fetch.n_bytes - shared_bytes
            self._space.gate.observe_import(n_bytes, time.perf_counter() - started)
        self._pool.ledger.grow(live.seq, match.length - base)
        request.computed = match.length
        request.saved = match.covered
        request.unproven = match
        request.restored_bytes += fetch.n_bytes - shared_bytes
        sources = fetch.sources if donor is None else (RESIDENT, *fetch.sources)
        self._note_read(request, match.length, sources)
        return True

    def _note_read(self, request: Request, length: int, sources: tuple[str, ...]) -> None:
        """What a request reuses; what it gets back after it lost its state is its own."""
        if not request.is_counted:
            request.read, request.sources = length, sources

    def _done(self, request: Request, match: Match | None, mark: Mark | None) -> None:
        token = None
        if mark is not None and request.generates:
            token = self._sample_mark(request, match, mark)
            if token is None:
                match, mark = self._without_last(request, match), None
        now = time.perf_counter()
        if not request.is_counted:
            if match is None:
                self._note_read(request, 0, ())
            withheld = request.gate is not None and request.gate.withheld_tokens > 0
            self._space.count(match, request.length, request.options.parent_key, withheld=withheld)
            request.prefill_at = now
            if match is not None:
                request.restore_s = now - request.admitted_at
            request.is_counted = True
            self.last_hit = CacheHit(request.hit_kind, request.read)
        request.phase = Phase.PREFILLING
        self._ready(request, mark, token)

    def _sample_mark(self, request: Request, match: Match | None, mark: Mark) -> int | None:
        """None: the position is to be computed after all."""
        try:
            return request.sampler.sample_mark(mark, greedy=request.pipeline.greedy)
        except ValueError as error:
            # Stored under right checksums, and yet no logits of this model's.
            log.warning(
                "restore.refused", request=request.id, model=request.model, error=told(error)
            )
            if match is not None:
                self._space.refused(Match(mark=match.mark))
            _note(request, f"the backend refused the stored logits: {error}")
            return None

    def _without_last(self, request: Request, match: Match | None) -> Match | None:
        """Leave the last token to compute: its stored logits gave nothing that can be used."""
        length = request.length - 1
        assert request.live is not None
        assert match is not None
        if not length or not self._context.truncate(request.live.seq, length):
            self.empty(request)
            return None
        self._pool.ledger.cut(request.live.seq, length)
        request.computed = length
        self._note_read(request, length, request.sources)
        return attrs.evolve(match, length=length, mark=None)

    def _mark_would_serve(self, request: Request) -> bool:
        size = self._space.mark_size
        if size is None or size >= self._n_vocab:
            return True
        of_that_size = Mark(bytes(4 * size), b"", 0.0, self._n_vocab)
        return of_that_size.serves(request.options.sampling())


def _cells(match: Match) -> int:
    """Cells that an import takes: a block is imported whole before its end is cut off."""
    return match.pieces[-1].entry.end if match.pieces else match.length


def _note(request: Request, obstacle: str) -> None:
    """Remember, for a request that asks why, what kept stored state from being used."""
    if request.finding is not None:
        request.finding = attrs.evolve(request.finding, obstacle=obstacle)

"""Bringing a request's sequence to the longest state that is stored of its prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.cache.loader import Fetch
from erllama_core.cache.lookup import Match
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import Context, Mark
from erllama_core.interfaces.log import get_logger
from erllama_core.model.explain import examine
from erllama_core.model.request import Phase, Request

log = get_logger("erllama.model")

_ATTEMPTS: Final = 3
"""Look-ups after fetches that failed; none of them finds again what failed before."""


class Restorer:
    """Look-up, fetch, import. Used by the worker; only a fetch leaves its thread.

    ``post`` runs something on the worker, ``cells_for`` says how many cells a request may use
    while it is restored. When a request's sequence is as far as it gets,
    ``ready`` is called with the logits to sample its first token from, if they were stored.
    """

    def __init__(
        self,
        context: Context,
        space: ModelSpace,
        n_vocab: int,
        post: Callable[[Request, Callable[[Request], None]], None],
        ready: Callable[[Request, Mark | None], None],
        cells_for: Callable[[Request], int],
    ) -> None:
        self._context: Final = context
        self._space: Final = space
        self._n_vocab: Final = n_vocab
        self._post: Final = post
        self._ready: Final = ready
        self._cells_for: Final = cells_for
        self.outstanding = 0
        """Calls that other threads still owe; each one posts."""

    def start(self, request: Request, *, use_mark: bool = True) -> None:
        """Begin; the request has an empty sequence."""
        request.phase = Phase.LOADING
        self._look_up(request, use_mark=use_mark)

    def _look_up(self, request: Request, *, use_mark: bool = True, discover: bool = True) -> None:
        keys = request.keys
        assert keys is not None
        match = self._space.find(keys, may_sample=use_mark and self._mark_would_serve(request))
        if match.length < request.prompt_tokens - 1:
            if not self._space.is_scanned:
                self.outstanding += 1
                self._space.when_scanned(self._again(request, use_mark, discover=discover))
                return
            again = self._again(request, use_mark, discover=False)
            if discover and self._space.discover(keys, match, again):
                self.outstanding += 1
                return
        self._fetch(request, match)

    def _again(self, request: Request, use_mark: bool, *, discover: bool) -> Callable[[], None]:
        """What another thread calls when more may be known; on the worker, it is looked up."""

        def look_up(request: Request) -> None:
            self.outstanding -= 1
            if request.phase is Phase.LOADING:
                self._look_up(request, use_mark=use_mark, discover=discover)

        return lambda: self._post(request, look_up)

    def _fetch(self, request: Request, match: Match) -> None:
        if request.options.explain and request.keys is not None:
            request.finding = examine(self._space, request.keys, match)
        fitting = match.within(self._cells_for(request))
        if fitting is not match:
            match = fitting
            _note(request, "too few free cells to import all that is stored")
        if not match.length:
            request.saved = match.covered
            self._done(request, None, None)
            return

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
                self._done(request, None, None)
            return
        match, mark = fetch.match, fetch.mark
        try:
            if mark is not None and not mark.serves(request.options.sampling()):
                self.start(request, use_mark=False)
                return
            self._import(request, fetch)
        except Exception as error:  # noqa: BLE001 - StateRejected, or a backend's own mistake
            # The sequence may hold a part. What was refused once will be refused again, so
            # the prompt is computed: cache trouble never fails a request.
            log.warning("restore.refused", request=request.id, error=str(error))
            self._space.refused(fetch.match)
            _note(request, f"the backend refused the stored state: {error}")
            self._context.drop(request.seq)
            self._done(request, None, None)
            return
        finally:
            fetch.release()
        request.computed = request.read = match.length
        request.saved = match.covered
        request.restored_bytes = fetch.n_bytes
        request.sources = fetch.sources
        self._done(request, match, mark)

    def _import(self, request: Request, fetch: Fetch) -> None:
        match = fetch.match
        if match.pieces:
            self._context.import_ranges(request.seq, fetch.ranges())
        snapshot = fetch.snapshot()
        if snapshot is not None:
            self._context.import_snapshot(request.seq, match.length, snapshot)

    def _done(self, request: Request, match: Match | None, mark: Mark | None) -> None:
        self._space.count(match, request.prompt_tokens, request.options.parent_key)
        now = time.perf_counter()
        request.prefill_at = now
        if match is not None:
            request.restore_s = now - request.admitted_at
        request.phase = Phase.PREFILLING
        self._ready(request, mark)

    def _mark_would_serve(self, request: Request) -> bool:
        size = self._space.mark_size
        if size is None or size >= self._n_vocab:
            return True
        of_that_size = Mark(bytes(4 * size), b"", 0.0, self._n_vocab)
        return of_that_size.serves(request.options.sampling())


def _note(request: Request, obstacle: str) -> None:
    """Remember, for a request that asks why, what kept stored state from being used."""
    if request.finding is not None:
        request.finding = attrs.evolve(request.finding, obstacle=obstacle)

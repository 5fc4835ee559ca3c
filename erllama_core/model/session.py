"""Sessions: a caller's names for contexts that are kept at hand."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from erllama_core.cache.keys import common_tokens
from erllama_core.errors import NoSession, StickyBusy, TranscriptMismatch
from erllama_core.interfaces.block import TOKEN_BYTES

if TYPE_CHECKING:
    from erllama_core.model.request import Request
    from erllama_core.model.sequences import LiveSequence


class Session:
    """One caller's context, from turn to turn.

    ``request`` and ``tokens`` are guarded by the table's lock; ``live`` is the worker's.
    """

    def __init__(self, session_id: Hashable) -> None:
        self.id: Final = session_id
        self.request: Request | None = None
        """The turn that is running."""
        self.tokens: bytes | None = None
        """The context after the last turn, packed; None before the first has ended."""
        self.salt: str | None = None
        """The ``cache_salt`` of that turn."""
        self.live: LiveSequence | None = None
        """The sequence that is pinned to it, whose ``session`` this is. Without one, its state is
        restored like any other."""


class SessionTable:
    """The sessions of one model. Thread-safe: callers are answered without its worker."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._sessions: dict[Hashable, Session] = {}

    def begin(
        self, session_id: Hashable, request: Request, goes_on_from: bytes | None = None
    ) -> Session:
        """A turn begins, perhaps the first. Raises StickyBusy.

        ``goes_on_from``: what :meth:`transcript` said; another turn since then is StickyBusy too.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            if goes_on_from is not None and (session is None or session.tokens != goes_on_from):
                raise _busy(session_id)
            if session is None:
                session = self._sessions[session_id] = Session(session_id)
            if session.request is not None:
                raise _busy(session_id)
            session.request = request
            return session

    def transcript(
        self, session_id: Hashable, expected: bytes | None = None
    ) -> tuple[bytes, str | None]:
        """The packed tokens that the next turn goes on from, and their salt.

        Raises NoSession, StickyBusy; TranscriptMismatch when ``expected`` are other tokens.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                raise NoSession(f"there is no session {session_id!r}; begin it with a whole prompt")
            if session.request is not None:
                raise _busy(session_id)
            if session.tokens is None:
                raise NoSession(
                    f"no turn of session {session_id!r} has succeeded yet; give a whole prompt"
                )
            stored, salt = session.tokens, session.salt
        if expected is not None and expected != stored:
            raise TranscriptMismatch(
                len(stored) // TOKEN_BYTES,
                len(expected) // TOKEN_BYTES,
                common_tokens(stored, expected),
            )
        return stored, salt

    def answered(self, request: Request, tokens: bytes | None) -> None:
        """A turn has ended, with ``tokens`` as its context; None: it failed, nothing changes."""
        session = request.session
        if session is None:
            return
        with self._lock:
            if session.request is request:
                session.request = None
                if tokens is not None:
                    session.tokens, session.salt = tokens, request.options.cache_salt

    def remove(self, session_id: Hashable) -> Session | None:
        """Forget a session; a turn that is running goes on without it."""
        with self._lock:
            return self._sessions.pop(session_id, None)

    def knows(self, session: Session) -> bool:
        """Whether it has not been ended."""
        with self._lock:
            return self._sessions.get(session.id) is session

    def __len__(self) -> int:
        return len(self._sessions)


def _busy(session_id: Hashable) -> StickyBusy:
    return StickyBusy(
        f"a request of session {session_id!r} is running; wait for its end, or cancel it"
    )

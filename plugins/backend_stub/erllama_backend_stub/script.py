"""Scripted replies: a continuation that follows from the tokens of a context alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from erllama_backend_stub.template import EMPTY_THINKING
from erllama_backend_stub.vocabulary import IM_END, tape_of

_EMPTY_THINKING: Final = tape_of(EMPTY_THINKING, parse_special=True)


class Script:
    """Says which token must come next, if the script knows. Thread-safe.

    Each occurrence of the marker opens a turn, and the last one is the turn being spoken. If
    what follows it is the beginning of that turn's reply, the next token is the reply's next,
    or ``<|im_end|>`` after its last. Otherwise somebody else speaks (the user, a reply that
    was altered) and the script has nothing to say. A context in which the marker never
    occurs is unscripted.

    Nothing is remembered between calls, so however a context came about, its continuation is
    the same. Where a reply has the character ``free``, the script leaves one token open.
    """

    def __init__(self, replies: Sequence[str], marker: str, free: str = "") -> None:
        self._replies = tuple(tape_of(reply, parse_special=True) for reply in replies)
        self._free = free
        self._marker = tape_of(marker, parse_special=True)
        for reply in self._replies:
            if self._marker in reply:
                raise ValueError("a reply of the script contains the reply_marker")

    def next_token(self, tape: str) -> int | None:
        """The token that must follow ``tape`` (see ``vocabulary``); None: not scripted."""
        at = tape.rfind(self._marker)
        if at < 0 or not self._replies:
            return None
        turn = tape.count(self._marker, 0, at)
        reply = self._replies[min(turn, len(self._replies) - 1)]
        said = tape[at + len(self._marker) :].removeprefix(_EMPTY_THINKING)
        if not self._fits(said, reply):
            return None
        if len(said) == len(reply):
            return IM_END
        following = reply[len(said)]
        return None if following == self._free else ord(following)

    def _fits(self, said: str, reply: str) -> bool:
        """Whether a reply may begin with what was said."""
        if not self._free or self._free not in reply:
            return reply.startswith(said)
        return len(said) <= len(reply) and all(
            token in (told, self._free) for told, token in zip(said, reply, strict=False)
        )

"""What other threads want of a runner, in the order in which they asked."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from erllama_core.model.runner import Runner

Message = Callable[["Runner"], None]
"""Something to do between two ticks. It is given the runner that does it, which need not be the
one that was asked: another may have taken over."""


class Inbox:
    """Messages from any thread to one. Posting takes no lock, so that finalisers may."""

    def __init__(self) -> None:
        self._messages: Final[queue.SimpleQueue[Message]] = queue.SimpleQueue()
        self._heir: Inbox | None = None

    def post(self, message: Message) -> None:
        """Have something done. Any thread."""
        self._messages.put(message)
        heir = self._heir
        if heir is not None:  # whoever read this one does so no longer
            self._forward(heir)

    def take(self, timeout_s: float | None) -> Message | None:
        """The next message, waited for; None when time ran out."""
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def take_now(self) -> Message | None:
        """The next message, if there is one."""
        if self._messages.empty():  # as it is between most ticks: cheaper than an exception
            return None
        try:
            return self._messages.get_nowait()
        except queue.Empty:
            return None

    @property
    def is_empty(self) -> bool:
        return self._messages.empty()

    def bequeath(self, heir: Inbox) -> None:
        """What is here, and whatever still comes, is another one's."""
        self._heir = heir
        self._forward(heir)

    def _forward(self, heir: Inbox) -> None:
        while (message := self.take_now()) is not None:
            heir.post(message)

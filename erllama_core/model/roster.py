"""The requests that a runner has: those with a sequence, and those that wait for one."""

from __future__ import annotations

from collections import deque
from typing import Final

from erllama_core.model.request import Request


class Roster:
    """Who runs and who waits. The worker's alone; other threads may look at copies."""

    def __init__(self) -> None:
        self.active: Final[list[Request]] = []
        """They have a sequence, in the order in which they got it."""
        self.waiting: Final[deque[Request]] = deque()
        """They wait for one, in the order in which they will get it."""

    def enter(self, request: Request) -> None:
        """A request waits, behind all others."""
        self.waiting.append(request)

    def admit(self, request: Request) -> None:
        """A request that waited runs."""
        self.waiting.remove(request)
        self.active.append(request)

    def suspend(self, request: Request) -> None:
        """A request that ran waits again, before all that came after it."""
        self.active.remove(request)
        place = 0
        for other in self.waiting:
            if not other.order or other.order > request.order:
                break
            place += 1
        self.waiting.insert(place, request)

    def discard(self, request: Request) -> bool:
        """A request is over; whether it ran."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request not in self.active:
            return False
        self.active.remove(request)
        return True

    def hand_over_to(self, other: Roster) -> None:
        """Those that wait will be another runner's."""
        other.waiting.extend(self.waiting)
        self.waiting.clear()

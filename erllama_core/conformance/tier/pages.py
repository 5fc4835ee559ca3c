"""What a tier promises that keeps pages: tests of the kit."""

from __future__ import annotations

from typing import Final

import pytest

from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.looking import read
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.errors import BlockNotFound, TierFull
from erllama_core.interfaces.tier import KeepsPages


class PagesPromises(TierKit):
    """What a tier promises that keeps pages."""

    def test_pages_are_kept_uncopied(self, subject: TierSubject) -> None:
        """KeepsPages: pages are retained while they are stored, and lent to whoever borrows.

        If this fails: memory is freed under a restore, or never given back to the system.
        """
        tier = subject.open(50_000)
        try:
            if not isinstance(tier, KeepsPages):
                return
            thing = make_object(1, 1000)
            pages = CountedPages(thing.payload)
            tier.keep(thing.object_id, thing.head, pages)
            assert pages.references == 2, "the tier has a reference of its own"
            tier.keep(thing.object_id, thing.head, pages)
            assert pages.references == 2, "keeping it again is harmless"
            borrowed = tier.borrow(thing.object_id)
            assert pages.references == 3
            assert bytes(borrowed.view) == thing.payload
            assert read(tier, thing.object_id) == thing.data
            assert tier.delete(thing.object_id) == thing.size
            assert pages.references == 2, "what is borrowed outlives the object"
            borrowed.release()
            assert pages.references == 1
            with pytest.raises(BlockNotFound):
                tier.borrow(thing.object_id)
            too_large = CountedPages(bytes(100_000))
            with pytest.raises(TierFull):
                tier.keep(make_object(2).object_id, thing.head, too_large)
            assert too_large.references == 1, "what was refused is not retained"
            tier.keep(thing.object_id, thing.head, pages)
        finally:
            tier.close()
        assert pages.references == 1, "closing gives back everything"


class CountedPages:
    """Pages that know how many references there are."""

    def __init__(self, data: bytes) -> None:
        self.view: Final = memoryview(data)
        self.references = 1

    def retain(self) -> None:
        """One more."""
        self.references += 1

    def release(self) -> None:
        """One less."""
        self.references -= 1

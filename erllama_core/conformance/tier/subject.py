"""What is tested: a tier, by how it is opened; and what every test of it begins with."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Protocol

import attrs
import pytest

from erllama_core.conformance.kit import ConformanceKit
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import Tier


class RawStore(Protocol):
    """A way to a tier's store that goes past the tier, as other programs have one."""

    def read(self, object_id: ObjectId) -> bytes | None:
        """What is stored under a name; None when nothing is."""
        ...

    def write(self, object_id: ObjectId, data: bytes) -> None:
        """Store something, or put it in place of what is there."""
        ...

    def remove(self, object_id: ObjectId) -> None:
        """Take it away."""
        ...


@attrs.frozen(kw_only=True)
class TierSubject:
    """A tier to be tested."""

    open: Callable[[int | None], Tier] = attrs.field(kw_only=False)
    """Opens the store, with a quota in bytes or none: the same store each time within one test,
    empty at first. The test closes what it has opened."""
    survives_close: bool
    """Whether another tier that is opened on the store later finds what was stored."""
    enforces_quota: bool = True
    """Whether the store keeps to the quota it is opened with by itself."""
    raw: RawStore | None = None
    """Another way to the same store; without one, what goes behind the tier is not tested."""


class TierKit(ConformanceKit, abc.ABC):
    """The fixtures of every test of a tier."""

    @pytest.fixture
    @abc.abstractmethod
    def subject(self) -> TierSubject:
        """What is tested."""

    @pytest.fixture
    def tier(self, subject: TierSubject) -> Iterator[Tier]:
        tier = subject.open(None)
        yield tier
        tier.close()

"""Reading every object whole, and checking it as a restore would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.cache.tiers import NamedTier
from erllama_core.cli.cache_survey import Stored, survey
from erllama_core.errors import BlockNotFound, CacheError, CorruptBlock, UnknownFormat
from erllama_core.interfaces.block import ObjectId, verify_object
from erllama_core.interfaces.tier import ScanFailure

Delete = Callable[[NamedTier, ObjectId], bool]
"""Removes a damaged object; whether it is gone."""


@attrs.frozen(kw_only=True)
class Finding:
    """An object that could not be found whole."""

    tier: str
    kind: str
    key: str
    start: int
    size_bytes: int
    location: str
    reason: str
    deleted: bool = False


@attrs.frozen(kw_only=True)
class Failure:
    """Something in a tier that is no object, or cannot be looked at."""

    tier: str
    location: str
    reason: str


class Verification:
    """Checks tiers one after another, and keeps what it found."""

    def __init__(self, delete: Delete | None = None) -> None:
        self._delete: Final = delete
        self._buffer = bytearray()
        self.intact = 0
        self.intact_bytes = 0
        self.vanished = 0
        """Objects that were removed by somebody else while tiers were being checked."""
        self.damaged: Final[list[Finding]] = []
        self.unreadable: Final[list[Finding]] = []
        self.unknown_format: Final[list[Finding]] = []
        self.scan_failures: Final[list[Failure]] = []

    @property
    def ok(self) -> bool:
        """Whether everything in the tiers is an object, and whole or of another version."""
        return not (self.damaged or self.unreadable or self.scan_failures)

    def collect(self, named: NamedTier) -> list[tuple[ObjectId, int]]:
        """The objects of a tier that are to be read, with their sizes in bytes.

        Those whose headers are damaged are found here already. Raises TierError.
        """
        to_read = []
        for found in survey(named):
            if isinstance(found, ScanFailure):
                self.scan_failures.append(
                    Failure(tier=named.name, location=found.location, reason=found.reason)
                )
            elif found.state == "ok":
                to_read.append((found.object_id, found.size_bytes))
            else:
                self._note(named, found)
        return to_read

    def check(self, named: NamedTier, object_id: ObjectId, size_bytes: int) -> None:
        """Read one object whole and note what it is."""
        try:
            data = named.tier.read(object_id, self._allocate)
            verify_object(data, object_id)
        except BlockNotFound:
            self.vanished += 1
        except UnknownFormat as error:  # replaced by another erllama since it was collected
            self.unknown_format.append(_finding(named, object_id, size_bytes, error.reason))
        except CorruptBlock as error:
            self._note_damaged(named, object_id, size_bytes, error.reason)
        except (CacheError, OSError) as error:
            self.unreadable.append(_finding(named, object_id, size_bytes, str(error)))
        else:
            self.intact += 1
            self.intact_bytes += len(data)

    def _note(self, named: NamedTier, found: Stored) -> None:
        reason = found.problem or ""
        if found.state == "damaged":
            self._note_damaged(named, found.object_id, found.size_bytes, reason)
        else:
            finding = _finding(named, found.object_id, found.size_bytes, reason)
            self.unknown_format.append(finding)

    def _note_damaged(
        self, named: NamedTier, object_id: ObjectId, size_bytes: int, reason: str
    ) -> None:
        # At once: whoever finds it damaged too may store it again, and that is to stay.
        deleted = self._delete is not None and self._delete(named, object_id)
        finding = _finding(named, object_id, size_bytes, reason)
        self.damaged.append(attrs.evolve(finding, deleted=deleted))

    def _allocate(self, size: int) -> memoryview:
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]


def _finding(named: NamedTier, object_id: ObjectId, size_bytes: int, reason: str) -> Finding:
    return Finding(
        tier=named.name,
        kind=object_id.kind.value,
        key=object_id.key.hex(),
        start=object_id.start,
        size_bytes=size_bytes,
        location=named.tier.location(object_id),
        reason=reason,
    )

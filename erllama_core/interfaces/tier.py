"""What a cache tier is: a store of byte objects under their names.

A tier knows no model and no tokens. It stores what it is given, gives back exactly that or
raises, and never decides what to drop: the core chooses victims and calls ``delete``. The
core also checks length, checksum and identity of everything that comes back, so a tier need
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import attrs

from erllama_core.interfaces.block import Bytes, ObjectId

Allocate = Callable[[int], memoryview]
"""Gives a writable memoryview of exactly so many bytes; the caller of ``read`` owns it."""


@attrs.frozen
class TierUsage:
    """How full a tier is."""

    used_bytes: int
    quota_bytes: int | None
    """None: bounded only by the device."""


@attrs.frozen
class ScannedObject:
    """One object found by :meth:`Tier.scan`."""

    object_id: ObjectId
    head: bytes
    """The object's first bytes, at least its whole header (``block.header_length``)."""
    size_bytes: int
    """Of the whole object as it is stored, which a damaged one may contradict."""
    last_used_ns: int
    """Wall clock, nanoseconds since the epoch: when it was last used, as far as known."""


@attrs.frozen
class ScanFailure:
    """Something in the store that is not an object; ``location`` is for a person."""

    location: str
    reason: str


@attrs.frozen
class FoundObject:
    """What :meth:`Shared.find` tells of an object without reading it."""

    size_bytes: int
    last_used_ns: int
    """Wall clock, nanoseconds since the epoch: when it was last used, as far as known."""


@attrs.frozen
class Gone:
    """An object that :meth:`Shared.rescan` found to be there no longer."""

    object_id: ObjectId


class Tier(Protocol):
    """A store of byte objects. Every method is called from several threads at once.

    Methods may block (writer, loader and scan threads call them, a model's worker never
    does). A failure is a ``TierError``; ``OSError`` from a careless tier is treated as one.
    """

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        """Store the concatenation of ``parts`` under ``object_id``, all or nothing.

        Storing a name again is harmless: equal names have equal contents. ``parts`` are not
        kept after the call. ``durable``: return only when a power cut cannot lose it, where
        the tier can promise that. Raises TierFull when there is no room, TierError otherwise.
        """
        ...

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        """Fill a buffer from ``allocate`` with the whole object and return that buffer.

        ``allocate`` is called once, with the object's size, and not before the object is
        known to exist. Raises BlockNotFound, TierError.
        """
        ...

    def delete(self, object_id: ObjectId) -> int:
        """Remove the object; the bytes freed, 0 when it was not there. Raises TierError."""
        ...

    def contains(self, object_id: ObjectId) -> bool:
        """Whether the object is there now; cheap (one ``stat``). Raises TierError."""
        ...

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        """Every stored object once, in any order, with its header.

        Objects that come or go during the scan may be missed. What cannot be read is a
        ScanFailure, never an exception that ends the scan.
        """
        ...

    def usage(self) -> TierUsage:
        """Bytes stored and the limit; O(1), no I/O."""
        ...

    def location(self, object_id: ObjectId) -> str:
        """Where the object is or would be, for a person: a path, a key."""
        ...

    def close(self) -> None:
        """Give back every resource. Idempotent; stored objects stay."""
        ...


class Pages(Protocol):
    """Reference-counted pages of the core that hold one payload.

    Made with one reference. ``view`` is valid while the holder has a reference.
    """

    @property
    def view(self) -> memoryview: ...

    def retain(self) -> None: ...

    def release(self) -> None: ...


@runtime_checkable
class KeepsPages(Protocol):
    """Optional ability of a tier in this process's memory: keep the core's pages, uncopied.

    A tier that has it is never asked to ``put`` by the writer, and its objects are used
    without a read or a checksum, since they never left the process.
    """

    def keep(self, object_id: ObjectId, head: bytes, pages: Pages) -> None:
        """Keep ``pages`` (payload) and ``head`` (header) under ``object_id``.

        The tier retains the pages and releases them on ``delete``. Keeping a name again is
        harmless. Raises TierFull.
        """
        ...

    def borrow(self, object_id: ObjectId) -> Pages:
        """The payload's pages, retained for the caller, who must release them.

        Raises BlockNotFound. O(1): a model's worker calls it.
        """
        ...


@runtime_checkable
class ChangesQuota(Protocol):
    """Optional ability: take another quota while it is open.

    Of a tier whose options have a key ``quota_bytes``.
    """

    def set_quota(self, quota_bytes: int | None) -> None:
        """From now on ``quota_bytes`` is what the option would have said; None: not given.

        What is stored beyond a smaller quota stays: the core asks to delete it. Does not block.
        """
        ...


@runtime_checkable
class RecordsPins(Protocol):
    """Optional ability: remember which contexts are pinned, for later and for other processes.

    A pin is a key of 32 bytes, and nothing more to the tier: the core knows which objects it
    protects, and asks to delete none of them while there is anything else.
    """

    def record_pin(self, key: bytes) -> None:
        """Remember a pin. One that is there already stays. May block. Raises TierError."""
        ...

    def erase_pin(self, key: bytes) -> None:
        """Forget a pin; harmless when it is not there. May block. Raises TierError."""
        ...

    def pins(self) -> Iterable[bytes]:
        """Every recorded pin, whoever recorded it. May block. Raises TierError."""
        ...


@runtime_checkable
class MakesDurable(Protocol):
    """Optional ability of a tier that outlives this process: make durable what it has stored.

    ``put`` with ``durable=True`` is for what is known to matter when it is stored. This is
    for what turns out to matter later: the beginning of a context that was finished.
    """

    @property
    def outlives_power(self) -> bool:
        """Whether a power cut leaves what was made durable. False: it is gone by a restart of
        the machine, as on a tmpfs, and what should last is stored in another tier as well.
        """
        ...

    def make_durable(self, object_ids: Sequence[ObjectId]) -> None:
        """Return when a power cut cannot lose these objects; those that are gone are skipped.

        May block. Raises TierError.
        """
        ...


@runtime_checkable
class Shared(Protocol):
    """Optional ability of a tier whose store other processes use at the same time.

    One of them is the store's janitor: it alone keeps the store to its quota by itself. The
    others store beyond the quota if need be, within bounds that the tier states.
    """

    @property
    def rescan_interval_s(self) -> float:
        """Seconds between two calls of ``rescan``; 0: the core never calls it."""
        ...

    def lead(self) -> bool:
        """Whether this process is the store's janitor; becomes it when nobody is.

        Never waits for another process. Asked again each time, so a tier may lose it and say
        so. Always False for a tier that was opened read-only. Raises TierError.
        """
        ...

    def find(self, object_id: ObjectId) -> FoundObject | None:
        """What can be told of an object by one ``stat``; None when it is not there.

        Raises TierError.
        """
        ...

    def rescan(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        """What other processes stored or removed since the last ``scan`` or ``rescan``.

        Cheap when nothing changed. What this process stored or deleted itself may be left out.
        An object may be told twice, and what comes or goes meanwhile only the next time. What
        cannot be read is a ScanFailure, never an exception that ends it.
        """
        ...

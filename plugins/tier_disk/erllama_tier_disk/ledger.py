"""The bytes that a store holds, as far as this process knows, and what is promised to writers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from erllama_core.errors import TierFull
from erllama_core.interfaces.block import ObjectId

_SHARE_BEYOND: Final = 8
"""A process that is not the janitor stores up to the quota and an eighth of it."""


class Ledger:
    """Sizes by object and their sum.

    A size for each object, rather than a sum alone, keeps the sum right when an object is
    stored twice, is found again by a scan, or was removed by another process.

    Whoever changes it holds ``lock``, and holds it while a name comes or goes together with its
    entry here, so that the sum is exact whichever of two threads is first; never while an
    object's bytes are moved.
    """

    def __init__(self, quota_bytes: int | None) -> None:
        self.lock = threading.Lock()
        self._quota = quota_bytes
        self._sizes: tuple[dict[ObjectId, int], ...] = tuple({} for _ in range(256))
        """By the first byte of the key, as the folders are."""
        self._untold: set[ObjectId] = set()
        """Objects that were met by a read; no scan has listed them yet."""
        self._used = 0
        self._reserved = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def quota_bytes(self) -> int | None:
        return self._quota

    def set_quota(self, quota_bytes: int | None) -> None:
        """From the next promise on, another quota holds."""
        self._quota = quota_bytes

    def first_bytes(self) -> set[int]:
        """First bytes of the keys of all that has a size."""
        return {first for first, sizes in enumerate(self._sizes) if sizes}

    def objects(self, first_byte: int) -> set[ObjectId]:
        """Every object that has a size and a key that begins so."""
        return set(self._sizes[first_byte])

    def size(self, object_id: ObjectId) -> int | None:
        """The recorded size, None if there is none; safe without the lock."""
        return self._sizes[object_id.key[0]].get(object_id)

    def is_told(self, object_id: ObjectId) -> bool:
        """Whether the object was stored here or listed by a scan; safe without the lock."""
        return self.size(object_id) is not None and object_id not in self._untold

    def reserve(self, object_id: ObjectId, size: int, leads: Callable[[], bool]) -> None:
        """Promise room to a writer, who must ``cancel`` or ``commit``. Raises TierFull.

        ``leads``: whether this process is the janitor, asked when the quota would be passed.
        """
        if self._quota is not None:
            after = self._used - (self.size(object_id) or 0) + self._reserved + size
            limit = self._quota
            if after > limit and not leads():
                limit += limit // _SHARE_BEYOND
            if after > limit:
                raise TierFull(
                    f"{size} bytes do not fit: {self._used} of quota_bytes={self._quota} are "
                    f"used and {self._reserved} promised to other writers"
                )
        self._reserved += size

    def cancel(self, size: int) -> None:
        """The writer gave up."""
        self._reserved -= size

    def commit(self, object_id: ObjectId, size: int) -> None:
        """The writer published the object."""
        self._reserved -= size
        self.record(object_id, size)

    def record(self, object_id: ObjectId, size: int, *, told: bool = True) -> None:
        """The object is there, and this large; ``told`` is False when a read met it."""
        sizes = self._sizes[object_id.key[0]]
        if told:
            self._untold.discard(object_id)
        elif object_id not in sizes:
            self._untold.add(object_id)
        self._used += size - sizes.get(object_id, 0)
        sizes[object_id] = size

    def forget(self, object_id: ObjectId) -> None:
        """The object is not there."""
        self._used -= self._sizes[object_id.key[0]].pop(object_id, 0)
        self._untold.discard(object_id)

    def restart_after_fork(self) -> None:
        """Drop the promises to the parent's writers; mend a sum caught in the middle.

        The thread that held the lock, or was writing, does not exist in the child.
        """
        self.lock = threading.Lock()
        self._used = sum(sum(sizes.values()) for sizes in self._sizes)
        self._reserved = 0

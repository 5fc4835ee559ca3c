"""The bytes that a store holds, as far as this process knows, and what is promised to writers."""

from __future__ import annotations

from erllama_core.errors import TierFull
from erllama_core.interfaces.block import ObjectId


class Ledger:
    """Sizes by object and their sum. Not thread-safe: the store's lock guards it.

    A size for each object, rather than a sum alone, keeps the sum right when an object is
    stored twice, is found again by a scan, or was removed by another process.
    """

    def __init__(self, quota_bytes: int | None) -> None:
        self._quota = quota_bytes
        self._sizes: dict[ObjectId, int] = {}
        self._used = 0
        self._reserved = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def quota_bytes(self) -> int | None:
        return self._quota

    def objects(self) -> set[ObjectId]:
        """Every object that has a size."""
        return set(self._sizes)

    def size(self, object_id: ObjectId) -> int | None:
        """The recorded size, None if there is none; safe without the lock."""
        return self._sizes.get(object_id)

    def reserve(self, object_id: ObjectId, size: int) -> None:
        """Promise room to a writer, who must ``cancel`` or ``commit``. Raises TierFull."""
        if self._quota is not None:
            after = self._used - self._sizes.get(object_id, 0) + self._reserved + size
            if after > self._quota:
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

    def record(self, object_id: ObjectId, size: int) -> None:
        """The object is there, and this large."""
        self._used += size - self._sizes.get(object_id, 0)
        self._sizes[object_id] = size

    def forget(self, object_id: ObjectId) -> None:
        """The object is not there."""
        self._used -= self._sizes.pop(object_id, 0)

    def restart_after_fork(self) -> None:
        """Drop the promises to the parent's writers; mend a sum caught in the middle."""
        self._used = sum(self._sizes.values())
        self._reserved = 0

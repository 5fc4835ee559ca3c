"""Learning what is in a store: all of it, or what changed since the last time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from erllama_core.errors import TierError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Gone, ScanFailure, ScannedObject
from erllama_tier_disk.janitor import JanitorLock
from erllama_tier_disk.layout import OBJECTS, object_path
from erllama_tier_disk.ledger import Ledger
from erllama_tier_disk.walk import (
    NotAFile,
    ObjectFile,
    Shard,
    TemporaryFile,
    list_files,
    list_shards,
    open_regular,
    read_head,
)

_SETTLED_NS: Final = 3 * 1_000_000_000
"""A folder that changed this recently may change again without a new modification time: its
resolution is a tick of the kernel's clock at best, and two seconds at worst (FAT)."""

log = get_logger("erllama_tier_disk.store")


class Survey:
    """Scans and rescans of one root.

    A rescan looks into those folders only whose modification time is another than when they
    were last listed; every file that comes, goes or is renamed in a folder changes it.
    """

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        janitor: JanitorLock,
    ) -> None:
        self._root: Final = root
        self._ledger: Final = ledger
        self._janitor: Final = janitor
        self._closed = False
        self._listed_ns: dict[int, int] = {}
        """Modification times of folders of which all is known, by their first byte."""

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        """Every object. Ends early, without an error, when the tier is closed meanwhile."""
        self._listed_ns.clear()
        for found in self._look_through(everything=True):
            if not isinstance(found, Gone):
                yield found

    def rescan(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        """What others changed since. Ends as early as a scan."""
        return self._look_through(everything=False)

    def close(self) -> None:
        """End what is under way."""
        self._closed = True

    def _look_through(self, *, everything: bool) -> Iterator[ScannedObject | ScanFailure | Gone]:
        sweep = _Sweep(self._janitor)
        objects = self._root / OBJECTS
        missing = self._ledger.first_bytes()
        readable = True
        for shard in list_shards(objects):
            if self._closed:
                return
            if isinstance(shard, ScanFailure):
                readable = readable and shard.location != str(objects)
                yield shard
                continue
            missing.discard(shard.first_byte)
            yield from self._look_into(shard, sweep, everything=everything)
        for first_byte in missing if readable else ():
            self._listed_ns.pop(first_byte, None)
            yield from self._lost(self._ledger.objects(first_byte))
        sweep.report(self._root)

    def _look_into(
        self, shard: Shard, sweep: _Sweep, *, everything: bool
    ) -> Iterator[ScannedObject | ScanFailure | Gone]:
        # Before the listing: what comes during it makes another time.
        changed_ns = _modified_ns(shard.path)
        if not everything and changed_ns == self._listed_ns.get(shard.first_byte):
            return
        settled = changed_ns is not None and changed_ns < time.time_ns() - _SETTLED_NS
        unseen = self._ledger.objects(shard.first_byte)
        for found in list_files(shard):
            if self._closed:
                return
            match found:
                case ObjectFile(object_id=object_id):
                    unseen.discard(object_id)
                    if everything or not self._ledger.is_told(object_id):
                        scanned = self._look_at(found)
                        if scanned is not None:
                            yield scanned
                        settled = settled and isinstance(scanned, ScannedObject)
                case TemporaryFile():
                    settled = False  # its writer may die, which changes nothing in the folder
                    failure = sweep.remove(found)
                    if failure is not None:
                        yield failure
                case ScanFailure():
                    settled = settled and found.location != shard.path
                    yield found
        yield from self._lost(unseen)
        if settled and changed_ns is not None:
            self._listed_ns[shard.first_byte] = changed_ns
        else:
            self._listed_ns.pop(shard.first_byte, None)

    def _look_at(self, found: ObjectFile) -> ScannedObject | ScanFailure | None:
        """None: it vanished."""
        try:
            fd, status = open_regular(found.path)
            try:
                head = read_head(fd)
                self.record(found.object_id, fd, status.st_size, told=True)
            finally:
                os.close(fd)
        except FileNotFoundError:
            self.forget_if_gone(found.object_id)
            return None
        except NotAFile as error:
            return ScanFailure(found.path, str(error))
        except OSError as error:
            return ScanFailure(found.path, error.strerror or str(error))
        return ScannedObject(found.object_id, head, status.st_size, status.st_mtime_ns)

    def _lost(self, unseen: set[ObjectId]) -> Iterator[Gone]:
        for object_id in unseen:
            if self.forget_if_gone(object_id):
                yield Gone(object_id)

    # ------------------------------------------------------------- accounting

    def record(self, object_id: ObjectId, fd: int, size: int, *, told: bool) -> None:
        """Note the size of a file that was found; nothing to do for most. Raises OSError."""
        ledger = self._ledger
        if ledger.size(object_id) == size and (not told or ledger.is_told(object_id)):
            return
        with ledger.lock:
            status = os.fstat(fd)
            # No links: deleted or replaced since it was opened, and the ledger knows.
            if status.st_nlink:
                ledger.record(object_id, status.st_size, told=told)

    def forget_if_gone(self, object_id: ObjectId) -> bool:
        """Another process removed the file, unless a thread of ours has just stored it again."""
        if self._ledger.size(object_id) is None:
            return False
        with self._ledger.lock:
            try:
                object_path(self._root, object_id).lstat()
            except (FileNotFoundError, NotADirectoryError):
                self._ledger.forget(object_id)
                return True
            except OSError:
                pass  # it cannot be seen, so it may still take room
            return False


class _Sweep:
    """Removes what killed writers left behind, if this process is the janitor."""

    def __init__(self, janitor: JanitorLock) -> None:
        self._janitor: Final = janitor
        self._files = self._bytes = 0

    def remove(self, found: TemporaryFile) -> ScanFailure | None:
        """Why the file could not be removed; None also when it stays for its writer."""
        try:
            if not self._janitor.take():
                return None
        except TierError:
            return None  # it stays until that can be known
        path = Path(found.path)
        try:
            status = path.lstat()
            if found.owner.may_live(time.time() - status.st_mtime):
                return None
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            return ScanFailure(found.path, f"leftover: {error.strerror or error}")
        self._files += 1
        self._bytes += status.st_size
        return None

    def report(self, root: Path) -> None:
        """Log what was removed."""
        if self._files:
            log.info("tier.swept", root=str(root), files=self._files, size_bytes=self._bytes)


def _modified_ns(folder: str) -> int | None:
    try:
        return os.stat(folder, follow_symlinks=False).st_mtime_ns  # noqa: PTH116 - no Path needed
    except OSError:
        return None

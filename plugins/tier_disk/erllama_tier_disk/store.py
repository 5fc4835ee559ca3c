"""The tier: one file per object below a root."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from erllama_core.errors import BlockNotFound, TierError
from erllama_core.interfaces.block import Bytes, ObjectId
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import (
    Allocate,
    FoundObject,
    Gone,
    ScanFailure,
    ScannedObject,
    TierUsage,
)
from erllama_tier_disk.failure import tier_error
from erllama_tier_disk.folders import absolute_root, create_private, make_private, open_root
from erllama_tier_disk.janitor import JanitorLock
from erllama_tier_disk.layout import JANITOR_LOCK, PINS, object_path, temporary_name
from erllama_tier_disk.ledger import Ledger
from erllama_tier_disk.pins import erase_pin, list_pins, record_pin
from erllama_tier_disk.survey import Survey
from erllama_tier_disk.transfer import read_into, sync_directory, sync_file, write_all
from erllama_tier_disk.walk import NotAFile, open_regular

_USE_RESOLUTION_NS: Final = 60 * 1_000_000_000
"""A file's time of last use is written when it is off by more than this, as relatime does."""
_CREATE_ATTEMPTS: Final = 3

log = get_logger(__name__)


class FileTier:
    """Objects as files; see ``Tier`` for what its methods promise. Thread-safe, fork-safe.

    Any number of processes may share a root: a file appears whole, by a rename, and equal
    names mean equal contents. A file's modification time is when it was last used. Raises
    TierError from the constructor when the root cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        read_only: bool = False,
        outlives_power: bool = True,
        rescan_interval_s: float = 30.0,
    ) -> None:
        self.outlives_power: Final = outlives_power
        self._root = absolute_root(root)
        self._read_only = read_only
        self._closed = False
        self._rescan_interval_s = rescan_interval_s
        self._ledger = Ledger(quota_bytes)
        self._janitor = JanitorLock(self._root / JANITOR_LOCK, may_take=not read_only)
        self._survey = Survey(self._root, self._ledger, self._janitor)
        self._anchored: set[Path] = set()
        open_root(self._root, read_only=read_only)
        _tiers.add(self)

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        """Store an object, also over a file that is there: that one may be damaged."""
        self._require_writable(object_id)
        size = sum(len(part) for part in parts)
        path = object_path(self._root, object_id)
        with self._ledger.lock:
            self._ledger.reserve(object_id, size, self.lead)
        try:
            temporary, fd = self._create_temporary(path.parent)
            try:
                try:
                    write_all(fd, parts)
                    if durable:
                        sync_file(fd)
                finally:
                    os.close(fd)
                with self._ledger.lock:
                    temporary.replace(path)
                    self._ledger.commit(object_id, size)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except BaseException as error:
            with self._ledger.lock:
                self._ledger.cancel(size)
            if isinstance(error, OSError):
                raise tier_error("store", path, error) from error
            raise
        if durable:
            try:
                self._anchor(path.parent)
            except OSError as error:
                raise tier_error("make durable", path, error) from error

    def make_durable(self, object_ids: Sequence[ObjectId]) -> None:
        """Sync files that are there, then each folder that they are in, once."""
        folders: dict[Path, None] = {}
        for object_id in object_ids:
            self._require_writable(object_id)
            path = object_path(self._root, object_id)
            try:
                fd, _ = open_regular(path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # evicted meanwhile
            except NotAFile as error:
                raise TierError(f"cannot sync {path}: {error}; move it away") from error
            except OSError as error:
                raise tier_error("make durable", path, error) from error
            try:
                sync_file(fd)
            except OSError as error:
                raise tier_error("make durable", path, error) from error
            finally:
                os.close(fd)
            folders[path.parent] = None
        for folder in folders:
            try:
                self._anchor(folder)
            except FileNotFoundError:
                continue  # removed meanwhile, with all that was in it
            except OSError as error:
                raise tier_error("make durable", folder, error) from error

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        """Read an object into a buffer of the caller's."""
        self._require_open(object_id)
        path = object_path(self._root, object_id)
        try:
            fd, status = open_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._survey.forget_if_gone(object_id)
            raise BlockNotFound(f"{path} is not there") from error
        except NotAFile as error:
            raise TierError(f"cannot read {path}: {error}; move it away") from error
        except OSError as error:
            raise tier_error("read", path, error) from error
        try:
            buffer = allocate(status.st_size)
            try:
                done = read_into(fd, buffer)
                self._survey.record(object_id, fd, status.st_size, told=False)
            except OSError as error:
                raise tier_error("read", path, error) from error
            if done < len(buffer):
                raise TierError(
                    f"cannot read {path}: it was cut from {len(buffer)} to {done} bytes meanwhile"
                )
            self._note_use(fd, status)
        finally:
            os.close(fd)
        return buffer

    def delete(self, object_id: ObjectId) -> int:
        """Remove an object's file."""
        self._require_writable(object_id)
        path = object_path(self._root, object_id)
        with self._ledger.lock:
            try:
                size = path.lstat().st_size
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                size = 0
            except OSError as error:
                raise tier_error("delete", path, error) from error
            self._ledger.forget(object_id)
        return size

    def contains(self, object_id: ObjectId) -> bool:
        """Whether a file of that name is there; what is in it is not looked at."""
        return self._status(object_id) is not None

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        """List the store; the janitor also removes what killed writers left behind.

        A file under an object's name is a ScannedObject even when its content is damaged, so
        that it can be deleted by that name; its ``head`` is then what there is. Ends early,
        without an error, when the tier is closed meanwhile.
        """
        self._require_open(None)
        return self._survey.scan()

    def usage(self) -> TierUsage:
        """The size of all files that this process has written, read or scanned.

        What other processes write counts from the next scan or read of it.
        """
        return TierUsage(self._ledger.used_bytes, self._ledger.quota_bytes)

    def set_quota(self, quota_bytes: int | None) -> None:
        """Promise no more than this from now on."""
        with self._ledger.lock:
            self._ledger.set_quota(quota_bytes)

    def location(self, object_id: ObjectId) -> str:
        """The object's path."""
        return str(object_path(self._root, object_id))

    def close(self) -> None:
        """Refuse everything from now on; calls that are under way end normally."""
        self._closed = True
        self._survey.close()
        self._janitor.close()

    # -------------------------------------------------------- for other processes

    @property
    def rescan_interval_s(self) -> float:
        """As the configuration says."""
        return self._rescan_interval_s

    def lead(self) -> bool:
        """Whether this store has the root's janitor lock; takes it when it is free."""
        return self._janitor.take()

    def find(self, object_id: ObjectId) -> FoundObject | None:
        """What the object's file says of itself; what is in it is not looked at."""
        status = self._status(object_id)
        return None if status is None else FoundObject(status.st_size, status.st_mtime_ns)

    def rescan(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        """What others changed in folders whose modification time says that something did."""
        self._require_open(None)
        return self._survey.rescan()

    def record_pin(self, key: bytes) -> None:
        """Keep a pin as a file in the root."""
        self._require_writable(f"the pin {key.hex()}")
        record_pin(self._root / PINS, key)

    def erase_pin(self, key: bytes) -> None:
        """Remove a pin's file."""
        self._require_writable(f"the pin {key.hex()}")
        erase_pin(self._root / PINS, key)

    def pins(self) -> list[bytes]:
        """The keys of all pins' files."""
        self._require_open(None)
        return list_pins(self._root / PINS)

    def _status(self, object_id: ObjectId) -> os.stat_result | None:
        """Of the object's file; None if there is none."""
        self._require_open(object_id)
        path = object_path(self._root, object_id)
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise tier_error("look for", path, error) from error
        return status if stat.S_ISREG(status.st_mode) else None

    # ---------------------------------------------------------------- reading

    def _note_use(self, fd: int, status: os.stat_result) -> None:
        # The distance, not the age: after the clock was set back, times lie in the future.
        if self._read_only or abs(time.time_ns() - status.st_mtime_ns) < _USE_RESOLUTION_NS:
            return
        with contextlib.suppress(OSError):
            os.utime(fd)

    # ---------------------------------------------------------------- writing

    def _create_temporary(self, folder: Path) -> tuple[Path, int]:
        """A new file beside its target. Raises OSError."""
        for _ in range(_CREATE_ATTEMPTS - 1):
            path = folder / temporary_name()
            try:
                return path, create_private(path)
            except FileNotFoundError:
                # The first object of its folder, or someone removed folders under us.
                self._root.parent.mkdir(parents=True, exist_ok=True)
                for missing in (self._root, folder.parent, folder):
                    if make_private(missing):
                        self._anchored.clear()
        path = folder / temporary_name()
        return path, create_private(path)

    def _anchor(self, folder: Path) -> None:
        """Return when a rename in ``folder`` outlives a power cut. Raises OSError."""
        sync_directory(folder)
        if folder not in self._anchored:
            # The folders may be new themselves, made by us or by another process.
            sync_directory(folder.parent)
            sync_directory(self._root)
            with contextlib.suppress(PermissionError):
                sync_directory(self._root.parent)
            self._anchored.add(folder)

    # ------------------------------------------------------------------ state

    def _require_open(self, what: ObjectId | str | None) -> None:
        if self._closed:
            asked = f"; {what} was asked for" if what is not None else ""
            raise TierError(f"the tier at {self._root} is closed{asked}")

    def _require_writable(self, what: ObjectId | str) -> None:
        self._require_open(what)
        if self._read_only:
            raise TierError(
                f"the tier at {self._root} was opened with read_only = true; {what} stays as it is"
            )

    def _restart_after_fork(self) -> None:
        self._ledger.restart_after_fork()


_tiers: weakref.WeakSet[FileTier] = weakref.WeakSet()


def _restart_all_after_fork() -> None:
    for tier in list(_tiers):
        tier._restart_after_fork()  # noqa: SLF001 - module-private counterpart of the class


os.register_at_fork(after_in_child=_restart_all_after_fork)

"""Which of the processes that use a root keeps it tidy.

A record lock (``F_SETLK``) on a file in the root decides. The kernel ties such a lock to the
process: a child has none of it, whoever called ``fork`` and in whatever language, and it ends
with the process, however that ends. A ``flock`` would be held by every child until the last one
closed it. What a record lock does not do is checked here: it does not exclude others within one
process, and it is lost when the process closes the file through any descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Final

from erllama_core.errors import TierError
from erllama_tier_disk.failure import tier_error

_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems without locks answer."""

_Identity = tuple[int, int]
"""Device and inode of a lock file."""

_guard = threading.Lock()
_held: weakref.WeakValueDictionary[_Identity, JanitorLock] = weakref.WeakValueDictionary()
"""The locks of this process. The file of one of them is not opened again: closing that
descriptor would release the lock."""


class JanitorLock:
    """The lock of one opened store. Thread-safe; after a fork the child holds nothing."""

    def __init__(self, path: Path, *, may_take: bool = True) -> None:
        self._path: Final = path
        self._may_take = may_take
        self._identity: _Identity | None = None
        self._close: weakref.finalize[[int], JanitorLock] | None = None
        self._fd = -1

    def take(self) -> bool:
        """Whether the lock is held now; never waits.

        The lock is asked for again even when it is held: the file may have been removed, and
        another process may lock the one that took its place. On a file system without locks
        everybody holds it. Raises TierError.
        """
        with _guard:
            try:
                return self._may_take and self._take()
            except OSError as error:
                raise tier_error("lock", self._path, error) from error

    def close(self) -> None:
        """Let others have it, for good. Idempotent."""
        with _guard:
            self._may_take = False
            self._drop()

    def _take(self) -> bool:
        there = self._look()
        if self._identity is not None and self._identity != there:
            self._drop()
        if self._identity is None:
            if there is not None and there in _held:
                return False  # another store of this process has it
            try:
                fd = _open(self._path)
            except FileNotFoundError:
                return False  # the root itself is gone; there is nothing to keep tidy
            self._fd = fd
            self._close = weakref.finalize(self, os.close, fd)
            status = os.fstat(fd)
            self._identity = status.st_dev, status.st_ino
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True
            self._drop()
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                return False
            raise
        _held[self._identity] = self
        return True

    def _look(self) -> _Identity | None:
        try:
            status = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise TierError(f"cannot lock {self._path}: it is not a regular file; move it away")
        return status.st_dev, status.st_ino

    def _drop(self) -> None:
        if self._identity is not None and _held.get(self._identity) is self:
            del _held[self._identity]
        self._identity = None
        if self._close is not None:
            self._close()
            self._close = None

    def _forget_after_fork(self) -> None:
        # Closing the child's descriptor leaves the parent's lock alone: it is the parent's.
        with contextlib.suppress(OSError):
            self._drop()


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _restart_after_fork() -> None:
    global _guard  # noqa: PLW0603 - a thread of the parent may have held it at the fork
    _guard = threading.Lock()
    for lock in list(_held.values()):
        lock._forget_after_fork()  # noqa: SLF001 - module-private counterpart of the class
    _held.clear()


os.register_at_fork(after_in_child=_restart_after_fork)

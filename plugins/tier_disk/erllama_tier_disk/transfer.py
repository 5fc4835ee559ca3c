"""Whole buffers in and out of file descriptors, however short each system call turns out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from erllama_core.interfaces.block import Bytes

_CALL_BYTES: Final = 1 << 30
"""Bytes in one call, at most; macOS refuses INT_MAX and more, Linux stops there (write(2))."""
_CALL_PARTS: Final = 512
"""Buffers in one call, at most; IOV_MAX is 1,024 on Linux and macOS."""


def write_all(fd: int, parts: Iterable[Bytes]) -> None:
    """Append all ``parts``. Raises OSError."""
    for batch in _batches(parts):
        pending = batch
        while pending:
            pending = _behind(pending, os.writev(fd, pending))


def read_into(fd: int, buffer: memoryview) -> int:
    """Fill ``buffer`` from the file's position; how many bytes there were. Raises OSError."""
    done = 0
    while done < len(buffer):
        count = os.readv(fd, [buffer[done : done + _CALL_BYTES]])
        if count == 0:
            break
        done += count
    return done


def sync_file(fd: int) -> None:
    """Return when the file's bytes are on the medium. Raises OSError."""
    if sys.platform == "darwin":
        import fcntl

        # fsync(2) of macOS leaves the bytes in the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Return when the directory's entries are on the medium. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _batches(parts: Iterable[Bytes]) -> Iterator[list[memoryview]]:
    batch: list[memoryview] = []
    size = 0
    for part in parts:
        view = memoryview(part)
        for offset in range(0, len(view), _CALL_BYTES):
            piece = view[offset : offset + _CALL_BYTES]
            if len(batch) == _CALL_PARTS or size + len(piece) > _CALL_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
    if batch:
        yield batch


def _behind(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of ``views`` behind their first ``count`` bytes."""
    for position, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[position + 1 :]]
        count -= len(view)
    return []

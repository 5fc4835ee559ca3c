"""Going through a store: what is in its folders, without touching what could block."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.block import ObjectId, header_length
from erllama_core.interfaces.tier import ScanFailure
from erllama_tier_disk.layout import is_shard, parse_object_name, parse_temporary_name, shard_of
from erllama_tier_disk.owner import Owner

_HEAD_BYTES: Final = 8192
"""Read of each object at first: the header of a block of 256 tokens is some 2 KiB."""


@attrs.frozen(slots=True)
class ObjectFile:
    """A regular file under an object's name, where that object belongs."""

    object_id: ObjectId
    path: str


@attrs.frozen(slots=True)
class TemporaryFile:
    """A regular file under the name of one that is being written."""

    owner: Owner
    path: str


@attrs.frozen(slots=True)
class Shard:
    """A folder that objects are in, by the first byte of their keys."""

    name: str
    path: str

    @property
    def first_byte(self) -> int:
        return int(self.name, 16)


class NotAFile(Exception):
    """Something else than a regular file is where one belongs."""


def list_shards(objects: Path) -> Iterator[Shard | ScanFailure]:
    """The folders of a store, each once; never raises OSError.

    A folder that cannot be listed at all, ``objects`` itself, is a failure of that location.
    """
    for entry in _listing(objects):
        if isinstance(entry, ScanFailure):
            yield entry
        elif not is_shard(entry.name):
            yield ScanFailure(entry.path, "not a folder of the store: two hex digits")
        elif not _is(entry, stat.S_IFDIR):
            yield ScanFailure(entry.path, "not a folder")
        else:
            yield Shard(entry.name, entry.path)


def list_files(shard: Shard) -> list[ObjectFile | TemporaryFile | ScanFailure]:
    """Everything in a folder of the store, each once; never raises OSError.

    The folder is listed before anything of it is given, so that a caller may remove files, and
    a name that moves within the folder meanwhile is not given twice.
    """
    return [
        entry if isinstance(entry, ScanFailure) else _judge(entry, shard.name)
        for entry in _listing(Path(shard.path))
    ]


def open_regular(path: str | os.PathLike[str]) -> tuple[int, os.stat_result]:
    """A descriptor for reading and its status. Raises OSError and NotAFile, never blocks."""
    # O_NONBLOCK: opening a FIFO would wait for its other end.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return fd, _regular_status(fd)
    except BaseException:
        os.close(fd)
        raise


def read_head(fd: int) -> bytes:
    """The object's header and perhaps more; of a damaged one its first bytes. Raises OSError."""
    head = os.pread(fd, _HEAD_BYTES, 0)
    try:
        length = header_length(head)
    except CorruptBlock:
        return head
    while len(head) < length:
        more = os.pread(fd, length - len(head), len(head))
        if not more:
            break
        head += more
    return head


def _regular_status(fd: int) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotAFile("not a regular file")
    return status


def _judge(entry: os.DirEntry[str], shard: str) -> ObjectFile | TemporaryFile | ScanFailure:
    if not _is(entry, stat.S_IFREG):
        return ScanFailure(entry.path, "not a regular file")
    owner = parse_temporary_name(entry.name)
    if owner is not None:
        return TemporaryFile(owner, entry.path)
    try:
        object_id = parse_object_name(entry.name)
    except ValueError:
        return ScanFailure(entry.path, "not the name of a stored object")
    if shard_of(object_id) != shard:
        return ScanFailure(entry.path, f"belongs into the folder {shard_of(object_id)}")
    return ObjectFile(object_id, entry.path)


def _is(entry: os.DirEntry[str], kind: int) -> bool:
    """Whether the entry itself, not what it links to, is of that kind."""
    try:
        if kind == stat.S_IFDIR:
            return entry.is_dir(follow_symlinks=False)
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _listing(folder: Path) -> list[os.DirEntry[str] | ScanFailure]:
    found: dict[str, os.DirEntry[str] | ScanFailure] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found[entry.name] = entry
    except FileNotFoundError:
        pass  # gone meanwhile, or nothing was ever stored
    except OSError as error:
        # Not a possible name of an entry.
        found["/"] = ScanFailure(str(folder), error.strerror or str(error))
    return list(found.values())

"""The memory limits and stalls of this process's control group, versions 1 and 2.

Sources: cgroups(7) for /proc/self/cgroup, proc_pid_mountinfo(5) for where a hierarchy is
mounted, and the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst for the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from erllama_core.interfaces.pressure import PressureReading

PROC_SELF: Final = Path("/proc/self")

_UNLIMITED_BYTES: Final = 1 << 60
"""Version 1 says "no limit" by the largest multiple of a page that fits 63 bits."""


@attrs.frozen
class _Version:
    """The files of one cgroup version, and the names of counts in its memory.stat."""

    limits: tuple[str, ...]
    """The kernel kills at some, and slows a group down at others until it has reclaimed enough."""
    usage: str
    file_pages: tuple[str, ...]
    mapped: str


_V1: Final = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "total_mapped_file",
)
_V2: Final = _Version(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
    "file_mapped",
)


@attrs.frozen
class _Membership:
    version: _Version
    path: PurePosixPath
    """Of the process's group, from the root of its hierarchy."""


@attrs.frozen
class _Mount:
    version: _Version
    root: PurePosixPath
    """The group that is seen at ``point``: not the hierarchy's root in many containers."""
    point: Path


def read_cgroup_memory(proc_self: Path = PROC_SELF) -> PressureReading | None:
    """Memory of the group, or None when there is no limit, or no cgroups at all.

    Every group from the process's own to the outermost visible one can have a limit, and
    counts what the groups below it use. The reading is of the one with the least room left,
    which will be hit first. Page cache is reclaimed before that, so it does not count as used;
    but for mapped files, such as a model's weights, which would be read again at once. Raises
    nothing: what cannot be read gives no reading.
    """
    readings = [
        reading
        for membership, mount in _hierarchies(proc_self)
        for group in _groups(membership, mount)
        if (reading := _read_group(group, mount.version)) is not None
    ]
    return min(readings, key=lambda one: one.total_bytes - one.used_bytes, default=None)


def pressure_file(proc_self: Path = PROC_SELF) -> Path | None:
    """Where the stalls of the process's own group are told; None where they are not."""
    for membership, mount in _hierarchies(proc_self):
        if membership.version is _V2:
            path = next(_groups(membership, mount)) / "memory.pressure"
            return path if path.is_file() else None
    return None


def _hierarchies(proc_self: Path) -> Iterator[tuple[_Membership, _Mount]]:
    try:
        memberships = list(_memberships((proc_self / "cgroup").read_text()))
        mounts = list(_mounts((proc_self / "mountinfo").read_text()))
    except (OSError, UnicodeDecodeError):
        return
    for membership in memberships:
        for mount in mounts:
            if mount.version is membership.version:
                yield membership, mount
                break


def _memberships(text: str) -> Iterator[_Membership]:
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield _Membership(_V2, PurePosixPath(path))
        elif "memory" in controllers.split(","):
            yield _Membership(_V1, PurePosixPath(path))


def _mounts(text: str) -> Iterator[_Mount]:
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        root, point = PurePosixPath(_unescape(fields[3])), Path(_unescape(fields[4]))
        if kind[0] == "cgroup2":
            yield _Mount(_V2, root, point)
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield _Mount(_V1, root, point)


def _unescape(field: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _groups(membership: _Membership, mount: _Mount) -> Iterator[Path]:
    """Folders of the process's group and of those around it, as far as they are visible."""
    inner: tuple[str, ...] = ()
    # A path outside of the mounted part (with "..", or elsewhere) leaves the mount itself.
    if ".." not in membership.path.parts and membership.path.is_relative_to(mount.root):
        inner = membership.path.relative_to(mount.root).parts
    for depth in range(len(inner), -1, -1):
        yield mount.point.joinpath(*inner[:depth])


def _read_group(group: Path, version: _Version) -> PressureReading | None:
    try:
        limit = min(limit for name in version.limits if (limit := _limit(group / name)) is not None)
        used = int((group / version.usage).read_text())
        reclaimable = _reclaimable(group, version)
    except (OSError, ValueError):
        # No limit or no memory controller here, or the group went away between two reads.
        return None
    return PressureReading("cgroup", max(0, used - reclaimable), limit)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except FileNotFoundError:
        return None
    if text == "max" or int(text) >= _UNLIMITED_BYTES:
        return None
    return int(text)


def _reclaimable(group: Path, version: _Version) -> int:
    """Page cache that no process has mapped."""
    counts: dict[str, int] = {}
    for line in (group / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in version.file_pages or name == version.mapped:
            counts[name] = int(value)
    cached = sum(counts.get(name, 0) for name in version.file_pages)
    return max(0, cached - counts.get(version.mapped, 0))

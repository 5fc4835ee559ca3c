"""Where there is no room, no permission, or no place to begin with."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from erllama_core.errors import BlockNotFound, TierError, TierFull
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import ScannedObject
from erllama_tier_disk.store import FileTier

MakeObject = Callable[..., tuple[ObjectId, bytes]]


def allocate(size: int) -> memoryview:
    return memoryview(bytearray(size))


def files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


# --------------------------------------------------------------------- quota


def test_a_quota_is_never_passed(root: Path, make: MakeObject) -> None:
    """An object that would pass it is refused whole; deleting makes room again."""
    objects = [make(number) for number in range(4)]
    size = len(objects[0][1])
    tier = FileTier(root, quota_bytes=2 * size)
    tier.put(objects[0][0], [objects[0][1]])
    tier.put(objects[1][0], [objects[1][1]])
    with pytest.raises(TierFull, match=f"quota_bytes={2 * size}"):
        tier.put(objects[2][0], [objects[2][1]])
    assert not tier.contains(objects[2][0])
    tier.put(objects[1][0], [objects[1][1]])
    tier.delete(objects[0][0])
    tier.put(objects[2][0], [objects[2][1]])
    assert tier.usage().used_bytes == tier.usage().quota_bytes == 2 * size


def test_threads_together_do_not_pass_a_quota(root: Path, make: MakeObject) -> None:
    """Room is promised before it is used, so racing writers cannot both take the last of it."""
    size = len(make(0, 2000)[1])
    tier = FileTier(root, quota_bytes=5 * size)
    start = threading.Barrier(4)
    stored: list[ObjectId] = []

    def work(first: int) -> None:
        start.wait()
        for number in range(first, first + 10):
            object_id, data = make(number, 2000)
            try:
                tier.put(object_id, [data])
            except TierFull:
                continue
            stored.append(object_id)

    threads = [threading.Thread(target=work, args=(100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stored) == 5
    assert tier.usage().used_bytes == 5 * size == sum(p.stat().st_size for p in files_below(root))


def test_a_failed_put_gives_its_room_back(
    root: Path, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the quota nor the folder remembers an object that could not be stored."""
    object_id, data = make(1)
    tier = FileTier(root, quota_bytes=len(data))

    def fail(fd: int, parts: Sequence[memoryview]) -> int:
        os.write(fd, parts[0][:10])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", fail)
        with pytest.raises(TierError, match="Input/output") as caught:
            tier.put(object_id, [data])
    assert not isinstance(caught.value, TierFull)
    assert isinstance(caught.value.__cause__, OSError)
    assert files_below(root) == []
    assert tier.usage().used_bytes == 0
    tier.put(object_id, [data])


# --------------------------------------------------------------- full devices


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["create", "write", "sync", "close"])
def test_a_full_device_is_tier_full_wherever_it_shows(
    tier: FileTier,
    root: Path,
    make: MakeObject,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    code: int,
) -> None:
    """Also when the file system only tells at fsync or close; no temporary file stays."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    tier.delete(object_id)
    close = os.close
    error = OSError(code, os.strerror(code))

    def fail(*_arguments: object) -> int:
        raise error

    def close_and_fail(fd: int) -> None:
        close(fd)
        raise error

    with monkeypatch.context() as patch:
        match step:
            case "create":
                patch.setattr("erllama_tier_disk.store.create_private", fail)
            case "write":
                patch.setattr(os, "writev", fail)
            case "sync":
                patch.setattr("erllama_tier_disk.store.sync_file", fail)
            case _:
                patch.setattr(os, "close", close_and_fail)
        with pytest.raises(TierFull) as caught:
            tier.put(object_id, [data], durable=True)
    assert caught.value.__cause__ is error
    assert files_below(root) == []
    assert not tier.contains(object_id)
    assert tier.usage().used_bytes == 0


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mount)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_really_full_device(small_tmpfs: Path, make: MakeObject) -> None:
    """On a tmpfs of 256 KiB: TierFull, nothing half-written, room again after a delete."""
    tier = FileTier(small_tmpfs / "store")
    stored: dict[ObjectId, bytes] = {}

    def fill() -> None:
        for number in range(100):
            object_id, data = make(number, 20_000)
            tier.put(object_id, [data])
            stored[object_id] = data

    with pytest.raises(TierFull, match="device is full"):
        fill()
    assert stored
    assert len(files_below(small_tmpfs)) == len(stored)
    for object_id, data in stored.items():
        assert bytes(tier.read(object_id, allocate)) == data
    reopened = FileTier(small_tmpfs / "store")
    assert len(list(reopened.scan())) == len(stored)
    for object_id in stored:
        assert reopened.delete(object_id) > 0
    object_id, data = make(999, 20_000)
    reopened.put(object_id, [data])


def test_a_read_only_mount_serves_read_only(small_tmpfs: Path, make: MakeObject) -> None:
    """A store on a read-only file system is refused for writing, with the way out, and read."""
    object_id, data = make(1)
    FileTier(small_tmpfs / "store").put(object_id, [data])
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    with pytest.raises(TierError, match="set read_only = true"):
        FileTier(small_tmpfs / "store")
    tier = FileTier(small_tmpfs / "store", read_only=True)
    assert bytes(tier.read(object_id, allocate)) == data
    assert len(list(tier.scan())) == 1


# ------------------------------------------------------------------ read-only


def test_read_only_changes_nothing(root: Path, make: MakeObject) -> None:
    """Put and delete are refused; reading leaves even the time of last use alone."""
    object_id, data = make(1)
    writer = FileTier(root)
    writer.put(object_id, [data])
    path = Path(writer.location(object_id))
    os.utime(path, (1000, 1000))
    tier = FileTier(root, read_only=True)
    for operation in (lambda: tier.put(object_id, [data]), lambda: tier.delete(object_id)):
        with pytest.raises(TierError, match="read_only"):
            operation()
    assert tier.contains(object_id)
    assert bytes(tier.read(object_id, allocate)) == data
    (found,) = tier.scan()
    assert isinstance(found, ScannedObject)
    assert found.last_used_ns == 1000 * 10**9
    assert path.stat().st_mtime_ns == 1000 * 10**9
    assert tier.usage().used_bytes == len(data)


def test_read_only_needs_a_folder_that_is_there(tmp_path: Path) -> None:
    """Nothing is created for a reader, so a missing root is said at once."""
    with pytest.raises(TierError, match="creates nothing"):
        FileTier(tmp_path / "missing", read_only=True)
    assert not (tmp_path / "missing").exists()


def test_read_only_on_a_folder_without_objects(tmp_path: Path, make: MakeObject) -> None:
    """A folder in which nothing was ever stored is an empty store."""
    tier = FileTier(tmp_path, read_only=True)
    assert list(tier.scan()) == []
    assert not tier.contains(make(1)[0])
    with pytest.raises(BlockNotFound):
        tier.read(make(1)[0], allocate)


# ---------------------------------------------------------------------- roots


def test_roots_that_cannot_be(tmp_path: Path) -> None:
    """A file, something below a file, a broken link, an impossible name: each is a TierError."""
    file = tmp_path / "file"
    file.write_text("")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "objects").write_text("")
    for root in (
        file,
        file / "below",
        dangling,
        loop,
        occupied,
        tmp_path / ("n" * 300),
        tmp_path / "zero\0byte",
        Path("~no-such-user-erllama/store"),
    ):
        with pytest.raises(TierError) as caught:
            FileTier(root)
        assert len(str(caught.value)) > 20


def test_a_root_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: MakeObject
) -> None:
    """``~`` is the home folder, missing parents are made, and the working directory is free."""
    monkeypatch.setenv("HOME", str(tmp_path))
    object_id, data = make(1)
    tier = FileTier(Path("~/a/b/store"))
    tier.put(object_id, [data])
    monkeypatch.chdir(tmp_path)
    relative = FileTier(Path("a/b/store"))
    monkeypatch.chdir("/")
    assert bytes(relative.read(object_id, allocate)) == data
    assert (tmp_path / "a/b/store/objects").is_dir()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from erllama_core.errors import BlockNotFound, TierError
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.interfaces.tier import ScanFailure, ScannedObject
from erllama_tier_disk.store import FileTier

import structlog  # with all that it imports late
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
base = Path(sys.argv[1])

def allocate(size):
    return memoryview(bytearray(size))

def refused(operation):
    try:
        operation()
    except TierError as error:
        assert "let this user" in str(error), error
    else:
        raise AssertionError("not refused")

locked = base / "locked"
locked.mkdir(mode=0o500)
refused(lambda: FileTier(locked))
refused(lambda: FileTier(locked / "store"))

tier = FileTier(base / "store")
objects = [ObjectId(ObjectKind.KV, number, bytes([number]) * 32) for number in range(4)]
for object_id in objects:
    tier.put(object_id, [b"data"])
file, shard, _, _ = (Path(tier.location(object_id)) for object_id in objects)
file.chmod(0)
shard.parent.chmod(0)
refused(lambda: tier.read(objects[0], allocate))
for operation in (
    lambda: tier.read(objects[1], allocate),
    lambda: tier.contains(objects[1]),
    lambda: tier.delete(objects[1]),
    lambda: tier.put(objects[1], [b"data"]),
):
    refused(operation)
found = list(tier.scan())
assert {item.location for item in found if isinstance(item, ScanFailure)} == {
    str(file), str(shard.parent)
}, found
assert {item.object_id for item in found if isinstance(item, ScannedObject)} == set(objects[2:])
assert tier.usage().used_bytes == 16
shard.parent.chmod(0o700)
file.parent.chmod(0o500)
refused(lambda: tier.delete(objects[0]))
assert tier.delete(objects[1]) == 4
(base / "store" / "objects").chmod(0)
(failure,) = tier.scan()
assert failure.location == str(base / "store" / "objects")
reading = FileTier(base / "store", read_only=True)
refused(lambda: reading.contains(objects[2]))
(base / "store").chmod(0)
try:
    FileTier(base / "store", read_only=True)
except TierError as error:
    assert "read" in str(error)
else:
    raise AssertionError("opened")
for path in (base / "store", base / "store" / "objects", file.parent):
    path.chmod(0o700)
"""


def test_lost_permissions_are_tier_errors() -> None:
    """As an ordinary user: what may not be read or written is told, with advice, and survived."""
    base = Path(tempfile.mkdtemp(prefix="erllama-permissions-"))
    try:
        if os.geteuid() == 0:
            os.chown(base, 65534, 65534)
        subprocess.run([sys.executable, "-c", UNPRIVILEGED, str(base)], check=True, timeout=30)
    finally:
        shutil.rmtree(base)

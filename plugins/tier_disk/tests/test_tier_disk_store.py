"""Putting, reading, deleting: what the Tier contract asks of one process."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from erllama_core.errors import BlockNotFound, TierError, TierFull
from erllama_core.interfaces.block import Bytes, ObjectId, ObjectKind, verify_object
from erllama_core.interfaces.tier import ScannedObject, Tier
from erllama_tier_disk import transfer
from erllama_tier_disk.store import FileTier

MakeObject = Callable[..., tuple[ObjectId, bytes]]


def allocate(size: int) -> memoryview:
    return memoryview(bytearray(size))


def path_of(tier: FileTier, object_id: ObjectId) -> Path:
    return Path(tier.location(object_id))


def files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


def stored_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in files_below(root))


def test_is_a_tier(tier: FileTier) -> None:
    """The class satisfies the protocol (checked by mypy) and starts empty."""
    as_protocol: Tier = tier
    assert as_protocol.usage().used_bytes == 0
    assert list(as_protocol.scan()) == []


@pytest.mark.parametrize("durable", [False, True])
def test_reads_what_was_put(tier: FileTier, make: MakeObject, durable: bool) -> None:
    """The parts come back as one buffer, the one that allocate gave."""
    object_id, data = make(1, 5000)
    given: list[memoryview] = []

    def allocate_once(size: int) -> memoryview:
        given.append(allocate(size))
        return given[-1]

    parts: Sequence[Bytes] = [data[:192], b"", bytearray(data[192:300]), memoryview(data)[300:]]
    tier.put(object_id, parts, durable=durable)
    buffer = tier.read(object_id, allocate_once)
    assert bytes(buffer) == data
    assert len(given) == 1
    assert buffer is given[0]
    assert tier.contains(object_id)
    assert tier.usage().used_bytes == len(data)


def test_names_its_file_after_the_object(tier: FileTier, root: Path, make: MakeObject) -> None:
    """The path is the one that docs/format.md gives, and nothing else is left behind."""
    object_id, data = make(7)
    tier.put(object_id, [data])
    expected = root / "objects" / object_id.key.hex()[:2] / f"{object_id.key.hex()}.7.kv.kvc"
    assert tier.location(object_id) == str(expected)
    assert files_below(root) == [expected]
    assert expected.read_bytes() == data


@pytest.mark.parametrize("kind", list(ObjectKind))
def test_kinds_and_starts_are_different_objects(tier: FileTier, kind: ObjectKind) -> None:
    """Objects that share a key do not overwrite each other."""
    key = bytes(range(32))
    tier.put(ObjectId(kind, 0, key), [b"here"])
    for other in ObjectKind:
        assert tier.contains(ObjectId(other, 0, key)) is (other is kind)
    assert not tier.contains(ObjectId(kind, 1, key))


def test_unknown_objects_are_not_found(tier: FileTier, make: MakeObject) -> None:
    """A miss is BlockNotFound, False or 0, and allocates nothing."""
    object_id, _ = make(1)

    def never(size: int) -> memoryview:
        raise AssertionError("allocated for an object that is not there")

    with pytest.raises(BlockNotFound):
        tier.read(object_id, never)
    assert tier.contains(object_id) is False
    assert tier.delete(object_id) == 0


def test_delete_gives_the_bytes_freed_once(tier: FileTier, make: MakeObject) -> None:
    """Deleting frees the whole file, and the second time nothing."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    assert tier.delete(object_id) == len(data)
    assert tier.delete(object_id) == 0
    assert tier.usage().used_bytes == 0
    assert not tier.contains(object_id)


def test_storing_again_mends_a_damaged_file(tier: FileTier, make: MakeObject) -> None:
    """A file under the name is replaced, whatever is in it, and counted once."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    path_of(tier, object_id).write_bytes(b"x" * len(data))
    tier.put(object_id, [data])
    assert bytes(tier.read(object_id, allocate)) == data
    assert tier.usage().used_bytes == len(data)


def test_a_file_removed_behind_its_back_is_a_miss(tier: FileTier, make: MakeObject) -> None:
    """What another process deleted is not found, and no longer counted once that was seen."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    path_of(tier, object_id).unlink()
    with pytest.raises(BlockNotFound):
        tier.read(object_id, allocate)
    assert tier.usage().used_bytes == 0


def test_a_file_cut_while_it_is_read_is_an_error(tier: FileTier, make: MakeObject) -> None:
    """A short file never comes back as a buffer with stale bytes at its end."""
    object_id, data = make(1)
    tier.put(object_id, [data])

    def cut_meanwhile(size: int) -> memoryview:
        os.truncate(path_of(tier, object_id), 50)
        return allocate(size)

    with pytest.raises(TierError, match="50 bytes"):
        tier.read(object_id, cut_meanwhile)


def test_a_file_deleted_while_it_is_read_is_not_counted(
    tier: FileTier, root: Path, make: MakeObject
) -> None:
    """The reader still gets the whole object; the usage does not bring it back."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    reader = FileTier(root)

    def delete_meanwhile(size: int) -> memoryview:
        assert reader.delete(object_id) == size
        return allocate(size)

    assert bytes(reader.read(object_id, delete_meanwhile)) == data
    assert reader.usage().used_bytes == 0


def test_what_allocate_raises_passes_through(tier: FileTier, make: MakeObject) -> None:
    """The caller's own error is not taken for a tier's, and no descriptor stays open."""
    object_id, data = make(1)
    tier.put(object_id, [data])

    def refuse(size: int) -> memoryview:
        raise MemoryError(size)

    with pytest.raises(MemoryError):
        tier.read(object_id, refuse)
    assert bytes(tier.read(object_id, allocate)) == data


def test_short_system_calls_are_continued(
    tier: FileTier, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes and reads that move a few bytes at a time still move all of them."""
    writev, readv = os.writev, os.readv

    def short_writev(fd: int, parts: Sequence[memoryview]) -> int:
        return writev(fd, [parts[0][:7]])

    def short_readv(fd: int, buffers: Sequence[memoryview]) -> int:
        return readv(fd, [buffers[0][:11]])

    monkeypatch.setattr(os, "writev", short_writev)
    monkeypatch.setattr(os, "readv", short_readv)
    object_id, data = make(1, 500)
    tier.put(object_id, [data[:100], b"", data[100:103], data[103:]])
    assert bytes(tier.read(object_id, allocate)) == data


def test_large_and_many_parts_are_split_into_calls(
    tier: FileTier, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call is given more bytes or more buffers than the system takes."""
    monkeypatch.setattr(transfer, "_CALL_BYTES", 64)
    writev = os.writev
    calls: list[tuple[int, int]] = []

    def recording_writev(fd: int, parts: Sequence[memoryview]) -> int:
        calls.append((len(parts), sum(map(len, parts))))
        return writev(fd, parts)

    monkeypatch.setattr(os, "writev", recording_writev)
    object_id, data = make(1, 3000)
    tier.put(object_id, [data[:1000], *(bytes([byte]) for byte in data[1000:])])
    assert bytes(tier.read(object_id, allocate)) == data
    assert max(size for _, size in calls) <= 64
    assert max(count for count, _ in calls) <= 512


def test_folders_and_files_are_private_whatever_the_umask(tmp_path: Path, make: MakeObject) -> None:
    """Mode 0700 and 0600, also when the umask would give more or less."""
    object_id, data = make(1)
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            tier = FileTier(tmp_path / f"store{umask}")
            tier.put(object_id, [data])
        finally:
            os.umask(before)
        path = path_of(tier, object_id)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for folder in list(path.parents)[:3]:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_folders_removed_meanwhile_are_made_again(
    tier: FileTier, root: Path, make: MakeObject
) -> None:
    """A store whose folders someone deleted takes objects again, durable ones too."""
    object_id, data = make(1)
    tier.put(object_id, [data], durable=True)
    for gone in (path_of(tier, object_id), path_of(tier, object_id).parent):
        gone.unlink() if gone.is_file() else gone.rmdir()
    (root / "objects").rmdir()
    root.rmdir()
    assert list(tier.scan()) == []
    assert tier.usage().used_bytes == 0
    tier.put(object_id, [data], durable=True)
    assert bytes(tier.read(object_id, allocate)) == data


def test_what_was_stored_can_be_made_durable(
    tier: FileTier, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that is there is synced, then its folder; one that is gone is skipped."""
    synced: list[str] = []

    def sync_file(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").resolve().name if sys.platform == "linux" else "")

    monkeypatch.setattr("erllama_tier_disk.store.sync_file", sync_file)
    monkeypatch.setattr(
        "erllama_tier_disk.store.sync_directory", lambda path: synced.append(f"{Path(path).name}/")
    )
    stored = []
    for number in range(3):
        object_id, data = make(number)
        tier.put(object_id, [data])
        stored.append(object_id)
    assert synced == []
    tier.delete(stored[1])
    tier.make_durable(stored)
    left = [path_of(tier, stored[number]) for number in (0, 2)]
    if sys.platform == "linux":
        assert synced[:2] == [path.name for path in left]
    assert {f"{path.parent.name}/" for path in left} <= set(synced[2:])

    def fail(_: object) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr("erllama_tier_disk.store.sync_file", fail)
    with pytest.raises(TierError, match="make durable"):
        tier.make_durable(stored)


def test_a_folder_removed_while_it_is_made_durable_is_no_error(
    tier: FileTier, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gone with its folder is skipped, as an object that is gone by itself is."""
    stored = []
    for number in range(2):
        object_id, data = make(number)
        tier.put(object_id, [data])
        stored.append(object_id)
    gone = path_of(tier, stored[0]).parent
    synced: list[Path] = []
    monkeypatch.setattr(
        "erllama_tier_disk.store.sync_file", lambda _: shutil.rmtree(gone, ignore_errors=True)
    )
    monkeypatch.setattr(tier, "_anchor", _noting(tier, synced))
    tier.make_durable(stored)
    assert synced == [path_of(tier, stored[1]).parent]


def _noting(tier: FileTier, synced: list[Path]) -> Callable[[Path], None]:
    anchor = tier._anchor

    def noting(folder: Path) -> None:
        anchor(folder)
        synced.append(folder)

    return noting


def test_durable_syncs_the_file_before_and_the_folders_after_its_name_appears(
    tier: FileTier, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the call finds the name and all bytes; before the name, the bytes."""
    object_id, data = make(1)
    path = path_of(tier, object_id)
    events: list[str] = []
    monkeypatch.setattr(
        "erllama_tier_disk.store.sync_file",
        lambda fd: events.append(f"{os.fstat(fd).st_size} bytes, named: {path.exists()}"),
    )
    monkeypatch.setattr(
        "erllama_tier_disk.store.sync_directory",
        lambda folder: events.append(f"{folder}, named: {path.exists()}"),
    )
    tier.put(object_id, [data])
    assert events == []
    tier.delete(object_id)
    tier.put(object_id, [data], durable=True)
    folders = [path.parent, path.parents[1], path.parents[2], path.parents[3]]
    assert events == [
        f"{len(data)} bytes, named: False",
        *(f"{folder}, named: True" for folder in folders),
    ]
    events.clear()
    tier.put(object_id, [data], durable=True)
    assert events == [f"{len(data)} bytes, named: True", f"{path.parent}, named: True"]
    path.unlink()
    path.parent.rmdir()
    events.clear()
    tier.put(object_id, [data], durable=True)
    assert events[1:] == [f"{folder}, named: True" for folder in folders]


def test_reading_moves_the_time_of_last_use(tier: FileTier, make: MakeObject) -> None:
    """An old time is brought up to date, a recent one is left alone to save the write."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    path = path_of(tier, object_id)
    recent = path.stat().st_mtime_ns - 5 * 10**9
    os.utime(path, ns=(recent, recent))
    tier.read(object_id, allocate)
    assert path.stat().st_mtime_ns == recent
    hour_ago = recent - 3600 * 10**9
    os.utime(path, ns=(hour_ago, hour_ago))
    tier.read(object_id, allocate)
    assert path.stat().st_mtime_ns > recent


def test_a_clock_set_back_does_no_harm(tier: FileTier, make: MakeObject) -> None:
    """A time of last use that lies in the future is reported as it is and mended by a read."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    path = path_of(tier, object_id)
    future = time.time_ns() + 10**9 * 86400 * 365
    os.utime(path, ns=(future, future))
    (found,) = tier.scan()
    assert isinstance(found, ScannedObject)
    assert found.last_used_ns == future
    tier.read(object_id, allocate)
    assert path.stat().st_mtime_ns < future


def test_a_closed_tier_refuses(tier: FileTier, make: MakeObject) -> None:
    """After close every operation is a TierError, and closing again is harmless."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    tier.close()
    tier.close()
    operations: list[Callable[[], object]] = [
        lambda: tier.put(object_id, [data]),
        lambda: tier.read(object_id, allocate),
        lambda: tier.delete(object_id),
        lambda: tier.contains(object_id),
        tier.scan,
    ]
    for operation in operations:
        with pytest.raises(TierError, match="closed"):
            operation()


def test_stored_objects_stay_after_close(tier: FileTier, root: Path, make: MakeObject) -> None:
    """A new tier on the same root finds what the old one stored."""
    object_id, data = make(1)
    tier.put(object_id, [data])
    tier.close()
    reopened = FileTier(root)
    assert bytes(reopened.read(object_id, allocate)) == data
    assert reopened.usage().used_bytes == len(data)


def test_two_tiers_on_one_root_see_each_other(tier: FileTier, root: Path, make: MakeObject) -> None:
    """Whoever publishes or deletes an object, both agree on what is there."""
    other = FileTier(root)
    object_id, data = make(1)
    tier.put(object_id, [data])
    other.put(object_id, [data])
    assert other.contains(object_id)
    assert other.delete(object_id) == len(data)
    assert not tier.contains(object_id)
    assert tier.delete(object_id) == 0
    assert tier.usage().used_bytes == other.usage().used_bytes == 0


def test_a_folder_under_an_objects_name_is_an_error_and_stays(
    tier: FileTier, make: MakeObject
) -> None:
    """What is no file is not found, not read, not replaced and not deleted."""
    object_id, data = make(1)
    path = path_of(tier, object_id)
    path.mkdir(parents=True)
    assert not tier.contains(object_id)
    for operation in (
        lambda: tier.read(object_id, allocate),
        lambda: tier.put(object_id, [data]),
        lambda: tier.delete(object_id),
    ):
        with pytest.raises(TierError) as caught:
            operation()
        assert not isinstance(caught.value, TierFull)
    assert files_below(path.parent) == []
    assert tier.usage().used_bytes == 0


def test_a_fifo_under_an_objects_name_never_blocks(tier: FileTier, make: MakeObject) -> None:
    """Reading one is an error at once, although nobody writes into it."""
    object_id, _ = make(1)
    path = path_of(tier, object_id)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(TierError, match="not a regular file"):
        tier.read(object_id, allocate)


def test_a_link_under_an_objects_name_is_not_followed(
    tier: FileTier, tmp_path: Path, make: MakeObject
) -> None:
    """A symbolic link cannot make the tier read or write a file elsewhere."""
    object_id, data = make(1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"secret")
    path = path_of(tier, object_id)
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere)
    with pytest.raises(TierError, match="symbolic link"):
        tier.read(object_id, allocate)
    tier.put(object_id, [data])
    assert elsewhere.read_bytes() == b"secret"
    assert bytes(tier.read(object_id, allocate)) == data


def test_threads_on_the_same_names_agree(tier: FileTier, root: Path, make: MakeObject) -> None:
    """Readers get whole objects or a miss, and the usage is exact when all have stopped."""
    objects = [make(number, 3000 + number) for number in range(6)]
    failures: list[BaseException] = []
    start = threading.Barrier(5)

    def work(seed: int) -> None:
        choice = random.Random(seed)
        try:
            start.wait()
            for _ in range(150):
                object_id, data = choice.choice(objects)
                action = choice.randrange(5)
                if action < 2:
                    tier.put(object_id, [data[:200], data[200:]])
                elif action == 2:
                    tier.delete(object_id)
                elif action == 3:
                    for found in tier.scan():
                        assert isinstance(found, ScannedObject)
                else:
                    try:
                        buffer = tier.read(object_id, allocate)
                    except BlockNotFound:
                        continue
                    verify_object(buffer, object_id)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert tier.usage().used_bytes == stored_bytes(root)
    assert all(path.suffix == ".kvc" for path in files_below(root / "objects"))


FORKING = """
import os, sys, threading
from pathlib import Path
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_tier_disk.owner import this_process
from erllama_tier_disk.store import FileTier

tier = FileTier(Path(sys.argv[1]))
first = ObjectId(ObjectKind.KV, 0, bytes(32))
second = ObjectId(ObjectKind.KV, 1, bytes(32))
tier.put(first, [b"first"])
held, done = threading.Event(), threading.Event()

def hold():
    with tier._ledger.lock:
        held.set()
        done.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
parent = this_process()
child = os.fork()
if child == 0:
    tier.put(second, [b"second"])
    found = bytes(tier.read(first, lambda size: memoryview(bytearray(size))))
    named = this_process()
    good = found == b"first" and named.pid == os.getpid() and named != parent
    os._exit(0 if good and tier.usage().used_bytes == 11 else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
holder.join()
assert tier.contains(second)
sys.exit(status)
"""


def test_a_forked_child_works_on(root: Path) -> None:
    """A lock that another thread held at the fork stops nobody; names are the child's own."""
    subprocess.run([sys.executable, "-c", FORKING, str(root)], check=True, timeout=30)

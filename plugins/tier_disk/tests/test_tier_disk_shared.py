"""Several processes on one root: who is the janitor, what others changed, pins."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erllama_core.errors import TierError, TierFull
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.interfaces.tier import (
    FoundObject,
    Gone,
    RecordsPins,
    ScanFailure,
    ScannedObject,
    Shared,
)
from erllama_tier_disk.layout import temporary_name
from erllama_tier_disk.owner import Owner, this_process
from erllama_tier_disk.store import FileTier

MakeObject = Callable[..., tuple[ObjectId, bytes]]

LEADER = """
import os, sys
from pathlib import Path
from erllama_tier_disk.store import FileTier

tier = FileTier(Path(sys.argv[1]))
for line in sys.stdin:
    match line.strip():
        case "lead":
            print(int(tier.lead()), flush=True)
        case "fork":
            child = os.fork()
            if child == 0:
                sys.stdin.close()
                os.read(int(sys.argv[2]), 1)  # until the test closes its end
                os._exit(0)
            print(child, flush=True)
        case "native fork":
            import ctypes
            child = ctypes.PyDLL(None).fork()
            if child == 0:
                os.read(int(sys.argv[2]), 1)
                os._exit(0)
            print(child, flush=True)
"""


class Process:
    """Another process with the root open, which does as it is told."""

    def __init__(self, root: Path) -> None:
        read, self._hold = os.pipe()
        self.popen = subprocess.Popen(
            [sys.executable, "-c", LEADER, str(root), str(read)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[read],
        )
        os.close(read)

    def tell(self, line: str) -> int:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return int(self.popen.stdout.readline())

    def kill(self) -> None:
        self.popen.kill()
        assert self.popen.wait(timeout=30) == -signal.SIGKILL

    def close(self) -> None:
        self.popen.kill()
        os.close(self._hold)  # and whatever it forked ends, too
        self.popen.wait(timeout=30)
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def start(root: Path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(root))
        return started[-1]

    yield start
    for process in started:
        process.close()


def changes(tier: FileTier) -> tuple[set[ObjectId], set[ObjectId]]:
    """What a rescan tells: what came, what went."""
    came, gone = set(), set()
    for found in tier.rescan():
        assert not isinstance(found, ScanFailure)
        if isinstance(found, Gone):
            gone.add(found.object_id)
        else:
            came.add(found.object_id)
    return came, gone


def settle(root: Path) -> None:
    """Make every folder look as if it had not changed for a while."""
    for folder in [root / "objects", *(root / "objects").iterdir()]:
        os.utime(folder, (time.time() - 60, time.time() - 60))


def test_is_shared_and_records_pins(tier: FileTier) -> None:
    """The core finds both abilities by their protocols."""
    assert isinstance(tier, Shared)
    assert isinstance(tier, RecordsPins)
    assert tier.rescan_interval_s == 30.0


# ------------------------------------------------------------------ janitor


def test_one_process_leads_and_another_takes_over_when_it_is_killed(
    root: Path, start: Callable[[], Process]
) -> None:
    """The lock is one process's, is kept, and is free as soon as that process is dead."""
    first, second = start(), start()
    assert first.tell("lead") == 1
    assert second.tell("lead") == 0
    assert first.tell("lead") == 1
    tier = FileTier(root)
    assert not tier.lead()
    first.kill()
    assert second.tell("lead") == 1
    assert not tier.lead()


@pytest.mark.parametrize("how", ["fork", "native fork"])
def test_a_forked_child_does_not_hold_the_lock(
    root: Path, start: Callable[[], Process], how: str
) -> None:
    """When the janitor dies, its child lives on and the lock is free, whoever called fork."""
    process = start()
    assert process.tell("lead") == 1
    child = process.tell(how)
    process.kill()
    os.kill(child, 0)
    tier = FileTier(root)
    assert tier.lead()
    tier.close()


FORKED_TIER = """
import os, sys
from pathlib import Path
from erllama_tier_disk.store import FileTier

tier = FileTier(Path(sys.argv[1]))
assert tier.lead()
child = os.fork()
if child == 0:
    led = tier.lead()
    tier.close()
    os._exit(int(led))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
other = os.fork()
if other == 0:
    os._exit(int(FileTier(Path(sys.argv[1])).lead()))
assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0, "lost when the child closed"
assert tier.lead()
"""


def test_a_child_that_closes_its_tier_leaves_the_parent_the_lock(root: Path) -> None:
    """A fork of the janitor does not lead, and cannot give away what it does not have."""
    subprocess.run([sys.executable, "-c", FORKED_TIER, str(root)], check=True, timeout=30)


def test_one_tier_of_a_process_leads(root: Path) -> None:
    """Record locks do not keep a process from itself; closing the other keeps the first's."""
    first, second = FileTier(root), FileTier(root)
    assert first.lead()
    assert not second.lead()
    second.close()
    third = FileTier(root)
    assert not third.lead()
    first.close()
    assert not first.lead()
    assert third.lead()
    del third
    last = FileTier(root)
    assert last.lead()
    last.close()


def test_a_lost_lock_is_taken_again(root: Path, start: Callable[[], Process]) -> None:
    """Removed with its root, or lost to a stray close: who asks again finds out."""
    tier = FileTier(root)
    assert tier.lead()
    lock = root / "janitor.lock"
    assert lock.stat().st_mode & 0o777 == 0o600
    with lock.open("rb"):
        pass  # this releases a record lock
    other = start()
    assert other.tell("lead") == 1
    assert not tier.lead()
    lock.unlink()
    assert tier.lead()
    assert other.tell("lead") == 0
    tier.close()
    lock.unlink()
    root.rename(root.with_name("away"))
    assert other.tell("lead") == 0


def test_a_file_system_without_locks_has_many_janitors(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better several that tidy up than none."""

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    tier = FileTier(root)
    assert tier.lead()
    assert tier.lead()
    tier.close()


def test_something_else_in_place_of_the_lock_is_told(root: Path) -> None:
    """A pipe, a folder or a link under the lock's name neither blocks nor is followed."""
    tier = FileTier(root)
    lock = root / "janitor.lock"
    os.mkfifo(lock)
    for _ in range(2):
        with pytest.raises(TierError, match="not a regular file"):
            tier.lead()
        lock.unlink()
        lock.symlink_to(root / "elsewhere")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(TierError, match="not a regular file"):
        tier.lead()
    assert not (root / "elsewhere").exists()
    assert list(tier.scan()) == []


def test_only_the_janitor_keeps_to_the_quota_exactly(root: Path, make: MakeObject) -> None:
    """Others pass it by an eighth and no more; leftovers stay for the janitor to sweep."""
    objects = [make(number, 1000) for number in range(40)]
    size = len(objects[0][1])
    leader, other = FileTier(root, quota_bytes=16 * size), FileTier(root, quota_bytes=16 * size)
    assert leader.lead()
    for object_id, data in objects[:18]:
        other.put(object_id, [data])
    with pytest.raises(TierFull, match=f"quota_bytes={16 * size}"):
        other.put(objects[18][0], [objects[18][1]])
    left = (
        root
        / "objects"
        / "00"
        / temporary_name().replace(str(this_process()), str(Owner("0" * 32, 0, 1, 1)))
    )
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    assert len(list(other.scan())) == 18
    assert left.exists()
    assert len(list(leader.scan())) == 18
    assert not left.exists()
    for object_id, _ in objects[:2]:
        leader.delete(object_id)
    with pytest.raises(TierFull):
        leader.put(objects[20][0], [objects[20][1]])
    leader.close()
    assert other.lead()
    other.close()


# ------------------------------------------------------------- find, rescan


def test_finds_an_object_of_another_process(root: Path, make: MakeObject) -> None:
    """One stat tells size and time of last use; what is no file is not found."""
    writer, tier = FileTier(root), FileTier(root)
    object_id, data = make(1)
    assert tier.find(object_id) is None
    writer.put(object_id, [data])
    status = Path(writer.location(object_id)).stat()
    assert tier.find(object_id) == FoundObject(len(data), status.st_mtime_ns)
    folder, _ = make(2)
    Path(tier.location(folder)).mkdir(parents=True)
    assert tier.find(folder) is None
    tier.close()
    with pytest.raises(TierError, match="closed"):
        tier.find(object_id)


def test_a_rescan_tells_what_others_changed(root: Path, make: MakeObject) -> None:
    """What came and what went, each once; what this process did itself is left out."""
    writer, tier = FileTier(root), FileTier(root)
    objects = [make(number) for number in range(60)]
    for object_id, data in objects[:30]:
        writer.put(object_id, [data])
    assert len(list(tier.scan())) == 30
    settle(root)
    assert changes(tier) == (set(), set())
    for object_id, data in objects[30:]:
        writer.put(object_id, [data])
    for object_id, _ in objects[:10]:
        writer.delete(object_id)
    own, data = make(99)
    tier.put(own, [data])
    expected = {object_id for object_id, _ in objects[30:]}
    assert changes(tier) == (expected, {object_id for object_id, _ in objects[:10]})
    assert changes(tier) == (set(), set())
    assert tier.usage().used_bytes == sum(len(data) for _, data in [*objects[10:], make(99)])


def test_a_rescan_lists_only_folders_that_changed(
    root: Path, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing changed, no folder is listed; with one object come, one is."""
    writer, tier = FileTier(root), FileTier(root)
    for number in range(50):
        object_id, data = make(number)
        writer.put(object_id, [data])
    listed: list[str] = []
    listing = os.scandir

    def note(path: str) -> Iterator[os.DirEntry[str]]:
        listed.append(Path(path).name)
        return listing(path)

    settle(root)
    assert len(list(tier.scan())) == 50
    monkeypatch.setattr(os, "scandir", note)
    assert changes(tier) == (set(), set())
    assert listed == ["objects"]
    object_id, data = make(100)
    writer.put(object_id, [data])
    listed.clear()
    assert changes(tier) == ({object_id}, set())
    assert listed == ["objects", object_id.key[:1].hex()]


def test_a_change_within_the_clocks_resolution_is_seen(root: Path, make: MakeObject) -> None:
    """A folder that changed just now is listed again: its time may not tell the next change."""
    writer, tier = FileTier(root), FileTier(root)
    first, data = make(1)
    writer.put(first, [data])
    folder = Path(writer.location(first)).parent
    assert len(list(tier.scan())) == 1
    before = folder.stat()
    second = ObjectId(ObjectKind.LOGITS, 7, first.key)
    writer.put(second, [data])
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changes(tier) == ({second}, set())


def test_what_a_read_met_first_is_told_by_the_next_rescan(root: Path, make: MakeObject) -> None:
    """A read counts an object's size, but nobody has told the core that it is there."""
    writer, tier = FileTier(root), FileTier(root)
    assert list(tier.scan()) == []
    object_id, data = make(1)
    writer.put(object_id, [data])
    tier.read(object_id, lambda size: memoryview(bytearray(size)))
    assert tier.usage().used_bytes == len(data)
    assert changes(tier) == ({object_id}, set())
    assert tier.usage().used_bytes == len(data)


def test_leftovers_are_swept_by_a_rescan_once_their_writer_is_dead(
    root: Path, make: MakeObject
) -> None:
    """A folder in which somebody writes is looked at again, though nothing changes in it."""
    writer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tier = FileTier(root)
    object_id, data = make(1)
    tier.put(object_id, [data])
    here = this_process()
    name = temporary_name().replace(str(here), str(Owner(here.boot, here.namespace, writer.pid, 0)))
    left = Path(tier.location(object_id)).parent / name
    left.write_bytes(b"half")
    settle(root)
    assert len(list(tier.scan())) == 1
    assert left.exists()
    writer.communicate()
    assert changes(tier) == (set(), set())
    assert not left.exists()
    tier.close()


def test_a_removed_root_is_all_gone_and_an_unreadable_one_is_not(
    root: Path, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be listed may still be there; what is not there does not count."""
    tier = FileTier(root)
    objects = [make(number) for number in range(5)]
    for object_id, data in objects:
        tier.put(object_id, [data])
    assert len(list(tier.scan())) == 5

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        (failure,) = tier.rescan()
        assert failure == ScanFailure(str(root / "objects"), "Permission denied")
    assert tier.usage().used_bytes > 0
    root.rename(root.with_name("away"))
    assert changes(tier) == (set(), {object_id for object_id, _ in objects})
    assert tier.usage().used_bytes == 0


def test_folders_with_times_in_the_future_are_always_listed(root: Path, make: MakeObject) -> None:
    """After the clock was set back, the time of a folder says nothing about its age."""
    writer, tier = FileTier(root), FileTier(root)
    first, data = make(1)
    writer.put(first, [data])
    folder = Path(writer.location(first)).parent
    future = time.time_ns() + 3600 * 10**9
    os.utime(folder, ns=(future, future))
    assert len(list(tier.scan())) == 1
    second = ObjectId(ObjectKind.LOGITS, 7, first.key)
    writer.put(second, [data])
    os.utime(folder, ns=(future, future))
    assert changes(tier) == ({second}, set())


def test_a_rescan_ends_when_the_tier_is_closed(root: Path, make: MakeObject) -> None:
    """A rescan in the background does not hold up a shutdown."""
    writer, tier = FileTier(root), FileTier(root)
    for number in range(20):
        object_id, data = make(number)
        writer.put(object_id, [data])
    rescan = tier.rescan()
    assert isinstance(next(rescan), ScannedObject)
    tier.close()
    assert list(rescan) == []


# --------------------------------------------------------------------- pins


def test_pins_are_every_processs(root: Path) -> None:
    """Recorded by one, seen by another, erased by any; both are harmless to do twice."""
    first, second = FileTier(root), FileTier(root, read_only=True)
    keys = [bytes([number]) * 32 for number in range(3)]
    assert list(second.pins()) == []
    for key in (*keys, keys[0]):
        first.record_pin(key)
    assert set(second.pins()) == set(keys)
    names = sorted(path.name for path in (root / "pins").iterdir())
    assert names == [key.hex() for key in keys]
    assert (root / "pins").stat().st_mode & 0o777 == 0o700
    assert (root / "pins" / names[0]).stat().st_mode & 0o777 == 0o600
    FileTier(root).erase_pin(keys[1])
    first.erase_pin(keys[1])
    assert set(second.pins()) == {keys[0], keys[2]}
    for change in (second.record_pin, second.erase_pin):
        with pytest.raises(TierError, match="read_only"):
            change(keys[0])
    with pytest.raises(TierError, match="32 bytes"):
        first.record_pin(b"short")


def test_other_files_among_the_pins_are_no_pins(root: Path) -> None:
    """What is not named like a key is passed over; a file in place of the folder is told."""
    tier = FileTier(root)
    tier.record_pin(bytes(32))
    for name in ("notes.txt", "00" * 31, "G" * 64, "AB" * 32):
        (root / "pins" / name).write_text("")
    assert list(tier.pins()) == [bytes(32)]
    (root / "pins").rename(root / "away")
    (root / "pins").write_text("")
    for use in (tier.pins, lambda: tier.record_pin(bytes(32))):
        with pytest.raises(TierError, match="a file is where a folder belongs"):
            use()

"""Scanning a root in which anything may be."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.block import (
    ObjectId,
    ObjectKind,
    decode_header,
    encode_header,
    header_length,
)
from erllama_core.interfaces.tier import ScanFailure, ScannedObject
from erllama_tier_disk.layout import temporary_name
from erllama_tier_disk.owner import FOREIGN_GRACE_S, Owner, this_process
from erllama_tier_disk.store import FileTier

MakeObject = Callable[..., tuple[ObjectId, bytes]]


def path_of(tier: FileTier, object_id: ObjectId) -> Path:
    return Path(tier.location(object_id))


def failures(tier: FileTier) -> dict[str, str]:
    return {
        Path(item.location).name: item.reason
        for item in tier.scan()
        if isinstance(item, ScanFailure)
    }


def leftover(tier: FileTier, owner: Owner) -> Path:
    """A temporary file as ``owner`` would leave it."""
    name = temporary_name().replace(str(this_process()), str(owner))
    path = Path(tier.location(ObjectId(ObjectKind.KV, 0, bytes(32)))).parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half an obj")
    return path


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_lists_every_object_with_its_header(tier: FileTier, make: MakeObject) -> None:
    """Name, header, size and time of last use, each object once."""
    objects = dict(make(number, 10_000) for number in range(300))
    for object_id, data in objects.items():
        tier.put(object_id, [data])
    seen = {}
    for found in tier.scan():
        assert isinstance(found, ScannedObject)
        assert found.object_id not in seen
        seen[found.object_id] = found
    assert seen.keys() == objects.keys()
    for object_id, found in seen.items():
        data = objects[object_id]
        assert found.size_bytes == len(data)
        assert data.startswith(found.head)
        assert decode_header(found.head).object_id == object_id
        assert found.last_used_ns == path_of(tier, object_id).stat().st_mtime_ns


def test_reads_the_whole_of_a_long_header(tier: FileTier) -> None:
    """A header longer than the first read is completed."""
    payload = b"payload" * 10
    head = encode_header(
        kind=ObjectKind.KV,
        start=0,
        end=5000,
        namespace=bytes(32),
        key=bytes(32),
        segment_key=bytes(32),
        lead_tokens=b"",
        tokens=bytes(20_000),
        align_tokens=0,
        payload=payload,
        info={},
    )
    tier.put(ObjectId(ObjectKind.KV, 0, bytes(32)), [head, payload])
    (found,) = tier.scan()
    assert isinstance(found, ScannedObject)
    assert found.head == head


def test_a_scan_starts_the_usage_and_corrects_it(root: Path, make: MakeObject) -> None:
    """What others stored counts, what others removed does not."""
    writer = FileTier(root)
    objects = [make(number) for number in range(10)]
    for object_id, data in objects:
        writer.put(object_id, [data])
    reader = FileTier(root)
    assert reader.usage().used_bytes == 0
    assert len(list(reader.scan())) == 10
    assert reader.usage() == writer.usage()
    for object_id, _ in objects[:4]:
        writer.delete(object_id)
    assert len(list(reader.scan())) == 6
    assert reader.usage() == writer.usage()


def test_what_is_no_object_is_told_and_ends_nothing(
    tier: FileTier, root: Path, tmp_path: Path, make: MakeObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipes, sockets, links, folders and foreign files are failures that say why; none blocks."""
    good, data = make(1)
    tier.put(good, [data])
    paths = [path_of(tier, make(number)[0]) for number in range(10, 16)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    fifo, loop, dangling, folder, sock, misplaced = paths
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "nowhere")
    folder.mkdir()
    monkeypatch.chdir(sock.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sock.name)
    objects = root / "objects"
    wrong = objects / ("00" if misplaced.name[:2] != "00" else "01")
    wrong.mkdir(exist_ok=True)
    (wrong / misplaced.name).write_bytes(b"")
    (wrong / "notes.txt").write_text("hello")
    (wrong / f"{misplaced.name}.part").write_text("")
    (wrong / ".abc.tmp").write_text("")
    (wrong / "AB.kvc").write_text("")
    not_random = f".{this_process()}.0123.tmp"
    (wrong / not_random).write_text("")
    (objects / "stray").write_text("")
    (objects / "fff").mkdir()
    expected = {
        fifo.name: "not a regular file",
        loop.name: "not a regular file",
        dangling.name: "not a regular file",
        folder.name: "not a regular file",
        sock.name: "not a regular file",
        misplaced.name: f"belongs into the folder {misplaced.name[:2]}",
        "notes.txt": "not the name of a stored object",
        f"{misplaced.name}.part": "not the name of a stored object",
        ".abc.tmp": "not the name of a stored object",
        "AB.kvc": "not the name of a stored object",
        not_random: "not the name of a stored object",
        "stray": "not a folder of the store: two hex digits",
        "fff": "not a folder of the store: two hex digits",
    }
    assert failures(tier) == expected
    assert [item.object_id for item in tier.scan() if isinstance(item, ScannedObject)] == [good]
    assert tier.usage().used_bytes == len(data)


def test_a_file_or_link_in_place_of_a_folder_is_told(
    tier: FileTier, root: Path, tmp_path: Path
) -> None:
    """Folders of the store are folders, not files and not links to some."""
    (root / "objects" / "aa").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (root / "objects" / "bb").symlink_to(tmp_path / "elsewhere")
    assert failures(tier) == {"aa": "not a folder", "bb": "not a folder"}


def test_damaged_objects_are_listed_so_that_they_can_be_deleted(
    tier: FileTier, make: MakeObject
) -> None:
    """Empty, short or garbled files under an object's name keep that name and their size."""
    contents = [b"", b"E", make(20)[1][:100], b"garbage" * 3000]
    expected = {}
    for number, content in enumerate(contents):
        object_id, _ = make(number)
        path_of(tier, object_id).parent.mkdir(exist_ok=True)
        path_of(tier, object_id).write_bytes(content)
        expected[object_id] = content
    found = list(tier.scan())
    assert len(found) == len(contents)
    for item in found:
        assert isinstance(item, ScannedObject)
        content = expected[item.object_id]
        assert item.size_bytes == len(content)
        assert content.startswith(item.head)
        with pytest.raises(CorruptBlock):
            decode_header(item.head)
        assert tier.delete(item.object_id) == len(content)
    assert tier.usage().used_bytes == 0


SCAN_WITHIN = """
import resource, sys
from pathlib import Path
from erllama_tier_disk.store import FileTier

tier = FileTier(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
(found,) = tier.scan()
assert found.size_bytes == 10 << 30
assert len(found.head) <= 1 << 20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize("header_bytes", [0, 1 << 20])
def test_a_huge_file_is_not_read_by_a_scan(
    tier: FileTier, make: MakeObject, header_bytes: int
) -> None:
    """Of 10 GiB under an object's name only the start is read, whatever that start claims."""
    object_id, data = make(1)
    path = path_of(tier, object_id)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        if header_bytes:
            start = data[:12] + header_bytes.to_bytes(4, "little")
            assert header_length(start) == header_bytes
            file.write(start)
        file.truncate(10 << 30)
    command = [sys.executable, "-c", SCAN_WITHIN, str(path.parents[2])]
    subprocess.run(command, check=True, timeout=30)


def test_objects_that_vanish_during_a_scan_are_passed_over(
    tier: FileTier, root: Path, make: MakeObject
) -> None:
    """Files and folders that another process removes meanwhile are no failures."""
    for number in range(50):
        object_id, data = make(number)
        tier.put(object_id, [data])
    scan = tier.scan()
    first = next(scan)
    assert isinstance(first, ScannedObject)
    for path in list(root.rglob("*.kvc")):
        path.unlink()
    for folder in list((root / "objects").iterdir()):
        folder.rmdir()
    assert list(scan) == []
    assert tier.usage().used_bytes == first.size_bytes
    assert list(tier.scan()) == []
    assert tier.usage().used_bytes == 0


def test_deleting_while_scanning(tier: FileTier, make: MakeObject) -> None:
    """A caller may delete what it is given; the accounting stays exact."""
    for number in range(100):
        object_id, data = make(number)
        tier.put(object_id, [data])
    for found in tier.scan():
        assert isinstance(found, ScannedObject)
        assert tier.delete(found.object_id) == found.size_bytes
    assert tier.usage().used_bytes == 0
    assert list(tier.scan()) == []


def test_closing_ends_a_scan(tier: FileTier, make: MakeObject) -> None:
    """A scan in the background does not hold up a shutdown, and raises nothing."""
    for number in range(20):
        object_id, data = make(number)
        tier.put(object_id, [data])
    scan = tier.scan()
    next(scan)
    tier.close()
    assert list(scan) == []


def test_an_abandoned_scan_holds_no_descriptor(tier: FileTier, make: MakeObject) -> None:
    """A scan that is never finished keeps nothing open."""
    for number in range(5):
        object_id, data = make(number)
        tier.put(object_id, [data])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 10, hard))
    try:
        abandoned = [tier.scan() for _ in range(50)]
        for scan in abandoned:
            assert isinstance(next(scan), ScannedObject)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_leftovers_of_dead_writers_are_swept(tier: FileTier) -> None:
    """Gone: a dead process's files, an earlier boot's, those of an earlier use of a live id."""
    here = this_process()
    gone = [
        leftover(tier, Owner(here.boot, here.namespace, dead_process(), 0)),
        leftover(tier, Owner("0" * 32, here.namespace, os.getpid(), here.started)),
        leftover(tier, Owner(here.boot, here.namespace, 1 << 40, 0)),
    ]
    if here.started:
        gone.append(leftover(tier, Owner(here.boot, here.namespace, here.pid, here.started + 1)))
    with capture_logs() as logs:
        assert list(tier.scan()) == []
    assert not any(path.exists() for path in gone)
    (event,) = logs
    assert event["event"] == "tier.swept"
    assert event["files"] == len(gone)
    assert event["size_bytes"] == 11 * len(gone)


def test_files_that_may_still_be_written_are_left_alone(tier: FileTier) -> None:
    """Kept: files of living processes, and young ones of containers that cannot be seen."""
    here = this_process()
    foreign = Owner(here.boot, here.namespace + 1, 4_000_000, 1)
    kept = [
        leftover(tier, here),
        leftover(tier, Owner(here.boot, here.namespace, 1, 0)),
        leftover(tier, foreign),
    ]
    stale = leftover(tier, foreign)
    long_ago = time.time() - FOREIGN_GRACE_S - 1
    os.utime(stale, (long_ago, long_ago))
    assert list(tier.scan()) == []
    assert all(path.exists() for path in kept)
    assert not stale.exists()


def test_a_read_only_scan_sweeps_nothing(tier: FileTier, root: Path) -> None:
    """Leftovers stay where only reading was asked for."""
    path = leftover(tier, Owner("0" * 32, 0, 1, 1))
    assert list(FileTier(root, read_only=True).scan()) == []
    assert path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a.1.2",
        "a.1.2.3.4",
        "a.1.2.x",
        "a.01.2.3",
        "a.1.-2.3",
        "a.1.0.3",
        "../a.1.2.3",
        "a.1.2. 3",
    ],
)
def test_no_other_text_names_a_process(text: str) -> None:
    """A foreign file is never taken for a leftover."""
    with pytest.raises(ValueError):  # noqa: PT011 - several messages, one meaning
        Owner.parse(text)


def test_names_of_processes_round_trip() -> None:
    """Whatever this machine's process is called, its name is understood."""
    assert Owner.parse(str(this_process())) == this_process()
    assert this_process().may_live(0.0)

"""Writers that are killed: what was published is whole, what was not is swept."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from erllama_core.interfaces.block import verify_object
from erllama_core.interfaces.tier import ScannedObject
from erllama_tier_disk.store import FileTier

WRITER = """
import hashlib, os, random, signal, sys
from pathlib import Path
from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header
from erllama_tier_disk import store

root, point, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
choice = random.Random(seed)
tier = store.FileTier(root)
parent = os.getppid()

def put(number):
    payload = hashlib.sha256(f"{number}".encode()).digest() * (1 + number % 7 * 4096)
    key = hashlib.sha256(f"key {number}".encode()).digest()
    head = encode_header(
        kind=ObjectKind.KV, start=0, end=1, namespace=bytes(32), key=key, segment_key=bytes(32),
        lead_tokens=b"", tokens=bytes(4), align_tokens=256, payload=payload, info={},
    )
    object_id = ObjectId(ObjectKind.KV, 0, key)
    tier.put(object_id, [head, payload], durable=choice.random() < 0.1)
    return object_id

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

writev = os.writev

def write_half_and_die(fd, parts):
    writev(fd, [parts[0], parts[-1][: len(parts[-1]) // 2]])
    die()

put(1)
if point == "write":
    os.writev = write_half_and_die
elif point == "rename":
    Path.replace = die
elif point == "anchor":
    store.FileTier._anchor = die
elif point == "sync":
    store.sync_file = die
print("ready", flush=True)
while os.getppid() == parent:
    number = choice.randrange(40)
    object_id = put(number)
    if number != 1 and choice.random() < 0.2:
        tier.delete(object_id)
"""


@contextlib.contextmanager
def writing(root: Path, point: str, seed: int) -> Iterator[subprocess.Popen[str]]:
    """A process that puts and deletes objects until it is killed, at the latest on leaving."""
    command = [sys.executable, "-c", WRITER, str(root), point, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            yield writer
        finally:
            writer.kill()


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob("*.tmp"))


def check_store(root: Path) -> None:
    """Open the store anew: every object is whole, and nothing else is there."""
    tier = FileTier(root)
    count = total = 0
    for found in tier.scan():
        assert isinstance(found, ScannedObject)
        data = tier.read(found.object_id, lambda size: memoryview(bytearray(size)))
        verify_object(data, found.object_id)
        count += 1
        total += len(data)
    assert count >= 1
    assert temporaries(root) == []
    assert tier.usage().used_bytes == total


@pytest.mark.parametrize(
    ("point", "leaves"), [("write", 1), ("sync", 1), ("rename", 1), ("anchor", 0)]
)
def test_killed_at_a_known_point(root: Path, point: str, leaves: int) -> None:
    """Half written or not yet renamed: swept; renamed: there and whole."""
    with writing(root, point, seed=1) as writer:
        assert writer.wait(timeout=30) == -signal.SIGKILL
    assert len(temporaries(root)) == leaves
    check_store(root)


def kill_at_random(root: Path, rounds: int, seed: int) -> None:
    choice = random.Random(seed)
    for number in range(rounds):
        with writing(root, "none", 2 * number), writing(root, "none", 2 * number + 1):
            # Not a wait for something: it only spreads the moment of the kill.
            time.sleep(choice.uniform(0.0, 0.03))
        check_store(root)


def test_killed_at_random_moments(root: Path) -> None:
    """Two writers on one root, killed again and again, never leave a damaged object."""
    kill_at_random(root, rounds=5, seed=5)


@pytest.mark.crash
def test_killed_at_many_random_moments(root: Path) -> None:
    """The same, long enough to meet the rare moments."""
    kill_at_random(root, rounds=100, seed=6)


def test_a_scan_beside_living_writers_takes_nothing_from_them(root: Path) -> None:
    """Files that are being written survive the scans of other processes."""
    tier = FileTier(root)
    with writing(root, "none", 1) as first, writing(root, "none", 2) as second:
        for _ in range(20):
            for found in tier.scan():
                assert isinstance(found, ScannedObject)
        assert first.poll() is None
        assert second.poll() is None
    tier.close()  # it is the root's janitor until then, and only that one sweeps
    check_store(root)

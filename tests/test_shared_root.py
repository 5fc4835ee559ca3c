"""A disk root under hard use: trouble in it, and processes that are killed while they save."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from erllama_core import Cache, NamedTier
from erllama_core.interfaces.block import Header, verify_object
from erllama_core.interfaces.tier import ScanFailure
from erllama_tier_disk.store import FileTier
from stub_engine import load_stub, make_engine
from torture.store import headers, is_kept, temporaries

TESTS = Path(__file__).parent


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


# ------------------------------------------------------------------ trouble

TROUBLE = """
import errno, json, os, resource, shutil, sys, time
from pathlib import Path
from structlog.testing import capture_logs
from stub_engine import load_stub, make_engine

base, trouble = Path(sys.argv[1]), sys.argv[2]
known = ["What was stored before the trouble began. " * 3, "And something else as well. " * 4]
rounds = [[*known, f"{number} is a prompt of this round. " * 4] for number in range(4)]

def complete(model, prompt):
    return model.complete(prompt, response_tokens=4)

with make_engine(base / "warm") as engine:  # and everything is imported
    model = load_stub(engine, tier=["disk"])
    expected = {prompt: complete(model, prompt).generated for part in rounds for prompt in part}
if os.geteuid() == 0:
    shutil.rmtree(base / "warm")
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

root = base / "store"
with make_engine(root) as engine, capture_logs() as logs:
    model = load_stub(engine, tier=["disk"])
    engine.cache.wait_scanned(30)
    for prompt in known:
        complete(model, prompt)
    engine.flush()
    row = max(engine.cache.dump(), key=lambda row: (row.kind == "kv", row.start == 0))
    file = Path(row.location)
    match trouble:
        case "full":
            def writev(fd, parts):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.writev = writev
        case "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        case "permission":
            (root / "objects").chmod(0)
        case "deleted":
            shutil.rmtree(root)
        case "clock":
            for path in root.rglob("*"):
                os.utime(path, (time.time() + 3600, time.time() + 3600))
        case "unreadable":
            file.chmod(0)
        case "folder":
            file.unlink()
            file.mkdir()
        case "pipe":
            file.unlink()
            os.mkfifo(file)
    hits = []
    for part in rounds:
        for prompt in part:
            done = complete(model, prompt)
            assert done.generated == expected[prompt], prompt
            hits.append(done.cache_hit_kind)
        engine.flush()
    counters = engine.cache.counters()
    if trouble == "permission":
        (root / "objects").chmod(0o700)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
warnings = [entry["event"] for entry in logs if entry["log_level"] in {"warning", "error"}]
print(json.dumps([warnings, hits, counters.tier_errors, counters.saves_dropped]))
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder of an ordinary user's, whom permissions concern."""
    folder = Path(tempfile.mkdtemp(prefix="erllama-trouble-"))
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("trouble", "warns"),
    [
        ("full", True),
        ("limit", True),
        ("permission", True),
        ("deleted", False),
        ("clock", False),
        ("unreadable", True),
        ("folder", True),
        ("pipe", True),
    ],
)
def test_trouble_in_a_root_never_fails_a_request(base: Path, trouble: str, warns: bool) -> None:
    """Replies are the cold ones; trouble is counted, and one warning, not one per request."""
    done = subprocess.run(
        [sys.executable, "-c", TROUBLE, str(base), trouble],
        check=True,
        timeout=60,
        env=environment(),
        stdout=subprocess.PIPE,
    )
    warnings, hits, tier_errors, dropped = json.loads(done.stdout)
    assert warnings == (["tier.failed"] if warns else [])
    assert (tier_errors > 0) is warns
    assert (dropped > 0) is (trouble in {"full", "limit", "permission"})
    # Of three prompts in each round, the first two were stored, and the first one's is spoiled.
    if trouble in {"limit", "clock", "unreadable", "folder", "pipe"}:
        assert hits[1::3] == ["exact"] * 4
    if trouble == "deleted":
        assert hits[-3:-1] == ["exact", "exact"]


# ---------------------------------------------------------------- read-only

READING = """
import os, sys
from pathlib import Path
from stub_engine import load_stub, make_engine

def run(root):
    tier = {"name": "disk", "kind": "disk", "root": root, "read_only": True,
            "rescan_interval_s": 0.01}
    with make_engine(tiers=[tier]) as engine:
        model = load_stub(engine, tier=["ram", "disk"])
        assert engine.cache.wait_scanned(30)
        kinds = [model.complete(p, response_tokens=4).cache_hit_kind for p in sys.argv[3:]]
        engine.flush()
        store = engine.cache.catalog.store("disk")
        assert not store.leads()
        assert list(store.tier.rescan()) == []
        assert list(store.tier.pins()) == []
        return kinds

if os.geteuid() == 0:
    run(sys.argv[2])  # and everything is imported
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
assert run(sys.argv[1]) == ["exact", "cold"]
"""


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a folder, with all that a write would change."""
    found: dict[str, tuple[int, ...]] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (
            status.st_mode,
            status.st_ino,
            status.st_nlink,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found


def test_reading_only_never_writes(base: Path) -> None:
    """No folder, lock, pin or time of use: as one who may not write, and as one who may."""
    root = base / "store"
    stored, unknown = "Somebody else stored this. " * 4, "Nobody stored this, or will. " * 4
    with make_engine(root) as engine:
        load_stub(engine, tier=["disk"]).complete(stored, response_tokens=4)
    (root / "janitor.lock").unlink(missing_ok=True)
    old = time.time() - 3600
    for path in [*root.rglob("*"), root]:
        os.utime(path, (old, old))
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(base)
    command = [sys.executable, "-c", READING, str(root), str(root), stored, unknown]
    subprocess.run(command, check=True, timeout=60, env=environment())
    assert tree(base) == before
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)


# ------------------------------------------------------------------- killed

SAVERS = """
import os, random, signal, sys
from pathlib import Path
from stub_engine import load_stub, make_engine

def save(root, kv_class, seed):
    chance = random.Random(seed)
    tiers = [{"name": "disk", "kind": "disk", "root": root, "rescan_interval_s": 0.02}]
    with make_engine(tiers=tiers) as engine:
        model = load_stub(engine, tier=["disk"], kv_class=kv_class)
        print(os.getpid(), flush=True)
        while True:
            # Half of the contexts are everybody's, half are this process's own.
            own = chance.choice([f"process {seed} and its", "everybody's and nobody's"])
            number = chance.randrange(40)
            model.complete(f"{own} context number {number} " * (1 + number % 5), response_tokens=4)
            engine.flush()

# The processes are forked from this one, which has no engine: starting each anew takes a second.
with make_engine() as engine:
    load_stub(engine).complete("and everything is imported", response_tokens=2)
for line in sys.stdin:
    order, number = line.split()
    if order == "start":
        if os.fork() == 0:
            save(sys.argv[1], sys.argv[2], int(number))
    else:
        os.kill(int(number), signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(int(number), 0)[1]), flush=True)
"""


class Savers:
    """Processes that save contexts to one root until they are killed."""

    def __init__(self, root: Path, kv_class: str) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", SAVERS, str(root), kv_class],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._running: list[int] = []

    def start(self, seed: int) -> None:
        self._running.append(self._tell(f"start {seed}"))

    def kill_one(self) -> None:
        """The oldest dies, and is gone when this returns."""
        assert self._tell(f"kill {self._running.pop(0)}") == -signal.SIGKILL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self.kill_one()
        self._parent.communicate()

    def _tell(self, order: str) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(order + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())


def kill_savers(root: Path, kv_class: str, rounds: int, seed: int) -> int:
    """Four processes at a time, killed at random moments; how many files they published."""
    chance = random.Random(seed)
    published: dict[Path, Header] = {}
    with Savers(root, kv_class) as savers:
        for number in range(rounds):
            for index in range(4):
                savers.start(4 * number + index)
            for _ in range(4):
                # Not a wait for something: it only spreads the moments of the kills.
                time.sleep(chance.uniform(0.0, 0.06))
                published |= headers(root)
                savers.kill_one()
            check_root(root, published)
    return len(published)


def check_root(root: Path, published: dict[Path, Header]) -> None:
    """Open the root as the next process would: whole, complete, and swept by its janitor."""
    tier = FileTier(root, rescan_interval_s=0)
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        assert cache.wait_scanned(30)
        assert cache.counters().corrupt == 0
        rows = cache.dump()
        there = headers(root)
        assert {Path(row.location) for row in rows} == set(there)
        lost = [published[path] for path in published.keys() - there.keys()]
        assert all(is_kept(header, there.values()) for header in lost)
        assert tier.lead()
        for found in tier.scan():
            assert not isinstance(found, ScanFailure)
            data = tier.read(found.object_id, lambda size: memoryview(bytearray(size)))
            verify_object(data, found.object_id)
        assert temporaries(root) == []
        assert tier.usage().used_bytes == sum(row.size_bytes for row in rows)


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
def test_processes_killed_while_they_save_lose_nothing(tmp_path: Path, kv_class: str) -> None:
    """Whenever they are killed, the root opens, all that was published is there and whole."""
    assert kill_savers(tmp_path, kv_class, rounds=3, seed=1) > 0
    with make_engine(tmp_path) as engine, make_engine() as alone:
        model = load_stub(engine, tier=["disk"], kv_class=kv_class)
        expected = load_stub(alone, kv_class=kv_class)
        assert engine.cache.wait_scanned(30)
        for number in range(10):
            prompt = f"everybody's and nobody's context number {number} " * (1 + number % 5)
            done: Any = model.complete(prompt, response_tokens=4)
            assert done.generated == expected.complete(prompt, response_tokens=4).generated


@pytest.mark.crash
@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
def test_many_processes_killed_while_they_save_lose_nothing(tmp_path: Path, kv_class: str) -> None:
    """The same, hundreds of times."""
    assert kill_savers(tmp_path, kv_class, rounds=40, seed=2) > 100

"""Tiers that other processes use, too: discovery on a miss, upkeep, and what may go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from structlog.testing import capture_logs

from erllama_core import BlockMeta, Cache, Engine, Model, NamedTier
from erllama_core.cache import discovery
from erllama_core.errors import TierError
from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header
from erllama_core.interfaces.tier import (
    FoundObject,
    Gone,
    ScanFailure,
    ScannedObject,
    Tier,
)
from erllama_tier_disk.store import FileTier
from stub_engine import KV_CLASSES, load_stub, make_engine
from waiting import wait_until

PROMPT = ("What one process has computed, another one need not compute: not even at once. " * 3)[
    :224
]
"""Seven blocks of 32 tokens. A rest would become part of the reply's block, which no other prompt
can name."""

OTHER = """
import sys
from pathlib import Path
from stub_engine import load_stub, make_engine

root, kv_class = Path(sys.argv[1]), sys.argv[2]
tiers = [{"name": "disk", "kind": "disk", "root": str(root), "rescan_interval_s": 0}]
with make_engine(tiers=tiers) as engine:
    model = load_stub(engine, tier=["disk"], kv_class=kv_class)
    engine.cache.wait_scanned(30)
    print("ready", flush=True)
    for line in sys.stdin:
        done = model.complete(line.rstrip("\\n"), response_tokens=8)
        engine.flush()
        print(done.cache_delta.read, done.cache_hit_kind, flush=True)
"""


class Other:
    """An engine in another process, which answers prompts of one line."""

    def __init__(self, root: Path, kv_class: str) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
        self.popen = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(root), kv_class],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._answer() == ["ready"]

    def complete(self, prompt: str) -> tuple[int, str]:
        """Tokens that were read, and the kind of hit."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(prompt + "\n")
        self.popen.stdin.flush()
        read, kind = self._answer()
        return int(read), kind

    def _answer(self) -> list[str]:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().split()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[str], Other]]:
    with contextlib.ExitStack() as stack:

        def start(kv_class: str) -> Other:
            started = Other(tmp_path, kv_class)
            stack.enter_context(started.popen)
            stack.callback(started.popen.kill)
            return started

        yield start


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiers = [{"name": "disk", "kind": "disk", "root": str(tmp_path), "rescan_interval_s": 0}]
    with make_engine(tiers=tiers) as engine:
        yield engine


def disk_of(engine: Engine) -> FileTier:
    tier = engine.cache.catalog.store("disk").tier
    assert isinstance(tier, FileTier)
    return tier


def ready(engine: Engine, kv_class: str = "span") -> Model:
    model = load_stub(engine, tier=["disk"], kv_class=kv_class)
    assert engine.cache.wait_scanned(10)
    return model


# ---------------------------------------------------------------- discovery


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_second_engine_hits_what_the_first_just_saved(
    engine: Engine, other: Callable[[str], Other], kv_class: str
) -> None:
    """Two live engines on one root, no rescan between: each finds the other's new prompt."""
    model = ready(engine, kv_class=kv_class)
    process = other(kv_class)
    first = model.complete(PROMPT, response_tokens=8)
    assert first.cache_delta.read == 0
    engine.flush()
    assert process.complete(PROMPT) == (224, "exact")
    mine = PROMPT[::-1]
    assert process.complete(mine)[0] == 0
    again = model.complete(mine, response_tokens=8)
    assert (again.cache_delta.read, again.cache_hit_kind) == (224, "exact")


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
def test_a_longer_prompt_finds_the_blocks_before_it(
    engine: Engine, other: Callable[[str], Other], kv_class: str
) -> None:
    """The next turn of a conversation that another process served goes on from whole blocks."""
    model = ready(engine, kv_class=kv_class)
    other(kv_class).complete(PROMPT)
    longer = model.complete(PROMPT + "And then? " * 5, response_tokens=8)
    assert longer.cache_delta.read == (224 if kv_class == "span" else 0)
    with make_engine() as alone:
        expected = load_stub(alone, kv_class=kv_class).complete(
            PROMPT + "And then? " * 5, response_tokens=8
        )
    assert longer.generated == expected.generated


def test_a_prompt_that_begins_like_a_known_one_is_looked_for_too(
    engine: Engine, other: Callable[[str], Other]
) -> None:
    """Where a known context is left inside a block, another's branch or whole block is found."""
    model = ready(engine)
    process = other("span")
    # Neither process knows the other's; both begin alike, as with a template's first words.
    mine, theirs = PROMPT[:5] + "1" * 59, PROMPT[:5] + "2" * 59
    model.complete(mine, response_tokens=8)
    process.complete(theirs)
    assert model.complete(theirs, response_tokens=8).cache_hit_kind == "exact"
    engine.flush()
    # Now both know these; what goes on from the middle of one is stored from there.
    branch = theirs[:40] + "3" * 56
    assert process.complete(branch)[0] == 40
    assert model.complete(branch, response_tokens=8).cache_delta.read == len(branch) == 96


def count_finds(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> list[ObjectId]:
    asked: list[ObjectId] = []
    find = tier.find

    def note(object_id: ObjectId) -> FoundObject | None:
        asked.append(object_id)
        return find(object_id)

    monkeypatch.setattr(tier, "find", note)
    return asked


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_miss_costs_one_stat_and_a_hit_none(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kv_class: str
) -> None:
    """An unknown prompt is looked for once; a known, or a short one, not at all."""
    model = ready(engine, kv_class=kv_class)
    asked = count_finds(disk_of(engine), monkeypatch)
    model.complete(PROMPT, response_tokens=8)
    engine.flush()
    assert len(asked) == 1
    assert model.complete(PROMPT, response_tokens=8).cache_hit_kind == "exact"
    model.complete("Too short to be a block.", response_tokens=2)
    assert len(asked) == 1
    # One that leaves a known one inside a block may go on in two ways.
    model.complete(PROMPT[:5] + PROMPT, response_tokens=2)
    assert len(asked) == (2 if kv_class == "whole" else 3)


def test_a_model_without_shared_tiers_looks_nowhere(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is one process's own: nothing is looked for, and no thread is started for it."""
    asked = count_finds(disk_of(engine), monkeypatch)
    load_stub(engine).complete(PROMPT, response_tokens=8)
    assert asked == []
    assert not [t for t in threading.enumerate() if t.name.startswith("erllama-discovery")]


def test_what_was_found_and_is_damaged_is_computed(
    engine: Engine, other: Callable[[str], Other], tmp_path: Path
) -> None:
    """A name is a promise; what is under it is checked before it is used."""
    model = ready(engine)
    other("span").complete(PROMPT)
    for path in tmp_path.rglob("*.kvc"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with make_engine() as alone:
        expected = load_stub(alone).complete(PROMPT, response_tokens=8)
    assert model.complete(PROMPT, response_tokens=8).generated == expected.generated
    assert engine.cache.counters().corrupt > 0


def test_a_tier_that_hangs_delays_one_request_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that is overdue is given up; until it comes back, nobody begins another."""
    monkeypatch.setattr(discovery, "PATIENCE_S", 0.01)
    model = ready(engine)
    tier = disk_of(engine)
    released, asked = threading.Event(), []

    def hang(object_id: ObjectId) -> None:
        asked.append(object_id)
        assert released.wait(60)

    monkeypatch.setattr(tier, "find", hang)
    assert model.complete(PROMPT, response_tokens=2).finish_reason == "length"
    assert model.complete(PROMPT[::-1], response_tokens=2).finish_reason == "length"
    assert len(asked) == 1
    released.set()


def test_a_tier_that_fails_rests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed search is counted and logged once; the next requests look nowhere."""
    model = ready(engine)
    tier = disk_of(engine)
    asked = []

    def fail(object_id: ObjectId) -> None:
        asked.append(object_id)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tier, "find", fail)
    with capture_logs() as logs:
        for first in "123":
            assert model.complete(first + PROMPT, response_tokens=2).cache_delta.read == 0
    assert len(asked) == 1
    assert engine.cache.counters().tier_errors == 1
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["tier.failed"]


def test_closing_answers_those_that_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose search hangs ends with its engine."""
    monkeypatch.setattr(discovery, "PATIENCE_S", 0.05)
    model = ready(engine)
    released = threading.Event()
    monkeypatch.setattr(disk_of(engine), "find", lambda _: released.wait(60) and None)
    stream = model.infer(PROMPT, response_tokens=2)
    with capture_logs() as logs:
        engine.close()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
        "discovery.abandoned"
    ]
    released.set()
    with contextlib.suppress(Exception):
        stream.result()


# ------------------------------------------------------------------- upkeep


class Told:
    """A disk tier whose rescans can be waited for."""

    def __init__(self, root: Path, *, quota_bytes: int | None = None, interval_s: float) -> None:
        self.tier = FileTier(root, quota_bytes=quota_bytes, rescan_interval_s=interval_s)
        self.passes = threading.Semaphore(0)
        rescan = self.tier.rescan

        def counted() -> Iterator[ScannedObject | ScanFailure | Gone]:
            yield from rescan()
            self.passes.release()

        self.tier.rescan = counted  # type: ignore[method-assign]
        self.cache = Cache([NamedTier("disk", "disk", self.tier)])
        assert self.cache.wait_scanned(10)

    def wait_for_passes(self, count: int = 3) -> None:
        """A pass that began after the call is over: the third scan begins behind the second pass,
        eviction included, and the first one may have begun before."""
        while self.passes.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self.passes.acquire(timeout=30)

    def known(self) -> set[bytes]:
        return {row.key for row in self.cache.dump()}


def fill(tier: Tier, count: int) -> list[ObjectId]:
    """Store objects that nothing in this process's cache is told of; each of some 1,200 bytes."""
    payload = bytes(1000)
    stored = []
    for number in range(count):
        key = hashlib.sha256(f"key {number}".encode()).digest()
        head = encode_header(
            kind=ObjectKind.KV,
            start=0,
            end=2,
            namespace=bytes(32),
            key=key,
            segment_key=bytes(32),
            lead_tokens=b"",
            tokens=number.to_bytes(8, "little"),
            align_tokens=256,
            payload=payload,
            info={},
        )
        stored.append(ObjectId(ObjectKind.KV, 0, key))
        tier.put(stored[-1], [head, payload])
    return stored


def test_rescans_learn_and_forget(tmp_path: Path) -> None:
    """Without a request, what others store is known soon, and what they remove is not."""
    other = FileTier(tmp_path)
    told = Told(tmp_path, interval_s=0.02)
    with told.cache:
        ids = fill(other, 20)
        told.wait_for_passes()
        assert told.known() == {object_id.key for object_id in ids}
        for object_id in ids[:15]:
            other.delete(object_id)
        told.wait_for_passes()
        assert told.known() == {object_id.key for object_id in ids[15:]}


def test_the_janitor_evicts_what_others_stored(tmp_path: Path) -> None:
    """One of two caches keeps the root to its quota; the other one, used or not, does not."""
    quota = 20_000
    leader = Told(tmp_path, quota_bytes=quota, interval_s=0.02)
    with leader.cache:
        assert leader.tier.lead()
        follower = Told(tmp_path, quota_bytes=quota, interval_s=0.02)
        with follower.cache:
            third = FileTier(tmp_path)
            fill(third, 40)
            leader.wait_for_passes(3)  # a pass keeps to the quota after its rescan
            used = sum(path.stat().st_size for path in tmp_path.rglob("*.kvc"))
            assert 0 < used <= quota
            assert leader.cache.counters().evictions > 0
            follower.wait_for_passes()
            assert follower.cache.counters().evictions == 0
            assert follower.known() == leader.known()
    assert not leader.tier.lead()


def test_the_next_janitor_takes_over(tmp_path: Path) -> None:
    """When the janitor has gone, the quota is kept by one of those that stay."""
    first = Told(tmp_path, quota_bytes=20_000, interval_s=0.02)
    assert first.tier.lead()
    second = Told(tmp_path, quota_bytes=20_000, interval_s=0.02)
    with second.cache:
        first.cache.close()
        fill(FileTier(tmp_path), 40)
        second.wait_for_passes(3)
        assert second.cache.counters().evictions > 0
        assert second.tier.usage().used_bytes <= 20_000


def test_a_smaller_quota_is_kept_from_the_start(tmp_path: Path) -> None:
    """What an earlier run stored beyond today's quota goes, without a save that needs room."""
    fill(FileTier(tmp_path), 40)
    told = Told(tmp_path, quota_bytes=20_000, interval_s=0.02)
    with told.cache:
        told.wait_for_passes(3)
        assert told.tier.usage().used_bytes <= 20_000


def test_upkeep_spares_what_other_processes_use(tmp_path: Path) -> None:
    """Files say when anybody last used them; what the janitor learned long ago is not all."""
    tier = FileTier(tmp_path, quota_bytes=20_000, rescan_interval_s=0)
    ids = fill(tier, 10)
    for number, object_id in enumerate(ids):
        used = time.time() - 10_000 + number
        os.utime(tier.location(object_id), (used, used))
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        assert cache.wait_scanned(10)
        for object_id in ids[:5]:
            os.utime(tier.location(object_id))  # as a read by another process does
        store = cache.catalog.store("disk")
        cache.evictor.make_room(store, tier.usage().used_bytes // 2)
        assert {row.key for row in cache.dump()} == {object_id.key for object_id in ids[:5]}
        cache.gc()  # which was asked for, and spares nothing
        assert cache.dump() == []


def test_a_smaller_quota_is_kept_to_without_rescans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root that one process uses is not looked through, and its quota holds all the same."""
    monkeypatch.setattr("erllama_core.cache.upkeep._PAUSE_S", 0.01)
    tier = FileTier(tmp_path, quota_bytes=20_000, rescan_interval_s=0)
    fill(tier, 10)
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        assert cache.wait_scanned(10)
        cache.set_quota("disk", 5000)
        wait_until(lambda: tier.usage().used_bytes <= 5000)
        assert cache.dump()


def test_times_in_the_future_spare_nothing(tmp_path: Path) -> None:
    """After the clock was set back, files that seem to be used later are worth no more for it."""
    tier = FileTier(tmp_path, quota_bytes=20_000, rescan_interval_s=0)
    ids = fill(tier, 10)
    future = time.time() + 10_000
    for object_id in ids[:5]:
        os.utime(tier.location(object_id), (future, future))
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        assert cache.wait_scanned(10)
        assert all(row.last_used_ns <= time.time_ns() for row in cache.dump())
        catalog = cache.catalog
        for object_id in ids[5:]:
            entry = catalog.get(object_id)
            assert entry is not None
            catalog.touch([entry])
        cache.evictor.make_room(catalog.store("disk"), tier.usage().used_bytes // 2)
        assert {row.key for row in cache.dump()} == {object_id.key for object_id in ids[5:]}


def test_a_save_without_the_lock_evicts_nothing_up_to_an_eighth_above_the_quota(
    tmp_path: Path,
) -> None:
    """Room is the janitor's to make, and upkeep is told; beyond that it is everybody's."""
    leader = FileTier(tmp_path)
    assert leader.lead()
    size = len(fill(leader, 16)) and leader.usage().used_bytes // 16
    tier = FileTier(tmp_path, quota_bytes=16 * size, rescan_interval_s=0)
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        assert cache.wait_scanned(10)
        meta = BlockMeta(
            save_reason="cold",
            fingerprint=bytes(32),
            quant_type="f16",
            quant_bits=16,
            ctx_params_hash=b"",
            tokens=[1],
            context_size=1,
        )
        due = cache.catalog.store("disk").upkeep_due
        assert not due.is_set()
        cache.save("disk", meta, bytes(size // 2))
        assert due.is_set()
        assert cache.counters().evictions == 0
        cache.save("disk", attrs.evolve(meta, tokens=[2]), bytes(2 * size))
        assert cache.counters().evictions > 0
        assert tier.usage().used_bytes <= 18 * size


class Broken(FileTier):
    """A disk tier whose upkeep fails in every way."""

    def lead(self) -> bool:
        raise OSError(5, "Input/output error")

    def rescan(self) -> Iterator[ScannedObject | ScanFailure | Gone]:
        for _ in range(3):
            self.tried.release()
        raise TierError("cannot look")

    tried: threading.Semaphore


def test_upkeep_that_fails_harms_nobody(tmp_path: Path) -> None:
    """Trouble of every pass is counted and logged once; saves and loads go on, closing works."""
    tier = Broken(tmp_path, quota_bytes=20_000, rescan_interval_s=0.01)
    tier.tried = threading.Semaphore(0)
    with capture_logs() as logs:
        with Cache([NamedTier("disk", "disk", tier)]) as cache:
            for _ in range(9):
                assert tier.tried.acquire(timeout=30)
            ids = fill(tier, 3)
            assert cache.catalog.store("disk").leads() is False
            assert cache.counters().tier_errors >= 3
            tier.read(ids[0], lambda size: memoryview(bytearray(size)))
        assert not [t for t in threading.enumerate() if t.name.startswith("erllama-upkeep")]
    warnings = [entry for entry in logs if entry["log_level"] in {"warning", "error"}]
    assert [entry["event"] for entry in warnings] == ["tier.failed"]


def test_closing_does_not_wait_for_a_tier_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that never ends is left behind, with a warning."""
    monkeypatch.setattr("erllama_core.cache.upkeep._CLOSE_S", 0.05)
    tier = FileTier(tmp_path, rescan_interval_s=0.01)
    hangs, released = threading.Event(), threading.Event()

    def hang() -> Iterator[ScannedObject | ScanFailure | Gone]:
        hangs.set()
        assert released.wait(60)
        yield from ()

    monkeypatch.setattr(tier, "rescan", hang)
    cache = Cache([NamedTier("disk", "disk", tier)])
    assert hangs.wait(30)
    with capture_logs() as logs:
        cache.close()
    assert [entry["event"] for entry in logs] == ["upkeep.abandoned"]
    released.set()


def test_a_tier_of_one_process_has_no_upkeep() -> None:
    """Without shared tiers there is no thread for them."""
    with make_engine() as engine:
        assert engine.cache.wait_scanned(10)
        assert not [t for t in threading.enumerate() if t.name.startswith("erllama-upkeep")]

"""After something went wrong: nothing leaks, nobody waits for ever, the cache stays useful."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import gate
from erllama_backend_stub.model import StubModel
from erllama_core import BlockMeta, Cache, CacheDelta, Engine, NamedTier, load_config
from erllama_core.cache import eviction
from erllama_core.cache.entry import Copy
from erllama_core.cache.ram import RamTier
from erllama_core.errors import EngineClosed, PluginFailed, TierError
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.stream import Channel, ProcessorRequest
from erllama_core.interfaces.tier import Allocate, ScanFailure, ScannedObject
from erllama_core.providers import StreamProcessorProvider, TierProvider
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "Whatever breaks in the night, the lamp is lit again on the next evening. " * 2


def engine_with_tier(tier: Any, **sections: Any) -> Engine:
    """An engine whose tier ``own`` is this object."""

    class Plugin:
        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [TierProvider("own", "", lambda _: tier)]

    host = PluginHost()
    host.register(Plugin())
    config = load_config({"tiers": [{"name": "own", "kind": "own"}], **sections}, environ={})
    return Engine(config, plugins=host)


class SlowPathTier:
    """A RAM tier without its shortcut: objects are written and read, as on a disk."""

    def __init__(self, quota_bytes: int = 1 << 30) -> None:
        inner = RamTier(quota_bytes)
        self.put = inner.put
        self.delete = inner.delete
        self.contains = inner.contains
        self.usage = inner.usage
        self.location = inner.location
        self.close = inner.close
        self._read = inner.read
        self._scan = inner.scan
        self.read_error: Exception | None = None
        self.scan_gate: threading.Event | None = None

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        if self.read_error is not None:
            raise self.read_error
        return self._read(object_id, allocate)

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        if self.scan_gate is not None:
            self.scan_gate.wait()
        return self._scan()


# ----------------------------------------------------------------------- cache


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
def test_a_context_larger_than_its_tier_keeps_its_beginning(kv_class: str) -> None:
    """What does not fit is the end, so the beginning is reused by every later request."""
    tiers = [{"name": "ram", "kind": "ram", "quota_bytes": 40_000}]
    with make_engine(tiers=tiers) as engine:
        model = load_stub(engine, kv_class=kv_class, context_opts={"n_ctx": 8000})
        small = model.complete(PROMPT, response_tokens=2)
        engine.flush()
        long = [65 + n % 50 for n in range(4000)]
        model.complete(long, response_tokens=2)
        engine.flush()
        starts = {r.start for r in engine.cache.dump() if r.kind == "kv" and r.end > 200}
        reads = [model.complete(long, response_tokens=2).cache_delta.read for _ in range(2)]
        if kv_class == "span":
            assert min(starts) <= 224
            assert min(reads) > 300
        assert model.complete(PROMPT, response_tokens=2).generated == small.generated


def test_a_long_chain_is_evicted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicting everything looks at each object a few times, not once per block above it."""
    with make_engine() as engine:
        model = load_stub(engine, context_opts={"n_ctx": 20_000})
        model.complete([65 + n % 50 for n in range(12_000)], response_tokens=1)
        engine.flush()
        looks = 0
        plain = eviction.score_ns

        def counting(copy: Copy) -> int:
            nonlocal looks
            looks += 1
            return plain(copy)

        monkeypatch.setattr(eviction, "score_ns", counting)
        rows = len(engine.cache.dump())
        assert rows > 300
        assert engine.cache.gc().rows == rows
        assert looks <= 3 * rows


def test_a_tier_that_could_not_be_read_keeps_its_objects() -> None:
    """After a spell of read errors the same objects hit again, and can still be evicted."""
    tier = SlowPathTier()
    with capture_logs(), engine_with_tier(tier) as engine:
        model = load_stub(engine, tier=["own"])
        first = model.complete(PROMPT, response_tokens=2)
        engine.flush()
        stored = len(engine.cache.dump())
        tier.read_error = OSError(24, "Too many open files")
        assert model.complete(PROMPT, response_tokens=2).generated == first.generated
        engine.flush()
        assert len(engine.cache.dump()) >= stored
        tier.read_error = None
        with engine.cache.catalog.lock:
            for entry in engine.cache.catalog.index:
                for copy in entry.copies:
                    copy.rests_until_s = min(copy.rests_until_s, time.monotonic())
        assert model.complete(PROMPT, response_tokens=2).cache_hit_kind == "exact"
        engine.cache.gc()
        assert tier.usage().used_bytes == 0


def test_damaged_files_do_not_eat_the_quota(tmp_path: Path) -> None:
    """What a scan finds damaged is removed; what it cannot read for its version is evictable."""
    with make_engine(tmp_path) as engine:
        load_stub(engine, tier=["disk"]).complete(PROMPT, response_tokens=2)
    files = sorted(tmp_path.rglob("*.kvc"))
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[60 if number % 2 else 8] ^= 0x41  # the namespace; the format version
        path.write_bytes(data)
    with capture_logs(), make_engine(tmp_path) as engine:
        assert engine.cache.wait_scanned(10)
        assert engine.cache.counters().corrupt == len(files) // 2
        assert len(list(tmp_path.rglob("*.kvc"))) == len(files) - len(files) // 2
        assert load_stub(engine, tier=["disk"]).complete(PROMPT).cache_hit_kind == "cold"
        engine.flush()
        engine.cache.gc()
        assert not list(tmp_path.rglob("*.kvc"))


def test_state_that_is_always_refused_is_dropped() -> None:
    """A stored state that a backend refuses twice does not cost a third request anything."""
    with make_engine() as engine:
        model = load_stub(engine, faults={"short_export": 1})
        hits = []
        for _ in range(6):
            hits.append(model.complete(PROMPT, response_tokens=2).cache_hit_kind)
            engine.flush()
        assert hits[-1] == "exact"
        assert engine.cache.counters().state_rejected == 2


def test_nobody_waits_for_the_scan_of_a_tier_that_is_not_theirs() -> None:
    """While one tier is scanned, models without it are served at once."""
    tier = SlowPathTier()
    tier.scan_gate = threading.Event()
    with engine_with_tier(tier) as engine:
        assert load_stub(engine, "ram").complete(PROMPT, response_tokens=2).reply
        assert not engine.cache.wait_scanned(0)
        waiting = load_stub(engine, "own", tier=["own"]).infer(PROMPT, response_tokens=2)
        tier.scan_gate.set()
        assert waiting.result().reply
        assert engine.cache.wait_scanned(10)


def test_closing_while_a_tier_is_scanned() -> None:
    """A request that waits for the scan is answered when the engine closes."""
    tier = SlowPathTier()
    tier.scan_gate = threading.Event()
    engine = engine_with_tier(tier)
    stream = load_stub(engine, tier=["own"]).infer(PROMPT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    tier.scan_gate.set()
    closing.join(30)
    assert not closing.is_alive()
    with pytest.raises(EngineClosed):
        stream.result()


def test_a_model_without_tiers_finds_nothing() -> None:
    """Neither what another model stored nor what is on its way to a tier."""
    with make_engine() as engine:
        load_stub(engine, "one").complete(PROMPT, response_tokens=2)
        other = load_stub(engine, "two", tier=[]).complete(PROMPT, response_tokens=2)
        assert (other.cache_hit_kind, other.finish_key) == ("cold", None)
        assert other.cache_delta == CacheDelta(0, 0)


def test_two_models_save_the_same_state_to_their_own_tiers(tmp_path: Path) -> None:
    """State on its way to one tier is saved to another one as well, when a model asks."""
    with make_engine(tmp_path) as engine:
        one = load_stub(engine, "one", tier=["ram"])
        two = load_stub(engine, "two", tier=["disk"])
        streams = [model.infer(PROMPT, response_tokens=4) for model in (one, two)]
        for stream in streams:
            stream.result()
        engine.flush()
        rows: dict[str, set[int]] = {"ram": set(), "disk": set()}
        for row in engine.cache.dump():
            rows[row.tier].add(row.end)
        assert rows["ram"] == rows["disk"]


def test_eviction_and_writing_of_one_object_do_not_cross() -> None:
    """A deletion that was decided before the object was stored again does not remove it."""
    tier = SlowPathTier()
    deleting, stored = threading.Event(), threading.Event()
    plain: Callable[[ObjectId], int] = tier.delete

    with Cache([NamedTier("own", "own", tier)]) as cache:
        catalog = cache.catalog
        store = catalog.store("own")

        def late(object_id: ObjectId) -> int:
            deleting.set()
            return plain(object_id)

        tier.delete = late
        meta = BlockMeta(
            save_reason="cold",
            fingerprint=bytes(32),
            quant_type="f16",
            quant_bits=16,
            ctx_params_hash=bytes(32),
            tokens=[1],
            context_size=1,
        )
        key, _, _ = cache.save("own", meta, b"x")
        [entry] = list(catalog.index)
        with store.changing(entry.object_id):
            evicting = threading.Thread(target=cache.gc)
            evicting.start()
            while catalog.get(entry.object_id) is not None:
                assert evicting.is_alive()
            # It is forgotten, not yet deleted; now it is stored again.
            catalog.add_copy(store, entry, 1, 0, "cold")
            stored.set()
        evicting.join(10)
        assert cache.load("own", key)[1] == b"x"


# -------------------------------------------------------------------- requests


def test_a_backend_that_raises_while_saving_loses_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any exception of an export ends that save: no request fails, no room is lost."""

    def careless(*_: Any) -> None:
        raise RuntimeError("careless")

    with capture_logs() as logs, make_engine() as engine:
        model = load_stub(engine, context_opts={"n_ctx": 2000})
        with monkeypatch.context() as patch:
            patch.setattr(StubContext, "export_ranges", careless)
            done = model.complete(PROMPT, response_tokens=500)
            assert len(done.generated) == 500
            assert engine.flush(10)
        blocks = 700 // 32
        failed = [entry for entry in logs if entry["event"] == "save.failed"]
        assert 2 <= len(failed) <= blocks, "once a block, not once a token"
        model.complete(PROMPT, response_tokens=2)
        assert engine.flush(10)
        assert model.complete(PROMPT, response_tokens=2).cache_hit_kind == "exact"


def test_a_processor_that_raises_at_the_end_harms_only_its_request() -> None:
    """finish() raising, for a running, a cancelled and a queued request: all are answered."""

    class Careless:
        def __init__(self, request: ProcessorRequest) -> None:
            self._outlet = request.outlet

        def feed(self, token: int, data: bytes, channel: Channel) -> None:
            self._outlet.send(token, data, channel)

        def flush(self) -> None:
            return

        def finish(self) -> None:
            raise ZeroDivisionError

    class Plugin:
        careless = True

        @hookimpl
        def erllama_stream_processors(self) -> Sequence[StreamProcessorProvider]:
            def make(request: ProcessorRequest) -> Careless | None:
                return Careless(request) if self.careless else None

            return [StreamProcessorProvider("careless", "", make)]

    plugin = Plugin()
    host = PluginHost()
    host.register(plugin)
    held = gate("careless flush")
    faults = {"hang_step": 2, "hang_gate": "careless flush"}
    with capture_logs(), Engine(plugins=host) as engine:
        model = engine.load_model(
            backend="stub", processors=["careless"], model_opts={"faults": faults}
        )
        running = model.infer(PROMPT, response_tokens=5)
        queued = model.infer(PROMPT, response_tokens=5)
        assert held.wait_reached(10)
        queued.cancel()
        plugin.careless = False
        innocent = model.infer(PROMPT, response_tokens=5)
        held.open()
        for stream in (running, queued):
            with pytest.raises(PluginFailed):
                stream.result()
        assert len(innocent.result().generated) == 5


def test_flush_is_not_held_up_by_new_requests() -> None:
    """It waits for what was answered before it was called, however busy the model stays."""
    with make_engine() as engine:
        model = load_stub(engine, context_opts={"n_ctx": 4000, "n_seq_max": 2})
        stop = threading.Event()

        def keep_busy(number: int) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                model.complete(f"{number} {turn} {PROMPT}", response_tokens=3)

        threads = [threading.Thread(target=keep_busy, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert engine.flush(20)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_an_engine_under_stress_answers_correctly(kv_class: str, tmp_path: Path) -> None:
    """Many clients, tiny tiers, cancels and evictions: each reply is the cold one."""
    tiers = [
        {"name": "ram", "kind": "ram", "quota_bytes": 30_000},
        {"name": "disk", "kind": "disk", "root": str(tmp_path), "quota_bytes": 60_000},
    ]
    threads_of = {"writer_threads": 2, "loader_threads": 3}
    prompts = [f"{PROMPT[: 20 * (n % 7) + 5]}{n % 5}" for n in range(24)]
    with make_engine() as engine:
        plain = load_stub(engine, tier=[], kv_class=kv_class)
        expected = {p: plain.complete(p, response_tokens=12).generated for p in prompts}
    wrong: list[str] = []
    with capture_logs(), make_engine(cache=threads_of, tiers=tiers) as engine:
        model = load_stub(
            engine, tier=["ram", "disk"], kv_class=kv_class, context_opts={"n_seq_max": 3}
        )

        def client(number: int) -> None:
            for turn in range(30):
                prompt = prompts[(7 * number + 5 * turn) % len(prompts)]
                stream = model.infer(prompt, response_tokens=12)
                if turn % 6 == number % 6:
                    stream.cancel()
                generated = stream.result().generated
                if generated != expected[prompt][: len(generated)]:
                    wrong.append(prompt)
                if turn % 10 == 9:
                    engine.cache.evict_bytes(10_000)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert engine.flush(10)
        assert model.info().available_seqs == 3
        with engine.cache.catalog.lock:
            copies = [c for entry in engine.cache.catalog.index for c in entry.copies]
        assert [copy.users for copy in copies if copy.users] == []
        for name in ("ram", "disk"):
            used = engine.cache.catalog.store(name).tier.usage().used_bytes
            assert used == sum(c.size_bytes for c in copies if c.tier.name == name)


# --------------------------------------------------------------------- closing


def test_closing_goes_on_when_a_model_cannot_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that raises on close keeps neither other models nor the cache open."""
    plain = StubModel.close
    engine = make_engine(tmp_path)
    for name in ("a", "b"):
        load_stub(engine, name, tier=["disk"]).complete(PROMPT + name, response_tokens=2)

    def careless(self: Any) -> None:
        plain(self)
        raise RuntimeError("careless")

    monkeypatch.setattr(StubModel, "close", careless)
    with capture_logs() as logs:
        engine.close()
    assert [entry["event"] for entry in logs].count("model.not_freed") == 2
    assert list(tmp_path.rglob("*.kvc"))
    with pytest.raises(EngineClosed):
        engine.cache.dump()


def test_a_second_close_waits_for_the_first(tmp_path: Path) -> None:
    """Whoever called close finds everything written when it returns."""
    engine = make_engine(tmp_path)
    model = load_stub(engine, tier=["disk"])
    for number in range(5):
        model.complete(f"{number}{PROMPT}", response_tokens=2)
    written: list[int] = []

    def close() -> None:
        engine.close()
        written.append(len(list(tmp_path.rglob("*.kvc"))))

    threads = [threading.Thread(target=close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(written) == 3
    assert len(set(written)) == 1


def test_closing_waits_for_a_model_that_is_being_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an unloading on another thread still saves finds the cache open."""
    plain = StubModel.close
    is_leaving, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(self: Any) -> None:
        is_leaving.set()
        assert go_on.wait(20)
        plain(self)
        order.append("model")

    def close(cache: Cache) -> None:
        order.append("cache")
        plain_close(cache)

    plain_close = Cache.close
    monkeypatch.setattr(StubModel, "close", slow)
    monkeypatch.setattr(Cache, "close", close)
    engine = make_engine(tmp_path)
    model = load_stub(engine)
    threads = [threading.Thread(target=engine.unload, args=(model,))]
    threads[0].start()
    assert is_leaving.wait(20)
    threads.append(threading.Thread(target=engine.close))
    threads[1].start()
    threads[1].join(0.2)  # it would be over by then
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert order == ["model", "cache"]


def test_usage_that_raises_is_trouble_like_any_other() -> None:
    """A tier whose usage() raises stores nothing and harms nobody."""
    tier = SlowPathTier()

    def broken() -> Any:
        raise TierError("no idea")

    with capture_logs(), engine_with_tier(tier) as engine:
        model = load_stub(engine, tier=["own"])
        tier.usage = broken
        first = model.complete(PROMPT, response_tokens=2)
        assert engine.flush(10)
        assert model.complete(PROMPT, response_tokens=2).generated == first.generated


def test_a_backend_that_raises_while_restoring_computes_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any exception of an import costs time and no more: the prompt is computed."""

    def careless(*_: Any) -> None:
        raise ValueError("careless")

    with capture_logs(), make_engine() as engine:
        model = load_stub(engine)
        first = model.complete(PROMPT, response_tokens=4)
        with monkeypatch.context() as patch:
            patch.setattr(StubContext, "import_ranges", careless)
            again = model.complete(PROMPT, response_tokens=4)
        assert (again.generated, again.cache_hit_kind) == (first.generated, "cold")
        assert engine.cache.counters().state_rejected == 1

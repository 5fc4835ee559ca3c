"""An engine under memory pressure: what gives way, in which order, and that memory comes free."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_backend_stub.faults import gate
from erllama_core import Engine, load_config
from erllama_core.cache.ram import RamTier
from erllama_core.engine import release
from erllama_core.errors import (
    ConfigError,
    EngineClosed,
    ModelNotFound,
    PluginMissing,
)
from erllama_core.interfaces.pressure import PressureReading
from erllama_core.pressure import monitor
from pressure_gauge import Gauge, gauged_engine
from stub_engine import load_stub
from tiny_gguf import write_tiny_gguf

PROMPT = "When the oil runs short the lamps of the outer harbour are put out first, one by one. "


@pytest.fixture(autouse=True)
def _confirmed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is a moment's peak: the second reading need not wait for its end."""
    monkeypatch.setattr(monitor, "CONFIRM_AFTER_S", 0.001)


@pytest.fixture
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a worker that is held until the test lets it go: any wait for it is in vain."""
    monkeypatch.setattr(release, "RESIDENTS_TIMEOUT_S", 0.05)


def fill(engine: Engine, model_id: str = "stub", n: int = 10, **options: Any) -> None:
    """Requests of different prompts, their state in the tiers."""
    model = load_stub(engine, model_id, **options)
    for number in range(n):
        model.complete(f"{number} {PROMPT}", response_tokens=4)
    assert engine.flush()


def in_ram(engine: Engine) -> int:
    return sum(row.size_bytes for row in engine.cache.dump() if row.tier == "ram")


# ------------------------------------------------------------------ what gives way


def test_ram_gives_way_down_to_the_low_watermark() -> None:
    """At the high watermark RAM loses what is above the low one, least worth first; not more."""
    gauge = Gauge(total=100_000)
    with gauged_engine(gauge) as engine:
        now_ns = 0
        engine.cache.catalog.clock = lambda: now_ns
        fill(engine, n=1)
        for number in range(1, 20):
            now_ns += 600_000_000_000
            engine.complete("stub", f"{number} {PROMPT}", response_tokens=4)
            engine.flush()
        held = in_ram(engine)
        gauge.used = 79_999
        assert engine.pressure.force_check().releases == 0
        assert in_ram(engine) == held
        gauge.used = 80_000
        status = engine.pressure.force_check()
        released = status.last_release
        assert released is not None
        assert released.wanted_bytes == 30_000
        assert 30_000 <= released.freed_bytes < 35_000
        assert held - in_ram(engine) <= released.freed_bytes
        assert (released.residents, released.unloaded) == (0, None)
        assert status.freed_bytes == released.freed_bytes
        model = engine.model("stub")
        assert model.complete(f"19 {PROMPT}", response_tokens=4).cache_hit_kind == "exact"
        assert model.complete(f"0 {PROMPT}", response_tokens=4).cache_hit_kind == "cold"
    engine.close()
    assert [event.released_bytes for event in gauge.told] == [0, released.freed_bytes]
    assert gauge.told[1].readings == (PressureReading("gauge", 80_000, 100_000),)


def test_only_the_tiers_named_give_way(tmp_path: Path) -> None:
    """Tiers are named by name or kind; a disk keeps what it has unless it is named."""
    tiers = [{"name": "files", "kind": "disk", "root": str(tmp_path)}]
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, tiers=tiers, pressure={"min_evict_bytes": "1GiB"}) as engine:
        fill(engine, tier=["ram", "files"])
        on_disk = [row for row in engine.cache.dump() if row.tier == "files"]
        engine.pressure.force_check()
        assert in_ram(engine) == 0
        assert [row for row in engine.cache.dump() if row.tier == "files"] == on_disk
        engine.pressure.set_thresholds(evict_tiers=["disk"])
        engine.pressure.force_check()
        assert engine.cache.dump() == []


def test_pins_stay() -> None:
    """What is pinned is not given back."""
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, pressure={"min_evict_bytes": "1GiB"}) as engine:
        fill(engine, n=3)
        kept = engine.model("stub").prefill_only(PROMPT, pin=True)
        engine.flush()
        engine.pressure.force_check()
        assert {row.pinned for row in engine.cache.dump()} == {True}
        again = engine.model("stub").prefill_only(PROMPT)
        assert (again.cache_hit_kind, again.finish_key) == ("exact", kept.finish_key)


def test_idle_sequences_go_next_and_their_state_is_saved(tmp_path: Path) -> None:
    """When RAM gave too little, idle sequences give back their cells, saved where they can be."""
    tiers = [{"name": "disk", "kind": "disk", "root": str(tmp_path)}]
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, tiers=tiers, pressure={"min_evict_bytes": "1GiB"}) as engine:
        model = load_stub(
            engine,
            tier=["ram", "disk"],
            context_opts={"resident_cells_max": 1024},
        )
        session = model.infer(PROMPT, response_tokens=4, session_id="s").result()
        model.complete("another " + PROMPT, response_tokens=4)
        engine.flush()
        assert model.info().pinned_idle_seqs == 1
        engine.cache.gc()  # so that it has to be saved again
        status = engine.pressure.force_check()
        assert status.last_release is not None
        assert status.last_release.residents == 2
        assert status.last_release.unloaded is None
        assert model.info().pinned_idle_seqs == 0
        assert in_ram(engine) == 0, "nor is anything left of what was saved for them"
        # The session goes on, its state comes from the disk.
        again = model.continue_session(
            [65, 66], session_id="s", expect_committed=session.context_tokens, response_tokens=4
        ).result()
        assert again.cache_delta.read == len(session.context_tokens)
        assert engine.pressure.force_check().last_release is not None


def test_what_idle_sequences_put_into_memory_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that is saved for a sequence is waited for, so that RAM does not get it afterwards."""
    tiers = [{"name": "disk", "kind": "disk", "root": str(tmp_path)}]
    gauge = Gauge(used=1000)
    waited_for, keep = threading.Event(), RamTier.keep
    with gauged_engine(gauge, tiers=tiers, pressure={"min_evict_bytes": "1GiB"}) as engine:
        model = load_stub(engine, tier=["ram", "disk"], context_opts={"resident_cells_max": 1024})
        model.complete(PROMPT, response_tokens=4)
        engine.flush()
        engine.cache.gc()
        flush = engine.cache.flush

        def flush_and_tell(timeout_s: float | None = None) -> bool:
            waited_for.set()
            return flush(timeout_s)

        def keep_late(*arguments: Any) -> None:
            waited_for.wait(1)
            keep(*arguments)

        monkeypatch.setattr(engine.cache, "flush", flush_and_tell)
        monkeypatch.setattr(RamTier, "keep", keep_late)
        engine.pressure.force_check()
        flush()
        assert {row.tier for row in engine.cache.dump()} == {"disk"}


def test_nothing_is_saved_to_memory_to_free_memory() -> None:
    """Idle sequences of a model whose tiers are all memory are not saved, only to go again."""
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, pressure={"min_evict_bytes": "1GiB"}) as engine:
        model = load_stub(engine, context_opts={"resident_cells_max": 1024})
        model.complete(PROMPT, response_tokens=4, session_id="s")
        engine.flush()
        saves = engine.cache.counters().saves_evict
        status = engine.pressure.force_check()
        assert status.last_release is not None
        assert status.last_release.residents == 1
        engine.flush()
        assert engine.cache.dump() == []
        assert engine.cache.counters().saves_evict == saves
        again = model.complete(PROMPT, response_tokens=4, session_id="s")
        assert again.cache_hit_kind == "cold"


def test_idle_sequences_stay_while_ram_is_enough() -> None:
    """What costs least goes first: sequences are left alone when RAM gave enough."""
    gauge = Gauge(used=90_000, total=100_000)
    with gauged_engine(gauge) as engine:
        fill(engine, context_opts={"resident_cells_max": 1024})
        status = engine.pressure.force_check()
        assert status.last_release is not None
        assert status.last_release.residents == 0


@pytest.mark.usefixtures("_little_patience")
def test_a_busy_worker_is_not_waited_for() -> None:
    """A worker in the middle of a step drops what is idle later; the check goes on."""
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, pressure={"min_evict_bytes": "1GiB"}) as engine:
        model = load_stub(
            engine,
            context_opts={"resident_cells_max": 1024},
            faults={"hang_step": 3, "hang_gate": "busy"},
        )
        model.complete(PROMPT, response_tokens=1)
        engine.flush()
        stream = model.infer("busy " + PROMPT, response_tokens=4)
        assert gate("busy").wait_reached(60)
        status = engine.pressure.force_check()
        assert status.last_release is not None
        assert status.last_release.residents == 0
        gate("busy").open()
        assert len(stream.result().generated) == 4
        engine.flush()
        assert model.info().available_seqs == 2


# ------------------------------------------------------------------ idle models


def test_idle_models_go_one_at_a_time_least_recently_used_first() -> None:
    """Only if it may, and when nothing else freed enough: one model in each check."""
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, pressure={"min_evict_bytes": "1GiB"}) as engine:
        for name in ("a", "b", "c"):
            fill(engine, name, n=1)
        engine.model("a").complete(PROMPT, response_tokens=4)  # b is now the oldest
        engine.flush()
        engine.pressure.force_check()
        assert len(engine.models()) == 3, "it may not"
        engine.pressure.set_thresholds(unload_idle_models=True)
        gone = []
        for _ in range(4):
            given = engine.pressure.force_check().last_release
            assert given is not None
            gone.append(given.unloaded)
        assert gone[:3] == ["b", "c", "a"]
        assert engine.models() == []
        with pytest.raises(ModelNotFound):
            engine.complete("a", PROMPT)
        fill(engine, "a", n=1)


def test_a_model_stays_while_the_tiers_free_enough() -> None:
    """An idle model is the last thing to go."""
    gauge = Gauge(used=90_000, total=100_000)
    with gauged_engine(gauge, pressure={"unload_idle_models": True}) as engine:
        fill(engine)
        engine.pressure.force_check()
        assert [info.id for info in engine.models()] == ["stub"]


@pytest.mark.usefixtures("_little_patience")
def test_a_model_at_work_is_not_idle() -> None:
    """A model in which a request runs or waits stays, and the request is answered."""
    gauge = Gauge(used=1000)
    options = {"unload_idle_models": True, "min_evict_bytes": "1GiB"}
    with gauged_engine(gauge, pressure=options) as engine:
        fill(engine, "idle", n=1)
        model = load_stub(engine, faults={"hang_step": 1, "hang_gate": "at work"})
        stream = model.infer(PROMPT, response_tokens=4)
        assert gate("at work").wait_reached(60)
        given = engine.pressure.force_check().last_release
        assert given is not None
        assert given.unloaded == "idle"
        engine.pressure.force_check()
        assert [info.id for info in engine.models()] == ["stub"]
        gate("at work").open()
        assert len(stream.result().generated) == 4


def test_requests_race_with_unloading() -> None:
    """A request that comes while a model is unloaded is answered, or refused as closed."""
    gauge = Gauge(used=1000)
    options = {"unload_idle_models": True, "min_evict_bytes": "1GiB", "interval_ms": 1}
    ends: list[object] = []
    with gauged_engine(gauge, pressure=options) as engine:
        engine.pressure.set_thresholds(interval_ms=1)
        engine.pressure.enable()

        def serve(name: str) -> None:
            for _ in range(5):
                model = load_stub(engine, name)
                while True:
                    try:
                        ends.append(len(model.complete(PROMPT, response_tokens=2).generated))
                    except EngineClosed as error:
                        ends.append(error)
                        break

        threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {type(end) for end in ends} == {int, EngineClosed}
    assert {end for end in ends if isinstance(end, int)} == {2}


# ------------------------------------------------------------------ wrong configuration


def test_a_source_that_is_not_installed_says_what_to_install() -> None:
    """The engine does not start without a source it was told to use; disabled it needs none."""
    table = {"plugins": {"block": ["erllama-pressure-system"]}, "pressure": {"enabled": True}}
    with pytest.raises(PluginMissing, match=r"'system' is missing.*blocked"):
        Engine(load_config(table, environ={}))
    bare = {"plugins": {"allow": []}, "pressure": {"enabled": True}}
    with pytest.raises(PluginMissing, match=r"not in plugins\.allow"):
        Engine(load_config(bare, environ={}))
    unknown = {"pressure": {"enabled": True, "source": "sytem"}}
    with pytest.raises(PluginMissing, match="did you mean 'system'"):
        Engine(load_config(unknown, environ={}))
    with Engine(load_config(unknown | {"pressure": {"source": "sytem"}}, environ={})) as engine:
        with pytest.raises(PluginMissing):
            engine.pressure.enable()
        with pytest.raises(PluginMissing):
            engine.pressure.force_check()


def test_a_source_of_a_plugin_that_is_not_there_names_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each source that this project ships is missing with the words to install it."""
    monkeypatch.setattr("erllama_core.host._distributions", lambda: iter(()))
    for name, package in (
        ("system", "erllama-pressure-system"),
        ("psi", "erllama-pressure-system"),
        ("nvidia", "erllama-pressure-nvidia"),
    ):
        table = {"pressure": {"enabled": True, "source": name}}
        missing = f"{name!r} is not installed: pip install {package}"
        with pytest.raises(PluginMissing, match=missing):
            Engine(load_config(table, environ={}))


def test_wrong_options_of_a_source() -> None:
    """A source's own table is checked when it is needed."""
    for options, path in (({"limit": 7}, "limit"), ({"limmit": 1}, "limmit")):
        table = {"pressure": {"enabled": True, "source": "psi", "psi": options}}
        with pytest.raises(ConfigError) as caught:
            Engine(load_config(table, environ={}))
        assert [problem.path for problem in caught.value.problems] == [f"pressure.psi.{path}"]


def test_an_unknown_tier_is_refused_at_the_start() -> None:
    """A tier's name that there can be none of is a mistake, with a guess; also while disabled."""
    table = {"pressure": {"evict_tiers": ["rma"]}}
    with pytest.raises(ConfigError, match=r"'rma' is no name and no kind of a tier.*'ram'"):
        Engine(load_config(table, environ={}))


def test_a_source_that_cannot_work_here_does_not_keep_the_engine_from_starting() -> None:
    """Without a driver ``nvidia`` is listed as failing with the reason, and the rest works."""
    gauge = Gauge(used=900)
    with (
        capture_logs(),
        gauged_engine(gauge, pressure={"enabled": True, "source": ["nvidia", "gauge"]}) as engine,
    ):
        status = engine.pressure.force_check()
    nvidia, own = status.sources
    assert own.state == "ok"
    if nvidia.state != "ok":  # this machine may have one
        assert "driver" in str(nvidia.error)


def test_closing_under_pressure() -> None:
    """Closing an engine stops its monitor, whatever that is doing, and joins its threads."""
    before = set(threading.enumerate())
    gauge = Gauge(used=1000)
    with gauged_engine(gauge, pressure={"enabled": True}) as engine:
        engine.pressure.set_thresholds(interval_ms=1)
        fill(engine)
    assert set(threading.enumerate()) <= before
    with pytest.raises(EngineClosed):
        engine.pressure.force_check()


# ------------------------------------------------------------------ memory, for real

RSS = """
import json, sys
sys.path[:0] = {path!r}
from erllama_core import BlockMeta
from pressure_gauge import Gauge, gauged_engine
from stub_engine import load_stub

def rss():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

gauge = Gauge()
pressure = {{"min_evict_bytes": "10GiB", "unload_idle_models": {unload}}}
tiers = [{{"name": "ram", "kind": "ram", "quota_bytes": "2GiB"}}]
with gauged_engine(gauge, tiers=tiers, pressure=pressure) as engine:
{load}
    engine.flush()
    full = rss()
    gauge.used = 1000
    status = engine.pressure.force_check()
    engine.flush()
    print(json.dumps([empty, full, rss(), status.last_release.freed_bytes]))
"""


def measured(load: str, *, unload: bool = False) -> tuple[int, int, int, int]:
    """RSS of a process before, with what ``load`` adds, and after a check; the bytes freed."""
    code = RSS.format(
        path=[str(Path(__file__).parent)],
        unload=unload,
        load="\n".join(f"    {line}" for line in load.strip().splitlines()),
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    empty, full, after, freed = json.loads(done.stdout.splitlines()[-1])
    return empty, full, after, freed


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20


@linux_only
def test_state_is_given_back_to_the_system() -> None:
    """Memory that RAM held is the system's again after a check: by RSS, not by counters."""
    empty, full, after, freed = measured("""
model = load_stub(engine, cell_bytes=65536, context_opts={"n_ctx": 256, "n_seq_max": 1})
model.complete("warm up " * 10, response_tokens=1)
engine.cache.gc()
empty = rss()
for number in range(40):
    model.complete(f"{number} " + "x" * 90, response_tokens=1)
""")
    held = full - empty
    assert held > 150 * MIB
    assert after - empty < held / 10
    assert freed > 150 * MIB


@linux_only
def test_explicit_saves_are_given_back_to_the_system() -> None:
    """So is what was saved by ``Cache.save``, of whatever sizes."""
    empty, full, after, freed = measured("""
empty = rss()
for number in range(200):
    meta = BlockMeta(save_reason="cold", fingerprint=bytes(32), fingerprint_mode="safe",
                     quant_type="f16", quant_bits=16, ctx_params_hash=bytes(32),
                     tokens=(number,), context_size=64)
    engine.cache.save("ram", meta, bytes([number]) * (300_000 + 7_000 * number))
""")
    held = full - empty
    assert held > 150 * MIB
    assert after - empty < held / 10
    assert freed > 150 * MIB


@linux_only
def test_an_unloaded_model_is_given_back_to_the_system(tmp_path: Path) -> None:
    """With the real backend, the memory of a context that was unloaded is the system's again."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    empty, full, after, _ = measured(
        f"""
def load(name):
    sizes = {{"n_ctx": 65536}}
    model = engine.load_model(name, model_path={str(path)!r}, tier=[], context_opts=sizes)
    model.complete("one two three", response_tokens=2)
load("first")
engine.unload("first")
empty = rss()
load("second")
""",
        unload=True,
    )
    held = full - empty
    assert held > 100 * MIB
    assert after - empty < held / 10

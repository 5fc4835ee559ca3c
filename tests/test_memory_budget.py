"""The memory budget: counted to the page, never exceeded, and nothing fails for want of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_contexts import store
from erllama_backend_stub import gate
from erllama_core import BlockMeta, Cache, Engine, Evicted, NamedTier, PluginHost, load_config
from erllama_core.cache.budget import MemoryBudget, MemoryUse, in_words
from erllama_core.cache.pages import PagePool, PooledPages
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import (
    AdapterLoadError,
    ConfigError,
    DecodeTimeout,
    MemoryBudgetExceeded,
    ModelLoadError,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.backend import BackendRequest, KVClass, MemoryEstimate
from erllama_core.providers import BackendProvider
from erllama_tier_disk.store import FileTier
from stub_engine import load_stub, make_engine
from tiny_gguf import write_tiny_gguf
from waiting import wait_until

KIB, MIB = 1 << 10, 1 << 20
PROMPT = "Every lamp that is lit takes some of the oil, and the oil is what the keeper counts. "


def budgeted(limit: int | str, root: Path | None = None, **sections: Any) -> Engine:
    return make_engine(root, engine={"memory_budget_bytes": limit}, **sections)


def meta(number: int) -> BlockMeta:
    return BlockMeta(
        save_reason="cold",
        fingerprint=bytes(32),
        fingerprint_mode="safe",
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=bytes(32),
        tokens=(number,),
        context_size=64,
    )


# --------------------------------------------------------------------- counting


def test_nothing_is_refused_without_a_limit() -> None:
    """Without a limit everything is counted and nothing refused."""
    budget = MemoryBudget()
    assert budget.take(1 << 60)
    assert budget.hold("model", 1 << 60) is not None
    assert budget.missing(1 << 60) == 0
    budget.give(1 << 60)
    assert budget.pages_bytes == 0


def test_holds() -> None:
    """What is set aside is free again once, when it is released, whatever has the same name."""
    budget = MemoryBudget(100)
    one, two = budget.hold("m", 40), budget.hold("m", 50)
    assert one is not None
    assert two is not None
    assert budget.hold("n", 11) is None
    assert budget.missing(11) == 1
    assert not budget.take(11)
    assert budget.holders() == {"m": 90}
    one.release()
    one.release()
    assert budget.holders() == {"m": 50}
    assert budget.take(50)
    beyond = budget.hold("tmpfs", 30, beyond=True)
    assert beyond is not None
    assert budget.missing(1) == 1
    assert str(budget) == (
        "memory_budget_bytes is 100 B, and in use are: m 50 B, tmpfs 30 B, state in memory 50 B"
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 30, "3.0 GiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    """Sizes are told in the unit that fits."""
    assert in_words(size) == words


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("acquire"), st.integers(1, 300_000)),
            st.tuples(st.just("release"), st.integers(0, 20)),
            st.tuples(st.just("clear"), st.just(0)),
            st.tuples(st.just("prepare"), st.integers(1, 200_000)),
        ),
        max_size=40,
    )
)
def test_the_pool_never_exceeds_the_budget(steps: list[tuple[str, int]]) -> None:
    """Whatever is taken and given back, mapped pages are counted and stay within the limit."""
    limit = 600_000
    budget = MemoryBudget(limit)
    pool = PagePool(200_000, budget)
    held: list[PooledPages] = []
    for step, number in steps:
        if step == "acquire":
            try:
                held.append(pool.acquire(number))
            except MemoryBudgetExceeded:
                # Not while there was room: neither idle pages nor others were in the way.
                assert sum(len(pages._map) for pages in held) + number > limit - 4096
                assert pool.idle_bytes == 0
        elif step == "release" and held:
            held.pop(number % len(held)).release()
        elif step == "clear":
            pool.clear()
        elif step == "prepare":
            pool.prepare([number])
        mapped = sum(len(pages._map) for pages in held) + pool.idle_bytes
        assert budget.pages_bytes == mapped <= limit
    for pages in held:
        pages.release()
    pool.clear()
    assert budget.pages_bytes == 0


def test_many_threads_within_one_budget() -> None:
    """Threads that compete for pages never map more than the budget, and leave nothing counted."""
    budget = MemoryBudget(64 * KIB)
    pool = PagePool(16 * KIB, budget)
    most = [0]

    def use() -> None:
        for _ in range(300):
            try:
                pages = pool.acquire(9_000)
            except MemoryBudgetExceeded:
                continue
            most[0] = max(most[0], budget.pages_bytes)
            pages.release()

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.clear()
    assert 0 < most[0] <= 64 * KIB
    assert budget.pages_bytes == 0


def test_pages_that_the_system_refuses_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping that fails takes nothing from the budget."""

    def refuse(_: int) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr("erllama_core.cache.pages._map", refuse)
    budget = MemoryBudget(MIB)
    with pytest.raises(OSError, match="no memory"):
        PagePool(MIB, budget).acquire(100)
    assert budget.pages_bytes == 0


# ----------------------------------------------------------------------- saving


def test_state_in_memory_stays_within_the_budget() -> None:
    """What is worth least leaves RAM when the budget, not the quota, is what ends."""
    now_ns = 0
    with budgeted(400 * KIB) as engine:
        engine.cache.catalog.clock = lambda: now_ns
        model = load_stub(engine, cell_bytes=128)  # cells of 128 KiB, each context 20 KiB
        for number in range(40):
            now_ns += 600_000_000_000
            model.complete(f"{number} {PROMPT}", response_tokens=4)
            engine.flush()
            memory = engine.cache.memory()
            assert memory.used_bytes <= 400 * KIB
        assert memory.holders == {"model 'stub'": 1024 * 128}
        assert memory.budget_bytes == 400 * KIB
        counters = engine.cache.counters()
        assert counters.evictions > 0
        assert counters.saves_over_budget == 0
        again = model.complete(f"39 {PROMPT}", response_tokens=4)
        assert again.cache_hit_kind == "exact"
        assert model.complete(f"0 {PROMPT}", response_tokens=4).cache_hit_kind == "cold"


def test_rows_leave_room_for_buffers() -> None:
    """What RAM keeps leaves a quarter of the room to the next buffers, so that none waits."""
    budget = 400 * KIB
    with Cache([NamedTier("ram", "ram", RamTier(MIB))], memory_budget_bytes=budget) as cache:
        for number in range(30):
            cache.save("ram", meta(number), bytes(20 * KIB))
            memory = cache.memory()
            # Room for the row that was just kept is made before the next one.
            assert memory.pages_bytes - memory.idle_bytes <= budget * 3 // 4 + 20 * KIB
        assert cache.counters().evictions > 0
        assert sum(row.size_bytes for row in cache.dump()) > budget // 2


def test_idle_buffers_go_before_what_is_stored() -> None:
    """Memory is given back at no loss first: buffers that wait count, and rows stay if they do."""
    with Cache([NamedTier("ram", "ram", RamTier(MIB))]) as cache:
        cache.save("ram", meta(1), bytes(20 * KIB))
        cache.save("ram", meta(2), bytes(40 * KIB))
        cache.evict_bytes(1)
        idle = cache.memory().idle_bytes
        assert idle > 0
        (kept,) = cache.dump()
        assert cache.held_bytes(["ram"]) == idle + kept.size_bytes
        assert cache.free_memory(idle, ["ram"]) == Evicted(0, idle)
        assert cache.dump() == [kept]
        assert cache.memory().idle_bytes == 0
        assert cache.free_memory(1, ["ram", "no such tier"]).rows == 1


def test_a_save_without_room_is_skipped_and_counted() -> None:
    """Where not even everything else makes room, a request is answered and not saved."""
    with budgeted(160 * KIB) as engine:
        model = load_stub(engine, cell_bytes=128, policy={"boundary_align_tokens": 512})
        # All but 32 KiB is the model's; a context of 300 tokens has 38.
        long = (PROMPT * 4)[:300]
        cold = model.complete(long, response_tokens=4)
        assert engine.flush()
        counters = engine.cache.counters()
        assert counters.saves_over_budget > 0
        assert counters.saves_dropped >= counters.saves_over_budget
        again = model.complete(long, response_tokens=4)
        assert again.cache_hit_kind == "cold"
        assert again.generated == cold.generated
        # A shorter one fits, in place of whatever else is there.
        for _ in range(2):
            short = model.complete(PROMPT, response_tokens=4)
            engine.flush()
        assert short.cache_hit_kind == "exact"


def test_state_on_disk_that_does_not_fit_is_computed(tmp_path: Path) -> None:
    """A context whose buffers the budget has no room for is computed instead of read."""
    long = (PROMPT * 8)[:600]
    options: dict[str, Any] = {"tier": ["disk"], "cell_bytes": 128}
    with make_engine(tmp_path) as engine:
        cold = load_stub(engine, **options).complete(long, response_tokens=4)
    with budgeted(160 * KIB, tmp_path) as engine:
        again = load_stub(engine, **options).complete(long, response_tokens=4)
        assert again.generated == cold.generated
        assert again.cache_delta.read < 600
        assert engine.cache.counters().loads_over_budget > 0
        assert engine.cache.counters().tier_errors == 0, "it is no trouble of the tier"
        assert engine.cache.memory().used_bytes <= 160 * KIB
    with budgeted("10MiB", tmp_path) as engine:
        last = load_stub(engine, **options).complete(long, response_tokens=4)
        assert (last.cache_hit_kind, last.generated) == ("exact", cold.generated)


def test_what_is_in_use_does_not_give_way() -> None:
    """Pages that somebody holds are never taken from him; who comes later is refused."""
    with Cache([NamedTier("ram", "ram", RamTier(MIB))], memory_budget_bytes=64 * KIB) as cache:
        key, _, _ = cache.save("ram", meta(1), bytes(40 * KIB))
        assert cache.memory() == MemoryUse(
            budget_bytes=64 * KIB, pages_bytes=40 * KIB, idle_bytes=0, holders={}
        )
        cache.pin(key)
        with pytest.raises(MemoryBudgetExceeded, match=r"memory_budget_bytes is 64\.0 KiB"):
            cache.save("ram", meta(2), bytes(40 * KIB))
        cache.unpin(key)
        cache.save("ram", meta(2), bytes(40 * KIB))
        assert [row.end for row in cache.dump()] == [1]
        cache.gc()
        assert cache.memory().pages_bytes == 0


def test_tiers_on_a_tmpfs_are_set_aside(tmp_path: Path) -> None:
    """Files in memory count with their quota, from the start."""
    tier = FileTier(tmp_path, quota_bytes=40 * KIB, outlives_power=False)
    tiers = [NamedTier("ram", "ram", RamTier(MIB)), NamedTier("shm", "ram_file", tier)]
    with Cache(tiers, memory_budget_bytes=64 * KIB) as cache:
        assert cache.memory().holders == {"tier 'shm'": 40 * KIB}
        with pytest.raises(MemoryBudgetExceeded, match=r"tier 'shm' 40\.0 KiB"):
            cache.save("ram", meta(1), bytes(30 * KIB))


@pytest.mark.parametrize("lowest", ["disk", None])
def test_write_back_frees_no_memory_into_memory(tmp_path: Path, lowest: str | None) -> None:
    """Memory that is given back goes to disk, past a tier on a tmpfs that is next in line."""
    tiers = [
        NamedTier("ram", "ram", RamTier(MIB)),
        NamedTier("shm", "ram_file", FileTier(tmp_path / "shm", outlives_power=False)),
        NamedTier("disk", "disk", FileTier(tmp_path / "disk")),
    ]
    with Cache(tiers) as cache:
        space = ModelSpace(
            cache,
            namespace=bytes(32),
            kv_class=KVClass.SPAN,
            tiers=["ram", "shm"] if lowest is None else ["ram", "shm", lowest],
            align_tokens=8,
            write="back",
        )
        keys = store(space, list(range(30)))
        assert cache.flush()
        assert {row.tier for row in cache.dump()} == {"ram"}
        n_rows = len(cache.dump())
        assert cache.free_memory(1 << 40, ["ram"]).rows == n_rows
        assert cache.flush()
        assert [row.tier for row in cache.dump()] == ([lowest] * n_rows if lowest else [])
        assert space.find(keys, may_sample=True).length == (30 if lowest else 0)


# ----------------------------------------------------------------------- models


def test_adapters_are_set_aside(tmp_path: Path) -> None:
    """An adapter counts with its file's size until it is freed; without room it is refused."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"stub adapter\n".ljust(KIB))
    large.write_bytes(b"stub adapter\n".ljust(MIB))
    with budgeted(256 * KIB) as engine:
        with pytest.raises(AdapterLoadError, match=r"'large' would take 1\.0 MiB"):
            load_stub(engine, adapters=[small, large])
        assert engine.cache.memory().holders == {}
        model = load_stub(engine, adapters=[small])
        alone = engine.cache.memory().holders["model 'stub'"]
        assert engine.cache.memory().used_bytes == alone + KIB
        with pytest.raises(AdapterLoadError, match=r"adapter 'small' of model 'stub' 1\.0 KiB"):
            model.load_adapter(large)
        model.load_adapter(small, name="again")
        model.set_adapter_scale("again", 0.5)
        assert engine.cache.memory().used_bytes == alone + 2 * KIB
        model.unload_adapter("small")
        assert engine.cache.memory().holders == {
            "model 'stub'": alone,
            "adapter 'again' of model 'stub'": KIB,
        }
        small.write_bytes(b"no adapter")
        with pytest.raises(AdapterLoadError):
            model.load_adapter(small, name="broken")
        assert engine.cache.memory().used_bytes == alone + KIB
        model.unload()
        assert engine.cache.memory().holders == {}


def test_a_context_that_hangs_is_counted_until_it_comes_back() -> None:
    """The context in its place takes as much again; what is cached gives way to that."""
    held = gate("lost context")
    with budgeted(300 * KIB) as engine:
        model = load_stub(
            engine,
            cell_bytes=128,
            context_opts={"n_ctx": 1024, "decode_budget_ms": 40},
            faults={"hang_step": 6, "hang_gate": "lost context", "hang_deaf": True},
        )
        engine.cache.save("ram", meta(1), bytes(100 * KIB))
        stream = model.infer(PROMPT, response_tokens=30)
        assert held.wait_reached(10)
        with pytest.raises(DecodeTimeout):
            stream.result()
        assert len(model.complete(PROMPT, response_tokens=5).generated) == 5
        memory = engine.cache.memory()
        assert memory.holders == {
            "model 'stub'": 128 * KIB,
            "context of model 'stub' that does not come back": 128 * KIB,
        }
        assert memory.used_bytes <= 300 * KIB
        model.unload()
        assert set(engine.cache.memory().holders) == set(memory.holders), "it is taken still"
        held.open()
        wait_until(lambda: not engine.cache.memory().holders)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded() -> None:
    """The refusal has the numbers; nothing was opened, and nothing is left set aside."""
    with budgeted("1MiB") as engine:
        load_stub(engine, "small", cell_bytes=128)
        with pytest.raises(ModelLoadError) as caught:
            load_stub(engine, "large", cell_bytes=1024)
        message = str(caught.value)
        assert (
            "model 'large' would take 1.0 MiB (weights 0 B, KV 1.0 MiB, computing 0 B)" in message
        )
        assert "which is 128.0 KiB too much" in message
        assert "memory_budget_bytes is 1.0 MiB, and in use are: model 'small' 128.0 KiB" in message
        assert [info.id for info in engine.models()] == ["small"]
        assert engine.cache.memory().holders == {"model 'small'": 128 * KIB}
        engine.unload("small")
        assert engine.cache.memory().holders == {}
        load_stub(engine, "large", cell_bytes=1024)


def test_the_cache_gives_way_to_a_model() -> None:
    """State in memory makes room for a model that is loaded, as much as it needs."""
    with budgeted(400 * KIB) as engine:
        model = load_stub(engine, cell_bytes=128)
        for number in range(10):
            model.complete(f"{number} {PROMPT}", response_tokens=4)
        engine.flush()
        full = engine.cache.memory()
        assert full.used_bytes > 350 * KIB
        load_stub(engine, "second", cell_bytes=128)
        assert engine.cache.memory().used_bytes <= 400 * KIB
        assert engine.cache.counters().evictions > 0


def test_what_fails_to_load_gives_its_memory_back() -> None:
    """A model that is refused for another reason leaves nothing set aside."""
    with budgeted("1MiB") as engine:
        for _ in range(3):
            with pytest.raises(ModelLoadError, match="injected fault"):
                load_stub(engine, cell_bytes=512, faults={"fail_load": True})
        assert engine.cache.memory().holders == {}


def test_nothing_is_estimated_without_a_budget() -> None:
    """Without a budget models load as before, and are not estimated."""
    with make_engine() as engine:
        load_stub(engine, cell_bytes=1024)
        assert engine.cache.memory().holders == {}


class Backends:
    """Backends whose estimate is nothing, or fails."""

    @hookimpl
    def erllama_backends(self) -> list[BackendProvider]:
        def fail(_: BackendRequest) -> MemoryEstimate:
            raise ZeroDivisionError

        def refuse(_: BackendRequest) -> Any:
            raise ModelLoadError("never called")

        return [
            BackendProvider("silent", "", refuse),
            BackendProvider("unsure", "", refuse, estimate=lambda _: None),
            BackendProvider("broken", "", refuse, estimate=fail),
        ]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("silent", r"would take 1\.0 MiB \(weights 1\.0 MiB"),
        ("unsure", r"would take 1\.0 MiB \(weights 1\.0 MiB"),
        ("broken", r"could not tell how much memory the model takes: ZeroDivisionError"),
    ],
)
def test_a_backend_that_cannot_tell(tmp_path: Path, backend: str, message: str) -> None:
    """Of a model whose backend cannot tell, the size of its file counts; a failure is one."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(MIB))
    host = PluginHost()
    host.register(Backends())
    config = load_config({"engine": {"memory_budget_bytes": "512KiB"}}, environ={})
    with Engine(config, plugins=host) as engine, pytest.raises(ModelLoadError, match=message):
        engine.load_model(backend=backend, model_path=weights)


def test_a_gguf_model_is_refused_before_its_context_is_opened(tmp_path: Path) -> None:
    """With the real backend: a context of gigabytes is refused at once, a small one is served."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with budgeted("64MiB") as engine:
        with pytest.raises(ModelLoadError, match=r"KV 2\.0 GiB"):
            engine.load_model("m", model_path=path, context_opts={"n_ctx": 1 << 20})
        model = engine.load_model("m", model_path=path, context_opts={"n_ctx": 4096})
        held = engine.cache.memory().holders["model 'm'"]
        assert 8 * MIB < held < 20 * MIB
        assert len(model.complete("one two three", response_tokens=3).generated) == 3


def test_a_quota_beyond_the_budget_is_refused_at_the_start() -> None:
    """An engine whose RAM tier may grow beyond the budget is not made."""
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.quota_bytes: 2\.0 MiB is more than"):
        budgeted("1MiB", tiers=[{"name": "ram", "kind": "ram", "quota_bytes": "2MiB"}])

"""Reloading a configuration: what changes while an engine runs, what stays, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from erllama_backend_stub import gate
from erllama_core import Engine, Model, PluginHost, Reloaded, ThinkingEnd, load_config
from erllama_core.config import EngineConfig, LoggingConfig
from erllama_core.engine.reload_plan import Plan, Running, plan_reload
from erllama_core.errors import ConfigError, EngineClosed, ModelLoadError
from erllama_core.interfaces.log import get_logger
from erllama_core.logs import configure_logging


def stub(**options: Any) -> dict[str, Any]:
    return {
        "backend": "stub",
        "context_opts": {"n_ctx": 1024, "n_seq_max": 2, "resident_cells_max": 0},
        "policy": {"boundary_align_tokens": 32, "min_tokens": 8, "cold_min_tokens": 8},
        **options,
    }


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    """A configuration that tests change and load again."""
    return {
        "tiers": [
            {"name": "ram", "kind": "ram", "quota_bytes": "1MiB"},
            {"name": "disk", "kind": "disk", "root": str(tmp_path / "kvc")},
        ],
        "models": {"one": stub(tier=["ram", "disk"]), "two": stub()},
    }


@pytest.fixture
def engine(table: dict[str, Any]) -> Iterator[Engine]:
    with Engine.from_config(table) as made:
        yield made


def paths(done: Reloaded) -> tuple[set[str], set[str]]:
    return {change.path for change in done.changed}, {kept.path for kept in done.kept}


def saved_tokens(engine: Engine, model: Model, prompt: str) -> int:
    """How much of a prompt a request finds after another one with it."""
    model.complete(prompt, response_tokens=1)
    engine.flush()
    return model.complete(prompt, response_tokens=1).cache_delta.read


# ------------------------------------------------------------------- what changes


def test_nothing_is_different(engine: Engine) -> None:
    """The same configuration again changes nothing, and says so."""
    done = engine.reload()
    assert done == Reloaded()
    assert str(done) == "nothing is different"


def test_the_policy_of_loaded_models(engine: Engine, table: dict[str, Any]) -> None:
    """[cache] and a model's own policy hold for the next request, whoever loaded the model."""
    own = engine.load_model("own", **stub(policy={"boundary_align_tokens": 32}))
    prompt = "A prompt of forty-four tokens on the stub. "
    assert saved_tokens(engine, own, prompt) == 0  # min_tokens is 64
    table["cache"] = {"min_tokens": 16, "cold_min_tokens": 16}
    table["models"]["one"]["policy"]["min_tokens"] = 500
    done = engine.reload()
    assert paths(done) == (
        {"cache.min_tokens", "cache.cold_min_tokens", "models.one.policy.min_tokens"},
        set(),
    )
    assert "models.one.policy.min_tokens: 8 -> 500" in str(done)
    assert saved_tokens(engine, own, prompt) == len(prompt)
    assert saved_tokens(engine, engine.model("one"), "Not that prompt, which all know. ") == 0
    assert engine.config.models["one"].policy["min_tokens"] == 500
    del table["models"]["one"]["policy"]["min_tokens"]
    engine.reload()
    assert saved_tokens(engine, engine.model("one"), "Another one of that length, or so. ") > 0


def test_slices_of_prompts(engine: Engine, table: dict[str, Any]) -> None:
    """The size of a prompt's slices changes between two steps of one request."""
    held = gate("a step in the middle")
    table["models"]["held"] = stub(
        model_opts={"faults": {"hang_step": 2, "hang_gate": "a step in the middle"}},
        policy={"prefill_chunk_size": 8},
    )
    engine.reload()
    stream = engine.infer("held", "x" * 64, response_tokens=1)
    assert held.wait_reached(timeout_s=10)
    table["models"]["held"]["policy"]["prefill_chunk_size"] = 48
    engine.reload()
    held.open()
    assert stream.result().stats.prompt_tokens == 64
    assert engine.model("held").settle(10)  # the last token is computed behind the answer
    # Two slices of 8, one of 48, then the last token: a step that never comes has no fault.
    runner = engine.model("held")._worker._runner
    assert runner.watch.count == 4


def test_quotas(engine: Engine, table: dict[str, Any]) -> None:
    """A smaller quota evicts at once; without one, the kind's default holds; disk has its own."""
    model = engine.model("one")
    for number in range(8):
        model.complete(f"{number} is the beginning of a long prompt. " * 8, response_tokens=1)
    engine.flush()
    before = {usage.tier: usage for usage in engine.cache.usage()}
    assert before["ram"].used_bytes > 20_000
    table["tiers"][0]["quota_bytes"] = 20_000
    table["tiers"][1]["quota_bytes"] = "1GiB"
    done = engine.reload()
    assert paths(done) == ({"tiers[0].quota_bytes", "tiers[1].quota_bytes"}, set())
    after = {usage.tier: usage for usage in engine.cache.usage()}
    assert 0 < after["ram"].used_bytes <= 20_000 == after["ram"].quota_bytes
    assert after["disk"].used_bytes == before["disk"].used_bytes
    assert after["disk"].quota_bytes == 1 << 30
    del table["tiers"][0]
    engine.reload()
    assert engine.cache.usage()[0].quota_bytes not in {20_000, None}
    assert engine.reload() == Reloaded()


def test_models_come_and_go(engine: Engine, table: dict[str, Any]) -> None:
    """New ones are loaded; of those that go requests are answered; the others never notice."""
    held = gate("a reply that goes on")
    table["models"]["held"] = stub(
        model_opts={"faults": {"hang_step": 2, "hang_gate": "a reply that goes on"}}
    )
    done = engine.reload()
    assert (done.loaded, done.unloaded) == (("held",), ())
    stream = engine.infer("held", "a prompt", response_tokens=4)
    assert held.wait_reached(timeout_s=10)
    del table["models"]["two"]
    table["models"]["three"] = stub()
    done = engine.reload()
    assert (done.loaded, done.unloaded) == (("three",), ("two",))
    assert {info.id for info in engine.models()} == {"one", "held", "three"}
    held.open()
    assert stream.result().stats.completion_tokens == 4
    table["models"]["slow"] = stub(model_opts={"decode_us": 1000.0})
    engine.reload()
    stream = engine.infer("slow", "a prompt", response_tokens=900)
    stream.next_event(timeout_s=10)
    del table["models"]["slow"]
    engine.reload()
    with pytest.raises(EngineClosed):
        stream.result()


def test_models_of_the_application_stay(engine: Engine, table: dict[str, Any]) -> None:
    """What was loaded by a call is not unloaded, and what was unloaded by one is not loaded."""
    engine.load_model("own", **stub())
    engine.unload("two")
    table["models"]["one"]["policy"]["min_tokens"] = 9
    done = engine.reload()
    assert {info.id for info in engine.models()} == {"one", "own"}
    assert paths(done) == ({"models.one.policy.min_tokens"}, {"models.two"})
    table["models"]["own"] = stub()
    with pytest.raises(ConfigError, match=r"models\.own: the application has loaded"):
        engine.reload()
    del table["models"]["own"], table["models"]["two"]
    assert engine.reload() == Reloaded()
    assert {info.id for info in engine.models()} == {"one", "own"}


def test_the_signing_key(tmp_path: Path) -> None:
    """A key that was replaced in its file signs from the next request on."""
    key = tmp_path / "key"
    key.write_bytes(b"a" * 32)
    key.chmod(0o600)
    thinking = stub(
        model_opts={"script": ["<think>hm</think>yes"]},
        thinking_markers={"start": "<think>", "end": "</think>"},
    )
    table = {"engine": {"thinking_signing_key_file": str(key)}, "models": {"m": thinking}}

    def signature(engine: Engine) -> bytes:
        prompt = engine.apply_chat_template("m", [{"role": "user", "content": "well?"}])
        stream = engine.infer("m", prompt, thinking=True)
        return next(event.signature for event in stream if isinstance(event, ThinkingEnd))

    with Engine.from_config(table) as engine:
        first = signature(engine)
        key.write_bytes(b"b" * 32)
        done = engine.reload()
        assert paths(done) == ({"engine.thinking_signing_key_file"}, set())
        assert "bbb" not in str(done)
        second = signature(engine)
        assert first != second
        assert engine.verify_thinking("hm", second)
        assert not engine.verify_thinking("hm", first)
        key.write_bytes(b"short")
        with pytest.raises(ConfigError, match="32 bytes at least"):
            engine.reload()
        assert signature(engine) == second
        del table["engine"]
        engine.reload()
        assert signature(engine) == b""


def test_the_log(engine: Engine, table: dict[str, Any]) -> None:
    """[logging] is applied where it is what configured the log, and only there."""
    table["logging"] = {"level": "debug"}
    assert paths(engine.reload()) == (set(), {"logging.level"})
    written = io.StringIO()
    log = get_logger("test")
    try:
        configure_logging(LoggingConfig(format="json"), written)
        log.info("too.low")
        assert paths(engine.reload()) == ({"logging.level"}, set())
        log.debug("seen", number=1)
        table["logging"] = {"level": "error", "format": "text"}
        engine.reload()
        log.warning("too.low")
        log.error("also.seen")
    finally:
        structlog.reset_defaults()
    lines = written.getvalue().splitlines()
    shown = [json.loads(line) for line in lines if line.startswith("{")]
    assert any(entry["event"] == "seen" and entry["number"] == 1 for entry in shown)
    assert "also.seen" in lines[-1]
    assert not lines[-1].startswith("{")
    assert "too.low" not in written.getvalue()


def test_pressure(engine: Engine, table: dict[str, Any]) -> None:
    """Thresholds and the switch follow the file; what a call changed stays until the file does."""
    engine.pressure.set_thresholds(min_evict_bytes=77)
    table["pressure"] = {
        "enabled": True,
        "source": "system",
        "interval_ms": 60_000,
        "high_watermark": 0.5,
        "low_watermark": 0.4,
        "evict_tiers": "disk",
    }
    done = engine.reload()
    names = ("enabled", "interval_ms", "high_watermark", "low_watermark", "evict_tiers")
    assert paths(done) == ({f"pressure.{name}" for name in names}, set())
    status = engine.pressure.status()
    assert status.enabled
    assert (status.thresholds.high_watermark, status.thresholds.low_watermark) == (0.5, 0.4)
    assert (status.thresholds.evict_tiers, status.thresholds.min_evict_bytes) == (("disk",), 77)
    table["pressure"] |= {"low_watermark": 0.6}
    with pytest.raises(ConfigError, match=r"pressure\.low_watermark: 0\.6 is not below"):
        engine.reload()
    assert engine.pressure.status().thresholds == status.thresholds
    table["pressure"] |= {"low_watermark": 0.3, "source": ["noop", "system"], "noop": {}}
    assert paths(engine.reload()) == (
        {"pressure.low_watermark"},
        {"pressure.source", "pressure.noop"},
    )
    table["pressure"]["enabled"] = False
    engine.reload()
    assert not engine.pressure.status().enabled
    assert engine.pressure.status().thresholds.low_watermark == 0.3


def test_pressure_is_taken_back(
    engine: Engine, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When something fails behind it, the monitor is as it was."""

    def fails(*_: object) -> None:
        raise RuntimeError("no")

    before = engine.pressure.status()
    monkeypatch.setattr(engine.cache, "set_quota", fails)
    table["pressure"] = {"enabled": True, "source": "noop", "high_watermark": 0.9}
    table["tiers"][0]["quota_bytes"] = 1
    with pytest.raises(RuntimeError):
        engine.reload()
    after = engine.pressure.status()
    assert (after.enabled, after.thresholds) == (before.enabled, before.thresholds)


def test_a_quota_beyond_the_memory_budget(table: dict[str, Any]) -> None:
    """The budget stays, and a quota that it has no room for is refused."""
    table["engine"] = {"memory_budget_bytes": "4MiB"}
    with Engine.from_config(table) as engine:
        table["tiers"][0]["quota_bytes"] = "8MiB"
        with pytest.raises(ConfigError, match=r"tiers\[0\]\.quota_bytes: 8\.0 MiB is more than"):
            engine.reload()
        table["engine"] = {"memory_budget_bytes": "16MiB"}
        with pytest.raises(ConfigError, match=r"tiers\[0\]\.quota_bytes: 8\.0 MiB is more than"):
            engine.reload()  # as the budget cannot change
        table["tiers"][0]["quota_bytes"] = "2MiB"
        assert paths(engine.reload()) == (
            {"tiers[0].quota_bytes"},
            {"engine.memory_budget_bytes"},
        )


def test_what_is_set_aside_for_a_tmpfs(table: dict[str, Any], tmp_path: Path) -> None:
    """A tier of files in memory takes its new quota of the budget."""
    table["engine"] = {"memory_budget_bytes": "64MiB"}
    tmpfs = {"name": "shm", "kind": "ram_file", "root": str(tmp_path / "s"), "quota_bytes": "1MiB"}
    table["tiers"].append(tmpfs)
    with Engine.from_config(table) as engine:
        assert engine.cache.memory().holders["tier 'shm'"] == 1 << 20
        tmpfs["quota_bytes"] = "3MiB"
        engine.reload()
        assert engine.cache.memory().holders["tier 'shm'"] == 3 << 20


# ---------------------------------------------------------------------- what stays


def test_what_cannot_change_is_told(engine: Engine, table: dict[str, Any], tmp_path: Path) -> None:
    """Each of these is reported at its path, keeps its value, and is reported again next time."""
    before = engine.config
    table["plugins"] = {"block": ["somebody"]}
    table["cache"] = {"writer_threads": 3, "boundary_align_tokens": 64, "write": "back"}
    table["tiers"][1] |= {"root": str(tmp_path / "other"), "rescan_interval_s": 5}
    table["tiers"].append({"name": "more", "kind": "ram"})
    table["models"]["one"] |= {
        "context_opts": {"n_ctx": 2048, "n_seq_max": 2, "resident_cells_max": 0},
        "model_opts": {"weights": "others"},
        "tier": ["ram"],
        "chat_template": "x",
    }
    table["models"]["two"]["policy"] = {"cost_gate": "off"}
    expected = {
        "plugins.block",
        "cache.writer_threads",
        "cache.boundary_align_tokens",
        "cache.write",
        "tiers[1].root",
        "tiers[1].rescan_interval_s",
        "tiers[2]",
        "models.one.context_opts.n_ctx",
        "models.one.model_opts.weights",
        "models.one.tier",
        "models.one.chat_template",
        "models.two.policy.boundary_align_tokens",
        "models.two.policy.cost_gate",
    }
    done = engine.reload()
    changed = {"models.two.policy.min_tokens", "models.two.policy.cold_min_tokens"}
    assert paths(done) == (changed, expected)
    assert "kept models.one.context_opts.n_ctx: is read when the model is loaded" in str(done)
    assert paths(engine.reload()) == (set(), expected)
    assert engine.config.cache == before.cache
    assert engine.config.tiers == before.tiers
    assert engine.config.models["one"] == before.models["one"]
    engine.complete("one", "still there", response_tokens=1)
    table["tiers"] = []
    kept = paths(engine.reload())[1]
    assert "tiers.disk" in kept


def test_options_that_are_written_in_another_way(engine: Engine, table: dict[str, Any]) -> None:
    """What means the same is no difference."""
    table["tiers"][0]["quota_bytes"] = 1 << 20
    table["tiers"][1]["read_only"] = False
    table["models"]["one"]["model_opts"] = {"weights": "stub"}
    assert engine.reload() == Reloaded()


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"cache": {"min_tokens": -1}}, "cache.min_tokens"),
        ({"pressure": {"high_watermark": 0.5, "low_watermark": 0.6}}, "pressure.low_watermark"),
        ({"models": {"one": stub(model_path="/no/such/file")}}, "models.one.model_path"),
        ({"models": {"new": stub(backend="stubb")}}, "models.new.backend"),
        ({"tiers": [{"name": "disk", "kind": "disk"}]}, "tiers[0].root"),
        ({"nonsense": {}}, "nonsense"),
    ],
)
def test_a_mistake_changes_nothing(
    engine: Engine, table: dict[str, Any], change: dict[str, Any], place: str
) -> None:
    """With a mistake anywhere nothing is taken over, and all mistakes are told."""
    before = engine.config
    changed = {"cache": {"min_tokens": 9}, "models": {}, "wrong": 1, **change}
    with pytest.raises(ConfigError) as caught:
        engine.reload(changed)
    assert {problem.path for problem in caught.value.problems} == {place, "wrong"}
    assert engine.config is before
    assert {info.id for info in engine.models()} == {"one", "two"}


def test_a_model_that_cannot_be_loaded(engine: Engine, table: dict[str, Any]) -> None:
    """Nothing else is taken over then, and models that were loaded before it go again."""
    before = engine.config
    table["cache"] = {"min_tokens": 9}
    table["models"] = {
        "one": table["models"]["one"],
        "fine": stub(),
        "broken": stub(model_opts={"faults": {"fail_load": True}}),
    }
    with pytest.raises(ModelLoadError):
        engine.reload()
    assert engine.config is before
    assert {info.id for info in engine.models()} == {"one", "two"}
    table["models"]["broken"] = stub()
    done = engine.reload()
    assert (done.loaded, done.unloaded) == (("fine", "broken"), ("two",))


def test_trouble_half_way_is_taken_back(
    engine: Engine, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before something raised is undone: policy, quota, key, models."""
    before = engine.config
    set_quota = engine.cache.set_quota

    def fails(tier: str, quota_bytes: int | None) -> None:
        set_quota(tier, quota_bytes)
        if quota_bytes == 123_456:
            raise RuntimeError("no")

    monkeypatch.setattr(engine.cache, "set_quota", fails)
    table["tiers"][0]["quota_bytes"] = "2MiB"
    table["tiers"][1]["quota_bytes"] = 123_456
    table["models"]["one"]["policy"]["min_tokens"] = 500
    table["models"]["new"] = stub()
    with pytest.raises(RuntimeError):
        engine.reload()
    assert engine.config is before
    assert [info.id for info in engine.models()] == ["one", "two"]
    assert [usage.quota_bytes for usage in engine.cache.usage()] == [1 << 20, None]
    assert saved_tokens(engine, engine.model("one"), "This is still saved, as it was. ") > 0
    del table["tiers"][1]["quota_bytes"]
    assert engine.reload().loaded == ("new",)


def test_a_new_model_on_a_tier_that_is_not_open(engine: Engine, table: dict[str, Any]) -> None:
    """It needs a restart, so the whole is refused."""
    table["tiers"].append({"name": "more", "kind": "ram"})
    table["models"]["new"] = stub(tier=["more"])
    with pytest.raises(ConfigError, match=r"models\.new\.tier: 'more' is opened when"):
        engine.reload()


def test_a_contradiction_with_what_cannot_change(engine: Engine, table: dict[str, Any]) -> None:
    """A value that is right only beside one that stays as it was is refused."""
    table["cache"] = {
        "boundary_align_tokens": 16,
        "boundary_trim_tokens": 4,
        "cold_max_tokens": 128,
    }
    with pytest.raises(ConfigError, match=r"cache\.cold_max_tokens: .* beside what cannot"):
        engine.reload()


def test_what_is_no_configuration(table: dict[str, Any]) -> None:
    """An engine that was made in Python has nothing to read again; a closed one refuses."""
    engine = Engine(load_config(table, environ={}))
    with pytest.raises(ValueError, match="not made from a file"):
        engine.reload()
    assert engine.reload(load_config(table | {"cache": {"min_tokens": 7}}, environ={})).changed
    engine.close()
    with pytest.raises(EngineClosed):
        engine.reload(table)


# ------------------------------------------------------------------------ a file


def test_a_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the path that it had, wherever the process works now; a damaged one changes nothing."""
    monkeypatch.chdir(tmp_path)
    file = Path("erllama.toml")
    file.write_text('[models.m]\nbackend = "stub"\n')
    with Engine.from_config(file) as engine:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        file = tmp_path / file
        file.write_text('[cache]\nmin_tokens = 5\n[models.m]\nbackend = "stub"\n')
        assert [str(change) for change in engine.reload().changed] == ["cache.min_tokens: 64 -> 5"]
        file.write_text("[cache\n")
        with pytest.raises(ConfigError, match="not TOML"):
            engine.reload()
        assert engine.config.cache.min_tokens == 5
        monkeypatch.setenv("ERLLAMA_CACHE__MIN_TOKENS", "6")
        file.write_text('[models.m]\nbackend = "stub"\n')
        engine.reload()
        assert engine.config.cache.min_tokens == 6


def test_awaiting(engine: Engine, table: dict[str, Any]) -> None:
    """The awaitable twin does the same."""
    table["cache"] = {"min_tokens": 7}
    assert paths(asyncio.run(engine.aio.reload()))[0] == {"cache.min_tokens"}


# -------------------------------------------------------------------- the plan

_POLICY = st.fixed_dictionaries(
    {},
    optional={
        "min_tokens": st.integers(0, 3),
        "continued_interval": st.integers(0, 3),
        "write": st.sampled_from(["through", "back"]),
        "boundary_align_tokens": st.sampled_from([16, 32]),
    },
)
_MODEL = st.builds(
    lambda policy, n_ctx: {"backend": "stub", "policy": policy, "context_opts": {"n_ctx": n_ctx}},
    _POLICY,
    st.integers(64, 66),
)
_TABLES = st.builds(
    lambda cache, models, quota, pressure: {
        "cache": cache,
        "models": models,
        "tiers": [{"name": "ram", "kind": "ram", "quota_bytes": quota}],
        "pressure": pressure,
    },
    _POLICY,
    st.dictionaries(st.sampled_from("abc"), _MODEL),
    st.integers(1, 3),
    st.fixed_dictionaries(
        {},
        optional={
            "interval_ms": st.integers(1, 3),
            "evict_tiers": st.sampled_from([["ram"], []]),
            "source": st.sampled_from(["noop", "system"]),
        },
    ),
)
_HOST = PluginHost()


def planned(before: EngineConfig, after: EngineConfig) -> Plan:
    loaded = frozenset(before.models)
    running = Running(
        loaded=loaded,
        from_config=loaded,
        can_change_quota=lambda _: True,
        logging_is_ours=True,
    )
    return plan_reload(before, after, running, _HOST)


@given(_TABLES, _TABLES)
def test_a_plan_is_whole(before_table: Mapping[str, Any], after_table: Mapping[str, Any]) -> None:
    """Done once, only what it kept is left to do; and what was not different, it left alone."""
    before, after = (load_config(one, environ={}) for one in (before_table, after_table))
    plan = planned(before, after)
    again = planned(plan.config, after)
    assert not again.changed
    assert not again.added
    assert not again.removed
    assert not again.quotas
    assert {kept.path for kept in again.kept} == {kept.path for kept in plan.kept}
    if not plan.kept:
        assert plan.config == after
    if not plan.changed:
        assert plan.config.cache == before.cache
        assert plan.config.tiers == before.tiers
    assert planned(before, before).config == before

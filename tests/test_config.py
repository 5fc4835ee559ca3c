"""The configuration: what is read, what is refused, and that every mistake is told at once."""

from __future__ import annotations

import enum
import pickle
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from erllama_core import Engine
from erllama_core.cache.policy import SavePolicy
from erllama_core.config import (
    CacheConfig,
    EngineConfig,
    EngineSettings,
    ModelConfig,
    PressureConfig,
    ThinkingMarkers,
    TierConfig,
    check_config,
    config_warnings,
    examine_config,
    load_config,
    memory_problems,
    model_config,
    read_config,
    structure_options,
)
from erllama_core.config.environment import parse_value
from erllama_core.errors import ConfigError, PluginFailed
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import ContextOptions
from erllama_core.providers import BackendProvider, ByteSize, PressureProvider, TierProvider

DESIGN = """
[engine]
thinking_signing_key_file = "/run/secrets/erllama"

[plugins]
block = ["some-distribution"]

[cache]
min_tokens = 64

[[tiers]]
name = "my_disk"
kind = "disk"
root = "/var/lib/erllama/kvc"
quota_bytes = "50GiB"

[models.tiny]
backend = "llama"
model_path = "/srv/models/tiny.gguf"
tier = ["ram", "my_disk"]
context_opts = { n_ctx = 8192, n_seq_max = 4 }
thinking_markers = { start = "<think>", end = "</think>" }
policy = { min_tokens = 256 }

[pressure]
enabled = true
source = "system"
interval_ms = 5000
high_watermark = 0.85
low_watermark = 0.75
min_evict_bytes = "1MiB"
evict_tiers = ["ram", "ram_file"]
unload_idle_models = false
"""


def problems(table: Mapping[str, Any], **environ: str) -> dict[str, str]:
    """The problems of a configuration: path to the whole line."""
    found = read_config(table, environ=environ).problems
    assert len({problem.path for problem in found}) == len(found)
    return {problem.path: str(problem) for problem in found}


def model_problems(**options: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        model_config(options)
    return {problem.path: str(problem) for problem in caught.value.problems}


# ----------------------------------------------------------------------- reading


def test_file(tmp_path: Path) -> None:
    """A whole file becomes the classes, with units and defaults filled in."""
    file = tmp_path / "erllama.toml"
    file.write_text(DESIGN)
    config = load_config(file, environ={})
    assert config.engine.thinking_signing_key_file == Path("/run/secrets/erllama")
    assert config.plugins.block == ("some-distribution",)
    assert config.plugins.allow is None
    options = {"root": "/var/lib/erllama/kvc", "quota_bytes": "50GiB"}
    assert config.tiers == (TierConfig("my_disk", "disk", options), TierConfig("ram", "ram"))
    assert config.models["tiny"] == ModelConfig(
        model_path=Path("/srv/models/tiny.gguf"),
        tier=("ram", "my_disk"),
        context_opts=ContextOptions(n_ctx=8192, n_seq_max=4),
        thinking_markers=ThinkingMarkers(start="<think>", end="</think>"),
        policy={"min_tokens": 256},
    )
    assert config.pressure == PressureConfig(enabled=True)


def test_mapping_is_the_same_structure(tmp_path: Path) -> None:
    """A mapping is read like the file, and is not changed by reading it."""
    file = tmp_path / "erllama.toml"
    file.write_text(DESIGN)
    table = tomllib.loads(DESIGN)
    assert load_config(table, environ={"ERLLAMA_CACHE__MIN_TOKENS": "1"}).cache.min_tokens == 1
    assert table == tomllib.loads(DESIGN)
    assert load_config(table, environ={}) == load_config(str(file), environ={})


def test_empty() -> None:
    """Nothing at all is a configuration: the defaults, which are right."""
    assert load_config({}, environ={}) == EngineConfig()
    assert EngineConfig().problems() == []
    assert EngineConfig().tiers == (TierConfig("ram", "ram"),)


def test_ram_tier_can_be_given() -> None:
    """A tier that is called "ram" in the configuration is not added again."""
    table = {"tiers": [{"name": "ram", "kind": "ram", "quota_bytes": "1GiB"}]}
    (tier,) = load_config(table, environ={}).tiers
    assert tier.options == {"quota_bytes": "1GiB"}


def test_configuration_can_be_pickled() -> None:
    """A configuration can be handed to another process."""
    config = load_config(tomllib.loads(DESIGN), environ={})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (b"[cache\n", "line 1", "not TOML"),
        (b"a = 1\n\nb = = 2\n", "line 3", "not TOML"),
        (b"a = 1\na = 2\n", "line 2", "not TOML"),
        (b"\xff\xfe", "byte 0", "UTF-8"),
        (b"a = " + b"9" * 5000, "TOML", "cannot be read"),
        (b"a = " + b"[" * 5000, "TOML", "deep"),
        (b"a" + b".a" * 3000 + b" = 1", "(top)", "more than 64 deep"),
        (b"[cache]\na = " + b"[" * 70 + b"]" * 70, "(top)", "more than 64 deep"),
    ],
)
def test_not_toml(tmp_path: Path, text: bytes, place: str, words: str) -> None:
    """A file that is no TOML is refused with the place."""
    file = tmp_path / "erllama.toml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={})
    (problem,) = caught.value.problems
    assert problem.path.startswith(place)
    assert words in problem.message
    assert caught.value.source == str(file)


def test_a_mapping_that_holds_itself() -> None:
    """What has no end is refused, however many ways lead into it."""
    table: dict[str, Any] = {}
    table["cache"] = table["models"] = {"a": table, "b": [table, table]}
    with pytest.raises(ConfigError, match="more than 64 deep"):
        load_config(table, environ={})


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    """A file that cannot be read is a ConfigError, too."""
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(tmp_path / name, environ={})


# ---------------------------------------------------------------------- mistakes


def test_every_mistake_at_once() -> None:
    """Mistakes of all kinds, in all sections, are told together, each with its full path."""
    found = problems(
        {
            "modles": {},
            "engine": {"thinking_signing_key": "x"},
            "plugins": {"block": "name"},
            "cache": {"min_tokenz": 1, "cold_min_tokens": True, "boundary_align_tokens": 0},
            "tiers": [{"name": "a"}, {"name": "b", "kind": "disk"}, {"name": "b", "kind": "x"}, 5],
            "models": {
                "tiny": {
                    "context_opts": {"n_ctxx": 1, "n_batch": 0, "n_seq_max": "4"},
                    "policy": {"min_tokens": -1, "continued_intervall": 4},
                    "fingerprint_mode": "fast",
                    "thinking_markers": {"start": "<"},
                    "tier": ["ram", "ram"],
                },
                "odd name": {"context_size": 9999},
                "third": 3,
            },
            "pressure": {"high_watermark": 1.5, "interval_ms": 2.0, "sytem": {"a": 1}},
            "logging": {"level": "loud", "file": "x"},
        }
    )
    assert set(found) == {
        "modles",
        "engine.thinking_signing_key",
        "plugins.block",
        "cache.min_tokenz",
        "cache.cold_min_tokens",
        "cache.boundary_align_tokens",
        "tiers[0].kind",
        "tiers[3]",
        "tiers[1].name",
        "models.tiny.context_opts.n_ctxx",
        "models.tiny.context_opts.n_batch",
        "models.tiny.context_opts.n_seq_max",
        "models.tiny.policy.min_tokens",
        "models.tiny.policy.continued_intervall",
        "models.tiny.fingerprint_mode",
        "models.tiny.thinking_markers.end",
        "models.tiny.tier",
        'models."odd name".context_size',
        "models.third",
        "pressure.high_watermark",
        "pressure.interval_ms",
        "pressure.sytem",
        "logging.level",
        "logging.file",
    }
    assert "did you mean 'models'?" in found["modles"]
    assert "did you mean 'n_ctx'?" in found["models.tiny.context_opts.n_ctxx"]
    assert "did you mean 'continued_interval'?" in found["models.tiny.policy.continued_intervall"]
    assert "did you mean 'system'?" in found["pressure.sytem"]
    assert "expected an integer, got '4'" in found["models.tiny.context_opts.n_seq_max"]
    assert "expected an integer, got true" in found["cache.cold_min_tokens"]
    assert "expected a list, got 'name'" in found["plugins.block"]
    assert "required: text" in found["models.tiny.thinking_markers.end"]


@pytest.mark.parametrize("section", ["engine", "plugins", "cache", "models", "pressure", "logging"])
@pytest.mark.parametrize("value", [5, "text", [1], None])
def test_section_that_is_no_table(section: str, value: object) -> None:
    """A section of another type is one problem."""
    assert list(problems({section: value})) == [section]


@pytest.mark.parametrize("value", [5, "text", {"name": "a"}, None])
def test_tiers_that_are_no_list(value: object) -> None:
    """[tiers] written as a table is one problem that says how it is written."""
    assert "[[tiers]]" in problems({"tiers": value})["tiers"]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_integers_are_integers(value: object) -> None:
    """Neither truth values nor fractions nor text pass for an integer."""
    assert "expected an integer" in problems({"cache": {"min_tokens": value}})["cache.min_tokens"]


@pytest.mark.parametrize("value", [1, "yes", None])
def test_booleans_are_booleans(value: object) -> None:
    """Only true and false are truth values."""
    found = problems({"pressure": {"enabled": value}})
    assert "expected true or false" in found["pressure.enabled"]


@pytest.mark.parametrize("value", ["off", 1, 0, None])
def test_flash_attention(value: object) -> None:
    """flash_attn is "auto", true or false, and nothing that is equal to one of them."""
    found = model_problems(context_opts={"flash_attn": value})
    assert list(found) == ["context_opts.flash_attn"]
    for good in ("auto", True, False):
        assert model_config({"context_opts": {"flash_attn": good}}).context_opts.flash_attn is good


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"context_opts": {"n_ctx": 0}}, "context_opts.n_ctx"),
        ({"context_opts": {"n_ctx": 1 << 40}}, "context_opts.n_ctx"),
        ({"context_opts": {"n_ubatch": -1}}, "context_opts.n_ubatch"),
        ({"context_opts": {"n_seq_max": 0}}, "context_opts.n_seq_max"),
        ({"context_opts": {"n_threads": 0}}, "context_opts.n_threads"),
        ({"context_opts": {"type_k": ""}}, "context_opts.type_k"),
        ({"fingerprint": "abc"}, "fingerprint"),
        ({"fingerprint": "x" * 64}, "fingerprint"),
        ({"fingerprint_mode": "fast_unsafe"}, "fingerprint_mode"),
        ({"quant_bits": 0}, "quant_bits"),
        ({"context_size": 4096}, "context_size"),
        ({"context_size": 0}, "context_size"),
        ({"tier": ["ram", "ram"]}, "tier"),
        ({"tier": 5}, "tier"),
        ({"tier": [5]}, "tier[0]"),
        ({"backend": ""}, "backend"),
        ({"model_path": ""}, "model_path"),
        ({"model_path": "a\0b"}, "model_path"),
        ({"model_path": 5}, "model_path"),
        ({"thinking_markers": {"start": "", "end": "x"}}, "thinking_markers.start"),
        ({"thinking_markers": {"start": "a", "end": "a"}}, "thinking_markers.end"),
        (
            {
                "thinking_markers": {"start": "a", "end": "b"},
                "tool_call_markers": {"start": "c", "end": "a"},
            },
            "tool_call_markers.end",
        ),
        (
            {
                "tool_call_markers": {
                    "start": "a",
                    "end": "$eos",
                    "payload_start": "c",
                    "payload_end": "c",
                }
            },
            "tool_call_markers.payload_end",
        ),
        ({"thinking_markers": {"start": "\ud800", "end": "b"}}, "thinking_markers.start"),
        (
            {"thinking_markers": {"start": "a", "end": "b"}, "processors": ["tool_calls"]},
            "thinking_markers",
        ),
        (
            {"tool_call_markers": {"start": "a", "end": "b"}, "processors": ["thinking"]},
            "tool_call_markers",
        ),
        ({"processors": ["utf8"]}, "processors"),
        ({"processors": ["thinking", "thinking"]}, "processors"),
        ({"processor_opts": {"mine": {}}}, "processor_opts.mine"),
        (
            {"tool_call_markers": {"start": "a", "end": "b", "payload_start": "c"}},
            "tool_call_markers.payload_end",
        ),
        ({"policy": 5}, "policy"),
        ({"model_opts": 5}, "model_opts"),
        ({"n_ctx": 5}, "n_ctx"),
    ],
)
def test_model_values(options: dict[str, Any], path: str) -> None:
    """Each of these is one problem, at its place."""
    assert list(model_problems(**options)) == [path]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"high_watermark": 0.0}, "high_watermark"),
        ({"high_watermark": float("nan")}, "high_watermark"),
        ({"low_watermark": float("inf")}, "low_watermark"),
        ({"low_watermark": 0.9}, "low_watermark"),
        ({"low_watermark": 0.85}, "low_watermark"),
        ({"low_watermark": True}, "low_watermark"),
        ({"interval_ms": 0}, "interval_ms"),
        ({"source": []}, "source"),
        ({"min_evict_bytes": "1 parsec"}, "min_evict_bytes"),
        ({"source_options": 5}, "source_options"),
    ],
)
def test_pressure_values(options: dict[str, Any], path: str) -> None:
    """Each of these is one problem, at its place."""
    assert list(problems({"pressure": options})) == [f"pressure.{path}"]


def test_both_signing_keys() -> None:
    """A key file and a key variable contradict each other."""
    table = {"engine": {"thinking_signing_key_file": "a", "thinking_signing_key_env": "b"}}
    assert list(problems(table)) == ["engine.thinking_signing_key_env"]


@pytest.mark.parametrize(
    ("options", "path", "suggestion"),
    [
        ({"level": "inf"}, "logging.level", "info"),
        ({"level": 20}, "logging.level", None),
        ({"format": "jsn"}, "logging.format", "json"),
        ({"fomat": "json"}, "logging.fomat", "format"),
    ],
)
def test_logging_values(options: dict[str, Any], path: str, suggestion: str | None) -> None:
    """Levels and formats are among a few words."""
    (problem,) = read_config({"logging": options}, environ={}).problems
    assert (problem.path, problem.suggestion) == (path, suggestion)


def test_source_tables() -> None:
    """[pressure.<source>] tables are kept for the source that they name."""
    table = {"pressure": {"source": ["system", "nvidia"], "nvidia": {"devices": [0]}}}
    config = load_config(table, environ={})
    assert config.pressure.source_options == {"nvidia": {"devices": [0]}}


def test_python_values() -> None:
    """From Python, instances, bytes and tuples stand for tables, hex digits and lists."""
    config = model_config(
        {
            "context_opts": ContextOptions(n_ctx=64),
            "fingerprint": b"\xab" * 32,
            "ctx_params_hash": b"\x01",
            "tier": ("ram",),
            "model_path": Path("x"),
        }
    )
    assert config.fingerprint == "ab" * 32
    assert config.ctx_params_hash == "01"
    assert config.context_opts.n_ctx == 64
    assert "context_opts.n_ctx" in model_problems(context_opts=ContextOptions(n_ctx=0))


def test_model_config_made_in_python() -> None:
    """An instance is checked like a table."""
    good = ModelConfig(backend="stub")
    assert model_config(good) is good
    with pytest.raises(ConfigError, match="quant_bits"):
        model_config(ModelConfig(quant_bits=0))


def test_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may begin with the home folder."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert model_config({"model_path": "~/m.gguf"}).model_path == Path("/home/somebody/m.gguf")


def test_model_config_path_prefix() -> None:
    """The caller's path stands before every problem's path."""
    with pytest.raises(ConfigError) as caught:
        model_config({"tire": "ram", "quant_bits": 0}, "models.x")
    assert {p.path for p in caught.value.problems} == {"models.x.tire", "models.x.quant_bits"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "kind",
                    "tiny",
                    "n_ctx",
                    "context_opts",
                    "min_tokens",
                    "policy",
                    "tier",
                    "?",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["engine", "plugins", "cache", "tiers", "models", "pressure", "logging", "other"]
        ),
        _JSON,
    )
)
def test_nonsense_is_only_ever_a_config_error(table: dict[str, Any]) -> None:
    """Whatever is in the tables, reading gives a usable configuration or located problems."""
    loaded = read_config(table, environ={})
    assert isinstance(loaded.config, EngineConfig)
    if not loaded.problems:
        assert loaded.config.problems() == []
    assert all(problem.path and problem.message for problem in loaded.problems)


# ------------------------------------------------------------------------ policy


def test_model_policy_overrides_single_fields() -> None:
    """A model's policy is [cache]'s, but for the fields that it gives."""
    table = {
        "cache": {"min_tokens": 10, "continued_interval": 99},
        "models": {"m": {"policy": {"min_tokens": 20}}},
    }
    config = load_config(table, environ={})
    policy = config.policy_for(config.models["m"])
    assert policy == SavePolicy(min_tokens=20, continued_interval=99)
    assert type(policy) is SavePolicy


def test_policy_that_contradicts_the_cache_section() -> None:
    """A contradiction that only the merged policy has is told at the model."""
    table = {
        "cache": {"cold_min_tokens": 100},
        "models": {"m": {"policy": {"cold_max_tokens": 50}}},
    }
    assert list(problems(table)) == ["models.m.policy.cold_max_tokens"]
    model = ModelConfig(policy={"cold_max_tokens": 50})
    with pytest.raises(ConfigError, match=r"policy\.cold_max_tokens"):
        EngineConfig(cache=CacheConfig(cold_min_tokens=100)).policy_for(model)


def test_policy_that_resolves_a_contradiction_with_the_defaults() -> None:
    """A model's fields are judged against [cache], not against the defaults."""
    table = {
        "cache": {"cold_min_tokens": 16},
        "models": {"m": {"policy": {"cold_max_tokens": 32}}},
    }
    assert problems(table) == {}


def test_mistake_in_the_cache_section_is_told_once() -> None:
    """A wrong value of [cache] is not told again for every model."""
    table = {"cache": {"min_tokens": -1}, "models": {"a": {}, "b": {}}}
    assert list(problems(table)) == ["cache.min_tokens"]


def test_policy_of_a_config_made_in_python() -> None:
    """A policy that no loader has seen is checked like any other."""
    config = EngineConfig(models={"m": ModelConfig(policy={"min_tokenz": 1})})
    assert [problem.path for problem in config.problems()] == ["models.m.policy.min_tokenz"]


# ------------------------------------------------------------------- environment


def test_environment_overrides() -> None:
    """Variables reach every level, by any spelling that a variable allows."""
    table = {
        "tiers": [{"name": "my-disk", "kind": "disk"}],
        "models": {"Llama-3.2": {"context_opts": {"n_ctx": 1}, "processors": []}},
    }
    loaded = read_config(
        table,
        environ={
            "ERLLAMA_CACHE__MIN_TOKENS": "128",
            "ERLLAMA_MODELS__LLAMA_3_2__CONTEXT_OPTS__N_CTX": "4096",
            "ERLLAMA_MODELS__LLAMA_3_2__TIER": '["ram", "my-disk"]',
            "ERLLAMA_TIERS__MY_DISK__QUOTA_BYTES": "50GiB",
            "ERLLAMA_PRESSURE__ENABLED": "true",
            "ERLLAMA_PRESSURE__NOOP__DEPTH": "3",
            "ERLLAMA_PRESSURE__SOURCE": "noop",
            "ERLLAMA_LOGGING__LEVEL": "info",
            "ERLLAMA_ENGINE__MEMORY_BUDGET_BYTES": "2GiB",
            "ERLLAMA_PLUGINS__BLOCK": '["a"]',
            "ERLLAMA_MODELS__LLAMA_3_2__PROCESSORS": '["mine"]',
            "ERLLAMA_MODELS__LLAMA_3_2__PROCESSOR_OPTS__MINE__DEPTH": "2",
            "ERLLAMA_MODELS__LLAMA_3_2__THINKING_MARKERS__START": "<think>",
            "ERLLAMA_MODELS__LLAMA_3_2__THINKING_MARKERS__END": "</think>",
            "ERLLAMA_MODELS__LLAMA_3_2__POLICY__MIN_TOKENS": "7",
            "ERLLAMA_TIERS__RAM__QUOTA_BYTES": "1GiB",
            "ERLLAMA_MODELS__NEW__MODEL_PATH": "/srv/x.gguf",
            "PATH": "/bin",
            "ERLLAMA_TEST_MODEL": "/x",
            "ERLLAMA_TEST_A__B": "1",
            "ERLLAMA_DEBUG": "1",
        },
    )
    config = loaded.config
    # A marker without its processor is told to be wrong, so both arrived.
    assert [problem.path for problem in loaded.problems] == ['models."Llama-3.2".thinking_markers']
    assert config.cache.min_tokens == 128
    assert config.pressure.source_options == {"noop": {"depth": 3}}
    assert config.logging.level == "info"
    assert config.engine.memory_budget_bytes == 2 << 30
    assert config.plugins.block == ("a",)
    assert config.models["Llama-3.2"].processor_opts == {"mine": {"depth": 2}}
    assert config.models["Llama-3.2"].policy == {"min_tokens": 7}
    assert config.tiers[1] == TierConfig("ram", "ram", {"quota_bytes": "1GiB"})
    assert config.models["Llama-3.2"].context_opts.n_ctx == 4096
    assert config.models["Llama-3.2"].tier == ("ram", "my-disk")
    assert config.models["new"].model_path == Path("/srv/x.gguf")
    assert config.tiers[0].options == {"quota_bytes": "50GiB"}
    assert config.pressure.enabled


def test_a_variable_of_many_levels() -> None:
    """A variable's name can be long; it leads no deeper than any option is."""
    (line,) = problems({}, **{"ERLLAMA_CACHE" + "__A" * 20_000: "1"}).values()
    assert "20001 levels; 64 at most" in line


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("ERLLAMA_CACHES__MIN_TOKENS", "did you mean 'cache'?"),
        ("ERLLAMA_TIERS__OTHER__ROOT", "no tier has the name 'other'; configured: 'disk'"),
        ("ERLLAMA_TIERS__DISK", "none of its keys"),
        ("ERLLAMA_CACHE__", "nothing"),
        ("ERLLAMA_CACHE____MIN_TOKENS", "nothing"),
        ("ERLLAMA_MODELS__A_B__TIER", "can mean 'a-b' or 'a_b'"),
        ("ERLLAMA_MODELS__A_B", "can mean"),
    ],
)
def test_variable_that_leads_nowhere(variable: str, words: str) -> None:
    """A variable with no place in the configuration is a problem that names it."""
    table = {"tiers": [{"name": "disk", "kind": "disk"}], "models": {"a-b": {}, "a_b": {}}}
    found = problems(table, **{variable: "1"})
    assert list(found) == [variable]
    assert words in found[variable]


def test_mistake_in_a_variable_names_it() -> None:
    """A wrong value tells which variable it is from."""
    found = problems({}, ERLLAMA_CACHE__MIN_TOKENS="many")
    assert found["cache.min_tokens"] == (
        "cache.min_tokens: expected an integer, got 'many' (set by ERLLAMA_CACHE__MIN_TOKENS)"
    )


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an explicit environment the process's own is used."""
    monkeypatch.setenv("ERLLAMA_CACHE__MIN_TOKENS", "77")
    assert load_config({}).cache.min_tokens == 77


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("128", 128),
        ("true", True),
        ("0.5", 0.5),
        ('"128"', "128"),
        ("50GiB", "50GiB"),
        ("/srv/x.gguf", "/srv/x.gguf"),
        ('["a", "b"]', ["a", "b"]),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
        ("2024-01-01", "2024-01-01"),
        ("9" * 5000, "9" * 5000),
        ("[" * 5000, "[" * 5000),
        ("{" + "a." * 3000 + "a = 1}", "{" + "a." * 3000 + "a = 1}"),
    ],
)
def test_value_of_a_variable(text: str, value: object) -> None:
    """A value is what TOML makes of it, or itself; it cannot bring in other keys."""
    assert parse_value(text) == value


# ------------------------------------------------------------- providers' options


class Colour(enum.Enum):
    RED = "red"


@attrs.frozen
class Inner:
    depth: int = attrs.field(default=1, validator=attrs.validators.ge(1))


@attrs.frozen
class Options:
    """Options as a plugin might have them."""

    root: Path
    quota_bytes: ByteSize | None = None
    ratio: float = 0.5
    devices: tuple[int | str, ...] = ()
    mode: Literal["a", "b"] = "a"
    level: Literal[0, 1] = 0
    colour: Colour = Colour.RED
    inner: Inner = attrs.field(factory=Inner)
    several: list[Inner] = attrs.field(factory=list)
    pair: tuple[int, str] = (1, "x")
    table: Mapping[str, int] = attrs.field(factory=dict)
    anything: Any = None


def test_structure_options() -> None:
    """A plugin's own class is filled from a table, of every type that tables have."""
    made = structure_options(
        Options,
        {
            "root": "/x",
            "quota_bytes": "1.5KiB",
            "ratio": 1,
            "devices": [0, "GPU-1"],
            "mode": "b",
            "colour": "red",
            "inner": {"depth": 2},
            "several": [{}, {"depth": 3}],
            "pair": [2, "y"],
            "table": {"a": 1},
            "anything": [1, {"b": 2}],
        },
    )
    assert made == Options(
        root=Path("/x"),
        quota_bytes=ByteSize(1536),
        ratio=1.0,
        devices=(0, "GPU-1"),
        mode="b",
        inner=Inner(2),
        several=[Inner(1), Inner(3)],
        pair=(2, "y"),
        table={"a": 1},
        anything=[1, {"b": 2}],
    )


def test_structure_options_tells_every_mistake() -> None:
    """Nested mistakes of a plugin's options have full paths, validators included."""
    with pytest.raises(ConfigError) as caught:
        structure_options(
            Options,
            {
                "quota_bytes": True,
                "ratio": "x",
                "devices": [0, 1.5],
                "mode": "c",
                "level": True,
                "colour": "blue",
                "inner": {"depth": 0},
                "several": [{"depth": 1}, {"depht": 1}],
                "pair": [1],
                "table": {"a": "b"},
                "rooot": 1,
            },
            "tiers[0]",
        )
    assert {problem.path for problem in caught.value.problems} == {
        "tiers[0].root",
        "tiers[0].quota_bytes",
        "tiers[0].ratio",
        "tiers[0].devices[1]",
        "tiers[0].mode",
        "tiers[0].level",
        "tiers[0].colour",
        "tiers[0].inner.depth",
        "tiers[0].several[1].depht",
        "tiers[0].pair",
        "tiers[0].table.a",
        "tiers[0].rooot",
    }


def test_options_class_that_cannot_be_filled() -> None:
    """A plugin's class with a type that no table can hold is the plugin's failure."""

    @attrs.frozen
    class Broken:
        value: socket  # type: ignore[name-defined]  # noqa: F821 - what the test is about

    with pytest.raises(PluginFailed, match="Broken cannot be filled"):
        structure_options(Broken, {"value": 1})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (5, 5),
        ("5", 5),
        ("5B", 5),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        ("50gib", 50 << 30),
        ("512MB", 512_000_000),
        ("2TiB", 2 << 40),
    ],
)
def test_byte_size(text: object, size: int) -> None:
    """Sizes are integers, or text with a decimal or binary unit."""
    config = load_config({"pressure": {"min_evict_bytes": text}}, environ={})
    assert config.pressure.min_evict_bytes == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", -1, "1e3", "1 GB extra", "5G", "٣GB", 1.5, True, "9" * 5000 + "PB"]
)
def test_not_a_byte_size(text: object) -> None:
    """Everything else is refused, also sizes that no machine has."""
    assert list(problems({"pressure": {"min_evict_bytes": text}})) == ["pressure.min_evict_bytes"]


@given(st.integers(0, (1 << 40)), st.sampled_from(["KiB", "MiB", "B", ""]))
def test_byte_size_is_exact(number: int, unit: str) -> None:
    """A whole number of a unit is that number times the unit, without rounding."""
    factor = {"KiB": 1 << 10, "MiB": 1 << 20, "B": 1, "": 1}[unit]
    table = {"cache": {"max_inflight_bytes": f"{number + 1}{unit}"}}
    assert load_config(table, environ={}).cache.max_inflight_bytes == (number + 1) * factor


# ---------------------------------------------------------------- cross checking


@attrs.frozen
class StoreOptions:
    root: Path
    quota_bytes: ByteSize | None = None


@attrs.frozen
class WeightOptions:
    n_gpu_layers: int = 0


class Plugin:
    """A backend, a tier and a source whose options have classes."""

    @staticmethod
    def make(options: Any) -> Any:
        raise AssertionError("checking opens nothing")

    def hooks(self) -> Any:
        from erllama_core.hookspecs import hookimpl

        make = self.make

        class Hooks:
            @hookimpl
            def erllama_backends(self) -> list[BackendProvider]:
                return [BackendProvider("weights", "x", make, config=WeightOptions)]

            @hookimpl
            def erllama_tiers(self) -> list[TierProvider]:
                return [TierProvider("store", "x", make, config=StoreOptions)]

            @hookimpl
            def erllama_pressure_sources(self) -> list[PressureProvider]:
                return [PressureProvider("gauge", "x", make)]

        return Hooks()


@pytest.fixture
def host() -> PluginHost:
    host = PluginHost(discover=False)
    host.register(Plugin().hooks())
    return host


def test_check_of_a_good_configuration(host: PluginHost, tmp_path: Path) -> None:
    """A configuration that fits this machine has no problems."""
    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"GGUF")
    config = load_config(
        {
            "tiers": [{"name": "s", "kind": "store", "root": "/x", "quota_bytes": "1GiB"}],
            "models": {
                "m": {
                    "backend": "weights",
                    "model_path": str(weights),
                    "model_opts": {"n_gpu_layers": 3},
                    "tier": "s",
                }
            },
            "pressure": {"enabled": True, "source": "gauge", "evict_tiers": ["s", "store"]},
        },
        environ={},
    )
    assert check_config(config, host) == []


def test_check_against_the_machine(host: PluginHost, tmp_path: Path) -> None:
    """Unknown names, wrong options of providers, and missing files are all found."""
    config = load_config(
        {
            "tiers": [
                {"name": "a", "kind": "stor"},
                {"name": "b", "kind": "store", "quota_bytes": "1 mile"},
                {"name": "c", "kind": "disk"},
            ],
            "models": {
                "one": {
                    "backend": "weigths",
                    "model_path": str(tmp_path / "none"),
                    "tier": ["ram", "bb"],
                },
                "two": {
                    "backend": "weights",
                    "model_path": str(tmp_path),
                    "model_opts": {"n_gpu_layer": 1},
                },
            },
            "pressure": {"enabled": True, "source": ["gauge", "system"], "gauge": {"x": 1}},
        },
        environ={},
    )
    found = {problem.path: problem for problem in check_config(config, host)}
    assert set(found) == {
        "tiers[0].kind",
        "tiers[1].root",
        "tiers[1].quota_bytes",
        "tiers[2].kind",
        "models.one.backend",
        "models.one.model_path",
        "models.one.tier",
        "models.two.model_path",
        "models.two.model_opts.n_gpu_layer",
        "pressure.source",
        "pressure.gauge.x",
    }
    assert found["tiers[0].kind"].suggestion == "store"
    assert found["models.one.backend"].suggestion == "weights"
    assert found["models.one.tier"].suggestion == "b"
    assert found["models.two.model_opts.n_gpu_layer"].suggestion == "n_gpu_layers"
    assert "pip install erllama-tier-disk" in found["tiers[2].kind"].message
    assert "pip install erllama-pressure-system" in found["pressure.source"].message
    assert "folder" in found["models.two.model_path"].message


KEY = b"k" * 32


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)]
)
def test_a_key_file_that_others_can_use(
    host: PluginHost, tmp_path: Path, mode: int, warned: bool
) -> None:
    """It works, with a warning that says what to do; check and the engine's log have it."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(key)
    table = {"engine": {"thinking_signing_key_file": str(link)}}
    found = examine_config(table, environ={}, host=host)
    assert found.problems == ()
    told = [str(warning) for warning in found.warnings]
    with capture_logs() as logs, Engine(load_config(table, environ={}), plugins=host):
        pass
    logged = [entry for entry in logs if entry["event"] == "config.questionable"]
    assert len(told) == len(logged) == warned
    if warned:
        assert f"mode {mode:04o}" in told[0]
        assert "chmod 600" in told[0]
        assert logged[0]["path"] == "engine.thinking_signing_key_file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"short", "32 bytes at least; this one has 5"),
        (b"", "this one has 0"),
        (b"x" * 70_000, "which is no key"),
    ],
)
def test_a_key_file_that_is_none(
    host: PluginHost, tmp_path: Path, content: bytes | None, words: str
) -> None:
    """A file that is not there, or holds no key, is a problem; the key is not shown."""
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)
    table = {"engine": {"thinking_signing_key_file": str(key)}}
    (problem,) = examine_config(table, environ={}, host=host).problems
    assert problem.path == "engine.thinking_signing_key_file"
    assert words in problem.message
    assert "short" not in problem.message.replace("shorter", "")


def test_a_device_as_key_file(host: PluginHost) -> None:
    """A file without an end is not read to its end."""
    table = {"engine": {"thinking_signing_key_file": "/dev/zero"}}
    (problem,) = examine_config(table, environ={}, host=host).problems
    assert "which is no key" in problem.message


def test_a_plugin_that_is_allowed_and_not_there(tmp_path: Path) -> None:
    """plugins.allow with a misspelt name is warned of; what is blocked need not be installed."""
    table = {"plugins": {"allow": ["Erllama.Tier_Disk", "erllama-teir-disk"], "block": ["x"]}}
    (warning,) = examine_config(table, environ={}).warnings
    assert warning.path == "plugins.allow"
    assert warning.suggestion == "erllama-tier-disk"


def test_what_providers_say_of_their_options(tmp_path: Path) -> None:
    """A provider's own check is asked; with stores=False not that of tiers; one may fail."""

    def tier(options: StoreOptions) -> list[tuple[str, str]]:
        return [("root", f"{options.root} is not there")]

    def backend(request: Any) -> list[tuple[str, str]]:
        if request.model_path is None:
            return [("model_path", "needed"), ("context_opts.n_ctx", "odd")]
        raise RuntimeError("a mistake of the plugin's")

    class Hooks:
        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [TierProvider("store", "x", Plugin.make, config=StoreOptions, check=tier)]

        @hookimpl
        def erllama_backends(self) -> list[BackendProvider]:
            return [BackendProvider("weights", "x", Plugin.make, check=backend)]

    host = PluginHost(discover=False)
    host.register(Hooks())
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    config = load_config(
        {
            "tiers": [{"name": "s", "kind": "store", "root": "/x"}],
            "models": {
                "a": {"backend": "weights"},
                "b": {"backend": "weights", "model_path": str(file)},
            },
        },
        environ={},
    )
    found = {problem.path: problem.message for problem in check_config(config, host)}
    assert found == {
        "tiers[0].root": "/x is not there",
        "models.a.model_path": "needed",
        "models.a.context_opts.n_ctx": "odd",
        "models.b": "could not be checked: RuntimeError: a mistake of the plugin's",
    }
    left = {problem.path for problem in check_config(config, host, stores=False)}
    assert left == found.keys() - {"tiers[0].root"}


def test_shipped_plugins_check_their_options(tmp_path: Path) -> None:
    """A llama model without a file or with another's, and roots that cannot be used."""
    text = tmp_path / "no.gguf"
    text.write_text("not a model")
    config = load_config(
        {
            "tiers": [
                {"name": "a", "kind": "disk", "root": str(text)},
                {"name": "b", "kind": "disk", "root": str(text / "below")},
                {"name": "c", "kind": "disk", "root": str(tmp_path / "no"), "read_only": True},
                {"name": "d", "kind": "ram_file", "root": str(tmp_path / "deep" / "er")},
                {"name": "e", "kind": "disk", "root": "/proc/1/kvc"},
            ],
            "models": {
                "one": {},
                "two": {"model_path": str(text), "context_opts": {"type_k": "q8"}},
                "three": {"model_path": str(text), "context_opts": {"n_batch": 2, "n_seq_max": 4}},
            },
        },
        environ={},
    )
    found = {problem.path: problem.message for problem in check_config(config, PluginHost())}
    assert found.keys() == {
        "tiers[0].root",
        "tiers[1].root",
        "tiers[2].root",
        "tiers[4].root",
        "models.one.model_path",
        "models.two.model_path",
        "models.two.context_opts.type_k",
        "models.three.model_path",
        "models.three.context_opts.n_batch",
    }
    assert "required" in found["models.one.model_path"]
    assert "not a GGUF file" in found["models.two.model_path"]
    assert "did you mean 'q8_0'?" in found["models.two.context_opts.type_k"]
    assert not (tmp_path / "deep").exists()


def test_an_engine_tells_every_mistake_of_its_file(tmp_path: Path) -> None:
    """Engine.from_config too: options of plugins and files with the values, before it opens any."""
    root = tmp_path / "kvc"
    with pytest.raises(ConfigError) as caught:
        Engine.from_config(
            {
                "cache": {"min_tokens": -1},
                "tiers": [
                    {"name": "d", "kind": "disk", "root": str(root)},
                    {"name": "e", "kind": "dsik"},
                ],
                "models": {
                    "m": {"model_path": str(tmp_path / "none.gguf"), "model_opts": {"gpus": 1}},
                    "n": {"backend": "stub", "model_opts": {"scrpt": []}},
                },
            }
        )
    assert {problem.path for problem in caught.value.problems} == {
        "cache.min_tokens",
        "tiers[1].kind",
        "models.m.model_path",
        "models.m.model_opts.gpus",
        "models.n.model_opts.scrpt",
    }
    assert not root.exists()


def test_default_source_may_be_missing_while_pressure_is_off(host: PluginHost) -> None:
    """The default source need not be installed as long as nothing uses it."""
    assert check_config(EngineConfig(), host) == []
    config = EngineConfig(pressure=PressureConfig(evict_tiers=("rom",)))
    (problem,) = check_config(config, host)
    assert (problem.path, problem.suggestion) == ("pressure.evict_tiers", "ram")


def test_examine_goes_on_behind_mistakes(host: PluginHost) -> None:
    """A mistake in one key does not hide what the machine lacks for another."""
    found = examine_config(
        {
            "models": {"m": {"backend": "weigths", "quant_bits": "x", "tier": "t"}},
            "tiers": [{"name": "t"}],
            "pressure": {"enabled": True, "source": "gauge"},
        },
        environ={},
        host=host,
    )
    # The tier "t" is only known to be broken, so the model's use of it is not held against it.
    assert {problem.path for problem in found.problems} == {
        "models.m.quant_bits",
        "tiers[0].kind",
        "models.m.backend",
    }
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("pressure", "warned"),
    [
        ({"enabled": True}, False),
        ({"enabled": False, "evict_tiers": ["ram_file"]}, False),
        ({"enabled": True, "evict_tiers": ["ram_file"]}, True),
        ({"enabled": True, "evict_tiers": []}, True),
        ({"enabled": True, "evict_tiers": [], "unload_idle_models": True}, False),
    ],
)
def test_pressure_that_can_free_nothing(pressure: dict[str, Any], warned: bool) -> None:
    """A monitor that has nothing to give back can be configured, with a warning."""
    config = load_config({"pressure": pressure}, environ={})
    warnings = config_warnings(config, PluginHost(discover=False))
    assert [warning.path for warning in warnings] == ["pressure.evict_tiers"] * warned


RAM = {"name": "ram", "kind": "ram"}
SHM = {"kind": "ram_file", "root": "/x"}


@pytest.mark.parametrize(
    ("tiers", "found"),
    [
        ([], {}),
        ([RAM | {"quota_bytes": "1GiB"}], {}),
        (
            [RAM | {"quota_bytes": "2GiB"}],
            {"tiers[0].quota_bytes": "2.0 GiB is more than engine.memory_budget_bytes (1.0 GiB)"},
        ),
        ([RAM | {"quota_bytes": "1GiB"}, SHM | {"name": "a", "quota_bytes": "1GiB"}], {}),
        (
            [SHM | {"name": "a"}],
            {
                "tiers[0].quota_bytes": "needed beside engine.memory_budget_bytes: its files are "
                "in memory"
            },
        ),
        (
            [SHM | {"name": name, "quota_bytes": "600MiB"} for name in "ab"],
            {
                "tiers[1].quota_bytes": "600.0 MiB, 1.2 GiB with the tiers before it, is more "
                "than engine.memory_budget_bytes (1.0 GiB)"
            },
        ),
        ([{"name": "d", "kind": "disk", "root": "/x", "quota_bytes": "5GiB"}], {}),
    ],
    ids=["default", "fits", "too large", "shares", "no quota", "together", "disk"],
)
def test_quotas_beyond_the_memory_budget(
    tiers: list[dict[str, Any]], found: dict[str, str]
) -> None:
    """A tier in memory that the budget has no room for is a mistake, at its place."""
    table = {"engine": {"memory_budget_bytes": "1GiB"}, "tiers": tiers}
    config, host = load_config(table, environ={}), PluginHost()
    assert {p.path: p.message for p in memory_problems(config, host)} == found
    assert {p.path for p in check_config(config, host, stores=False)} == set(found)
    without = attrs.evolve(config, engine=EngineSettings())
    assert memory_problems(without, host) == []

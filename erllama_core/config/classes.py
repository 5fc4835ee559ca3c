"""The configuration's classes: frozen, with the tables and keys of the file as their fields.

They hold values of the right types. Whether the values make sense together is told by their
``problems`` methods, which the loaders call, so that one error lists all mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import attrs

from erllama_core.cache.cache import (
    LOADER_THREADS,
    MAX_INFLIGHT_BYTES,
    READ_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    WRITER_THREADS,
)
from erllama_core.cache.placement import MARKS_SHARE
from erllama_core.cache.policy import SavePolicy
from erllama_core.config.converter import Prepare, Unexpected
from erllama_core.config.structuring import dotted, structure_nested, structure_options
from erllama_core.errors import ConfigError, ConfigProblem, nearest
from erllama_core.interfaces.backend import ContextOptions
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.pressure.thresholds import Thresholds
from erllama_core.providers import ByteSize

Problem = tuple[str, str]
"""A field, dotted where it is nested, and what is wrong with its value."""

_INFLIGHT_BYTES: Final = ByteSize(MAX_INFLIGHT_BYTES)
_MIN_EVICT_BYTES: Final = ByteSize(1 << 20)
_MOST_TOKENS: Final = (1 << 31) - 1
_MOST_SCALE: Final = 3.4028234663852886e38  # the largest 32-bit float
_PROCESSORS: Final = ("thinking", "tool_calls", "stop_sequences")
_POLICY_FIELDS: Final = tuple(field.name for field in attrs.fields(SavePolicy))


# ------------------------------------------------------------ before structuring


def _names(value: Any) -> Any:
    """One name where a list of names belongs."""
    return [value] if isinstance(value, str) else value


def _as_names(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _hexadecimal(value: Any) -> Any:
    """A digest as bytes where its hexadecimal text belongs."""
    return value.hex() if isinstance(value, bytes) else value


def _policy_overrides(value: Any) -> Any:
    """The fields of SavePolicy that a table gives, with their types checked."""
    if not isinstance(value, Mapping):
        raise Unexpected("a table", value)
    policy = structure_nested(SavePolicy, value)
    return {name: getattr(policy, name) for name in value}


# ----------------------------------------------------------------------- classes


@attrs.frozen(kw_only=True)
class EngineSettings:
    """``[engine]``."""

    thinking_signing_key_file: Path | None = None
    """A file with the key that thinking is signed with."""
    thinking_signing_key_env: str | None = None
    """The environment variable with that key."""
    memory_budget_bytes: ByteSize | None = None
    """Memory that models, state and buffers may take together. None: no bound."""

    def problems(self) -> list[Problem]:
        """What is wrong with the values; empty when nothing is."""
        found = _too_small(self, memory_budget_bytes=1)
        if self.thinking_signing_key_file is not None and self.thinking_signing_key_env is not None:
            message = "there is a thinking_signing_key_file too; give one"
            found.append(("thinking_signing_key_env", message))
        return found


@attrs.frozen(kw_only=True)
class PluginsConfig:
    """``[plugins]``: names of entry points or distributions."""

    allow: tuple[str, ...] | None = None
    """Load these alone. None: all that are installed."""
    block: tuple[str, ...] = ()
    """Leave these out, even if they are allowed."""


@attrs.frozen(kw_only=True)
class LoggingConfig:
    """``[logging]``: for ``erllama run``, and :func:`erllama_core.logs.configure_logging`."""

    level: Literal["debug", "info", "warning", "error"] = "warning"
    """Events below it are left out."""
    format: Literal["auto", "text", "json"] = "auto"
    """``"auto"``: text on a terminal, JSON elsewhere."""


@attrs.frozen(kw_only=True)
class CacheConfig(SavePolicy):
    """``[cache]``: the save policy of every model, and the flow of bytes to the tiers."""

    max_inflight_bytes: ByteSize = _INFLIGHT_BYTES
    """State that waits to be written to one tier, at most; that tier goes without what is
    beyond it, which is counted."""
    writer_threads: int = WRITER_THREADS
    """For each tier."""
    loader_threads: int = LOADER_THREADS
    """For each tier that is read from."""
    read_timeout_ms: int = round(READ_TIMEOUT_S * 1000)
    """What takes longer to read is computed instead, and its tier left alone for a while."""
    write_timeout_ms: int = round(WRITE_TIMEOUT_S * 1000)
    """``flush`` and ``close`` wait no longer for a tier that does nothing."""
    marks_share: float = MARKS_SHARE
    """Of each tier's quota: room for marks, which make exact hits instant."""

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += _too_small(self, max_inflight_bytes=1, writer_threads=1, loader_threads=1)
        if not 0 <= self.marks_share <= 1:
            found.append(("marks_share", f"{self.marks_share:g}; it must be from 0 to 1"))
        found += _too_small(self, read_timeout_ms=1, write_timeout_ms=1)
        return found


@attrs.frozen
class TierConfig:
    """One ``[[tiers]]`` table."""

    name: str
    """What models call it."""
    kind: str
    """A registered tier kind, or ``"package.module:attribute"``."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """Every other key; structured by the kind's own class."""

    def problems(self) -> list[Problem]:
        """What is wrong with the values; empty when nothing is."""
        return [(name, "empty") for name in ("name", "kind") if not getattr(self, name).strip()]


def _with_ram(tiers: Iterable[TierConfig]) -> tuple[TierConfig, ...]:
    tiers = tuple(tiers)
    if any(tier.name == "ram" for tier in tiers):
        return tiers
    # Last, so that a tier's index here is its index in the file.
    return (*tiers, TierConfig("ram", "ram"))


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """One of a model's ``adapters``."""

    path: Path
    """The adapter's file."""
    scale: float = 1.0
    """How much of it is added to the weights."""
    name: str | None = None
    """What it is called. None: what its file is, without the suffix."""

    def problems(self) -> list[Problem]:
        """What is wrong with the values; empty when nothing is."""
        found = []
        if not abs(self.scale) <= _MOST_SCALE:
            found.append(("scale", f"{self.scale} is no finite 32-bit number"))
        if self.name is not None and not self.name.strip():
            found.append(("name", "empty"))
        return found


@attrs.frozen(kw_only=True)
class ModelConfig:
    """``[models.<id>]``, and the options of ``Engine.load_model``."""

    backend: str = "llama"
    """A registered backend, or ``"package.module:attribute"``."""
    model_path: Path | None = None
    model_opts: Mapping[str, Any] = attrs.field(factory=dict)
    """Structured by the backend's own class."""
    context_opts: ContextOptions = attrs.field(factory=ContextOptions)
    fingerprint: Annotated[str | None, Prepare(_hexadecimal)] = None
    """What ``fingerprint_mode`` computes, 64 hexadecimal digits. None: computed."""
    fingerprint_mode: Literal["safe", "gguf_chunked", "fast_unsafe"] = "safe"
    """``"safe"``: SHA-256 of the file. ``"gguf_chunked"``: of a GGUF file's metadata, first tensor
    and size. ``"fast_unsafe"``: the given fingerprint is trusted, the file is not read for it."""
    quant_type: str | None = None
    """None: as the file says."""
    quant_bits: int | None = None
    ctx_params_hash: Annotated[str, Prepare(_hexadecimal)] = ""
    """Anything; state saved under another value is not reused."""
    context_size: int | None = None
    """Tokens of one request, prompt and reply, at most. None: ``n_ctx``."""
    tier: Annotated[tuple[str, ...], Prepare(_names)] = attrs.field(
        default=("ram",), converter=_as_names
    )
    """Names of tiers, nearest first; none: nothing is stored, and nothing is found."""
    policy: Annotated[Mapping[str, Any], Prepare(_policy_overrides)] = attrs.field(factory=dict)
    """Fields of ``[cache]``'s save policy that differ for this model."""
    chat_template: str | None = None
    """A Jinja template instead of the model's own."""
    thinking_markers: ThinkingMarkers | None = None
    tool_call_markers: ToolCallMarkers | None = None
    processors: Annotated[tuple[str, ...], Prepare(_names)] = attrs.field(
        default=_PROCESSORS, converter=_as_names
    )
    """Stream processors, in the order in which a reply passes them."""
    processor_opts: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """By a processor's name, its options; structured by its own class."""
    adapters: tuple[AdapterConfig, ...] = ()
    """LoRA adapters that are loaded with the model."""

    def problems(self) -> list[Problem]:
        """What is wrong with the values; empty when nothing is."""
        found = list(_context_problems(self.context_opts))
        if not self.backend.strip():
            found.append(("backend", "empty"))
        if self.fingerprint is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.fingerprint):
            found.append(("fingerprint", "expected 64 hexadecimal digits, a SHA-256"))
        if self.fingerprint_mode == "fast_unsafe" and self.fingerprint is None:
            found.append(("fingerprint_mode", "'fast_unsafe' trusts a given fingerprint; give one"))
        found += _too_small(self, quant_bits=1, context_size=1)
        n_ctx = self.context_opts.n_ctx
        if self.context_size is not None and self.context_size > n_ctx >= 1:
            message = f"{self.context_size} is above context_opts.n_ctx ({n_ctx})"
            found.append(("context_size", message))
        found += _name_problems("tier", self.tier)
        found += self._marker_problems() + self._processor_problems()
        return found + self._adapter_problems()

    def _adapter_problems(self) -> list[Problem]:
        found: list[Problem] = []
        seen: dict[str, int] = {}
        for index, adapter in enumerate(self.adapters):
            path = dotted("adapters", [index])
            found += [(f"{path}.{name}", text) for name, text in adapter.problems()]
            name = adapter.path.stem if adapter.name is None else adapter.name
            first = seen.setdefault(name, index)
            if first != index:
                message = f"{name!r} is the name of adapters[{first}] too; give it another name"
                found.append((f"{path}.name", message))
        return found

    def _marker_problems(self) -> list[Problem]:
        found: list[Problem] = []
        thinking, calls = self.thinking_markers, self.tool_call_markers
        if thinking is not None:
            found += [(f"thinking_markers.{name}", text) for name, text in thinking.problems()]
            if "thinking" not in self.processors:
                found.append(("thinking_markers", "processors does not have 'thinking'"))
        if calls is not None:
            found += [(f"tool_call_markers.{name}", text) for name, text in calls.problems()]
            if "tool_calls" not in self.processors:
                found.append(("tool_call_markers", "processors does not have 'tool_calls'"))
        if thinking is not None and calls is not None:
            others = {text: f"thinking_markers.{name}" for name, text in thinking.texts().items()}
            for name, text in calls.texts().items():
                if text and text in others:
                    message = f"{text!r} is {others[text]} too; markers must differ"
                    found.append((f"tool_call_markers.{name}", message))
        return found

    def _processor_problems(self) -> list[Problem]:
        found = _name_problems("processors", self.processors)
        if "utf8" in self.processors:
            found.append(("processors", "'utf8' ends every pipeline; leave it out"))
        for name in self.processor_opts:
            if name not in self.processors:
                message = "options for what processors does not name"
                found.append((dotted("processor_opts", [name]), message))
        return found


@attrs.frozen(kw_only=True)
class PressureConfig:
    """``[pressure]``. Watermarks are used over total memory."""

    enabled: bool = False
    source: Annotated[tuple[str, ...], Prepare(_names)] = attrs.field(
        default=("system",), converter=_as_names
    )
    """Registered pressure sources, or ``"package.module:attribute"``."""
    interval_ms: int = 5000
    high_watermark: float = 0.85
    """Eviction starts here."""
    low_watermark: float = 0.75
    """Eviction ends here."""
    min_evict_bytes: ByteSize = _MIN_EVICT_BYTES
    evict_tiers: Annotated[tuple[str, ...], Prepare(_names)] = attrs.field(
        default=("ram", "ram_file"), converter=_as_names
    )
    """Names or kinds of tiers."""
    unload_idle_models: bool = False
    source_options: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """``[pressure.<source>]`` tables; each is structured by its source's own class."""

    @property
    def thresholds(self) -> Thresholds:
        """What the monitor goes by, and what can be changed while it runs."""
        return Thresholds(
            **{field.name: getattr(self, field.name) for field in attrs.fields(Thresholds)}
        )

    def problems(self) -> list[Problem]:
        """What is wrong with the values; empty when nothing is."""
        found = self.thresholds.problems()
        if not self.source:
            found.append(("source", "empty; at least one name"))
        return found + _name_problems("source", self.source)


@attrs.frozen(kw_only=True)
class EngineConfig:
    """A whole configuration."""

    engine: EngineSettings = attrs.field(factory=EngineSettings)
    plugins: PluginsConfig = attrs.field(factory=PluginsConfig)
    cache: CacheConfig = attrs.field(factory=CacheConfig)
    tiers: tuple[TierConfig, ...] = attrs.field(default=(), converter=_with_ram)
    """Always has a tier named ``"ram"``; one of kind ``"ram"`` when none was given."""
    models: Mapping[str, ModelConfig] = attrs.field(factory=dict)
    pressure: PressureConfig = attrs.field(factory=PressureConfig)
    logging: LoggingConfig = attrs.field(factory=LoggingConfig)

    def policy_for(self, model: ModelConfig) -> SavePolicy:
        """The model's save policy: ``[cache]`` with the model's own fields over it.

        Raises ConfigError, with paths that begin with ``policy``, when the two contradict
        each other.
        """
        policy = self._merged_policy(model)
        problems = [ConfigProblem(f"policy.{name}", text) for name, text in policy.problems()]
        if problems:
            raise ConfigError(problems)
        return policy

    def problems(self) -> list[ConfigProblem]:
        """Everything that is wrong with the values, with full paths."""
        found: list[ConfigProblem] = []

        def add(path: str, problems: Iterable[Problem]) -> None:
            found.extend(ConfigProblem(f"{path}.{name}", text) for name, text in problems)

        add("engine", self.engine.problems())
        add("cache", self.cache.problems())
        seen: dict[str, int] = {}
        for index, tier in enumerate(self.tiers):
            path = dotted("tiers", [index])
            add(path, tier.problems())
            first = seen.setdefault(tier.name, index)
            if first != index:
                message = f"{tier.name!r} is the name of tiers[{first}] too"
                found.append(ConfigProblem(f"{path}.name", message))
        for model_id, model in self.models.items():
            path = dotted("models", [model_id])
            if not model_id.strip():
                found.append(ConfigProblem(path, "a model's id is empty"))
            add(path, model.problems())
            try:
                merged = self._merged_policy(model).problems()
            except ConfigError as error:
                found += [attrs.evolve(p, path=f"{path}.{p.path}") for p in error.problems]
            else:
                shared = self.cache.problems()
                add(f"{path}.policy", (problem for problem in merged if problem not in shared))
        add("pressure", self.pressure.problems())
        for name in self.pressure.source_options:
            if name not in self.pressure.source:
                path = dotted("pressure", [name])
                message = "options for what pressure.source does not name"
                guess = nearest(name, self.pressure.source)
                found.append(ConfigProblem(path, message, guess))
        return found

    def _merged_policy(self, model: ModelConfig) -> SavePolicy:
        shared = {name: getattr(self.cache, name) for name in _POLICY_FIELDS}
        return structure_options(SavePolicy, {**shared, **model.policy}, "policy")


# ------------------------------------------------------------------ value checks


def _too_small(config: object, **least: int) -> list[Problem]:
    found = []
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            found.append((name, f"{value} is too small; at least {bound}"))
    return found


def _name_problems(field: str, names: tuple[str, ...]) -> list[Problem]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [(field, f"{name!r} is there twice") for name in repeated]


def _context_problems(options: ContextOptions) -> Iterator[Problem]:
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= _MOST_TOKENS:
            bounds = "too small; at least 1" if value < 1 else f"too large; at most {_MOST_TOKENS}"
            yield f"context_opts.{name}", f"{value} is {bounds}"
    for name in ("decode_budget_ms", "resident_cells_max"):
        value = getattr(options, name)
        if value is not None and value < 0:
            yield f"context_opts.{name}", f"{value} is too small; at least 0"
    for name in ("type_k", "type_v"):
        if not getattr(options, name):
            yield f"context_opts.{name}", "empty"

"""A configuration against this machine: its plugins, their options, its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from erllama_core.cache.budget import in_words
from erllama_core.config.classes import EngineConfig, ModelConfig, PressureConfig
from erllama_core.config.reading import LoadedConfig, read_config
from erllama_core.config.signing import read_signing_key, signing_key_warnings
from erllama_core.config.structuring import dotted, structure_options
from erllama_core.errors import (
    ConfigError,
    ConfigProblem,
    PluginError,
    PluginMissing,
    nearest,
)
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import BackendRequest
from erllama_core.providers import Provider
from erllama_core.registry import OFFICIAL, ProviderKind, normalise, one_line

_IN_MEMORY: Final = frozenset({"ram", "ram_file"})


@attrs.frozen
class Examination:
    """What ``erllama check`` finds."""

    config: EngineConfig
    """The parts that are right, with defaults for the others."""
    problems: tuple[ConfigProblem, ...]
    warnings: tuple[ConfigProblem, ...] = ()
    """What :func:`config_warnings` finds."""
    source: str | None = None
    """The file, if there is one."""


def examine_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    host: PluginHost | None = None,
    stores: bool = True,
) -> Examination:
    """Read a configuration and check it against this machine, to the end.

    ``host``: made from the configuration's ``[plugins]`` when None. ``stores``: whether the
    tiers could be opened as well. Raises ConfigError only for what cannot be read as TOML at
    all.
    """
    loaded = read_config(path_or_mapping, environ=environ)
    return examine_loaded(loaded, plugin_host(loaded.config) if host is None else host, stores)


def examine_loaded(loaded: LoadedConfig, host: PluginHost, stores: bool = True) -> Examination:
    """Check what was read against this machine, to the end; see :func:`examine_config`."""
    config = loaded.config
    reported = {problem.path for problem in loaded.problems}
    tiers_known = not any(path.startswith("tiers") for path in reported)
    problems = list(loaded.problems)
    for problem in check_config(config, host, stores=stores):
        # A tier that could not be read is not in the configuration, and so seems unknown.
        about_tiers = problem.path.endswith((".tier", ".evict_tiers"))
        if problem.path not in reported and (tiers_known or not about_tiers):
            problems.append(problem)
    warnings = tuple(config_warnings(config, host))
    return Examination(config, tuple(problems), warnings, loaded.source)


def plugin_host(config: EngineConfig) -> PluginHost:
    """The plugins that a configuration lets in."""
    return PluginHost(allow=config.plugins.allow, block=config.plugins.block)


def check_config(
    config: EngineConfig, host: PluginHost, *, stores: bool = True
) -> list[ConfigProblem]:
    """What is wrong with a configuration here: values, names, provider options, files.

    Runs the probes of the providers that it names, and their checks; those of tiers with
    ``stores`` alone. Raises nothing.
    """
    problems = config.problems()
    reported = {problem.path for problem in problems}
    for index, tier in enumerate(config.tiers):
        path = dotted("tiers", [index])
        found = _structured(host, "tier", tier.kind, f"{path}.kind", tier.options, path, problems)
        if found is not None and stores:
            provider, options = found
            problems += _own_check(provider.check, options, path)
    for model_id, model in config.models.items():
        path = dotted("models", [model_id])
        own = _check_model(config, host, model, path, problems)
        problems += [problem for problem in own if problem.path not in reported]
    _check_pressure(config, host, problems)
    problems += memory_problems(config, host)
    try:
        read_signing_key(config.engine)
    except ConfigError as error:
        problems += error.problems
    return problems


def config_warnings(config: EngineConfig, host: PluginHost) -> list[ConfigProblem]:
    """What can be used as it is, and is probably not what was meant."""
    found = signing_key_warnings(config.engine)
    installed = host.installed()
    for name in config.plugins.allow or ():
        if normalise(name) not in installed:
            guess = nearest(normalise(name), installed)
            message = f"no plugin and no distribution {name!r} is installed"
            found.append(ConfigProblem("plugins.allow", message, guess))
    pressure = config.pressure
    words = {word for tier in config.tiers for word in (tier.name, tier.kind)}
    gives = pressure.unload_idle_models or not words.isdisjoint(pressure.evict_tiers)
    if pressure.enabled and not gives:
        names = ", ".join(pressure.evict_tiers) or "none"
        message = f"no configured tier is one of these ({names}), so there is nothing to evict"
        found.append(ConfigProblem("pressure.evict_tiers", message))
    return found


def evict_tier_problems(
    names: Iterable[str], config: EngineConfig, host: PluginHost
) -> list[ConfigProblem]:
    """Of these names or kinds of tiers, the ones that no tier can have."""
    kinds = {name for kind, name in OFFICIAL if kind == "tier"} | set(host.registry.names("tier"))
    known = kinds | {tier.name for tier in config.tiers} | {tier.kind for tier in config.tiers}
    return [
        ConfigProblem(
            "pressure.evict_tiers",
            f"{name!r} is no name and no kind of a tier",
            nearest(name, known),
        )
        for name in names
        if name not in known
    ]


def memory_problems(config: EngineConfig, host: PluginHost) -> list[ConfigProblem]:
    """Quotas of tiers in memory that ``engine.memory_budget_bytes`` has no room for."""
    budget = config.engine.memory_budget_bytes
    if budget is None:
        return []
    found = []
    on_tmpfs = 0
    for index, tier in enumerate(config.tiers):
        if tier.kind not in _IN_MEMORY:
            continue
        path = dotted("tiers", [index])
        try:
            options = structure_options(host.get("tier", tier.kind).config, tier.options, path)
        except (ConfigError, PluginError):
            continue  # reported with the tier
        quota = options.quota_bytes
        if quota is None:
            if tier.kind == "ram":
                continue  # its default is a bound, and gives way to the budget
            message = "needed beside engine.memory_budget_bytes: its files are in memory"
            found.append(ConfigProblem(f"{path}.quota_bytes", message))
            continue
        on_tmpfs += quota if tier.kind == "ram_file" else 0
        if max(quota, on_tmpfs) > budget:
            what = in_words(quota)
            if quota <= budget:
                what = f"{what}, {in_words(on_tmpfs)} with the tiers before it,"
            message = f"{what} is more than engine.memory_budget_bytes ({in_words(budget)})"
            found.append(ConfigProblem(f"{path}.quota_bytes", message))
    return found


def _check_model(
    config: EngineConfig,
    host: PluginHost,
    model: ModelConfig,
    path: str,
    problems: list[ConfigProblem],
) -> list[ConfigProblem]:
    """Adds to ``problems``, and returns what the backend itself has to say."""
    backend = _structured(
        host,
        "backend",
        model.backend,
        f"{path}.backend",
        model.model_opts,
        f"{path}.model_opts",
        problems,
    )
    for name in model.processors:
        options = model.processor_opts.get(name, {})
        place = dotted(f"{path}.processor_opts", [name])
        _structured(host, "processor", name, f"{path}.processors", options, place, problems)
    reason = None if model.model_path is None else _unreadable(model.model_path)
    if reason is not None:
        problems.append(ConfigProblem(f"{path}.model_path", f"{model.model_path}: {reason}"))
    names = [tier.name for tier in config.tiers]
    for name in model.tier:
        if name not in names:
            message = f"no tier is named {name!r}; configured: {', '.join(names)}"
            problems.append(ConfigProblem(f"{path}.tier", message, nearest(name, names)))
    if backend is None or reason is not None:
        return []
    provider, options = backend
    request = BackendRequest(
        model_path=model.model_path, options=options, context=model.context_opts
    )
    return _own_check(provider.check, request, path)


def _check_pressure(config: EngineConfig, host: PluginHost, problems: list[ConfigProblem]) -> None:
    pressure, defaults = config.pressure, PressureConfig()
    # The default source need not be installed while nothing asks for it.
    if pressure.enabled or pressure.source != defaults.source:
        for name in pressure.source:
            options = pressure.source_options.get(name, {})
            place = dotted("pressure", [name])
            _structured(host, "pressure", name, "pressure.source", options, place, problems)
    problems += evict_tier_problems(pressure.evict_tiers, config, host)


def _structured(
    host: PluginHost,
    kind: ProviderKind,
    name: str,
    name_path: str,
    options: Mapping[str, Any],
    options_path: str,
    problems: list[ConfigProblem],
) -> tuple[Any, Any] | None:
    """A provider that is there and works, and its options; None, with a problem told."""
    try:
        provider: Provider = host.get(kind, name)
        return provider, structure_options(provider.config, options, options_path)
    except ConfigError as error:
        problems.extend(error.problems)
    except PluginMissing:
        message, suggestion = host.registry.why_missing(kind, name)
        problems.append(ConfigProblem(name_path, message, suggestion))
    except PluginError as error:
        problems.append(ConfigProblem(name_path, str(error)))
    return None


def _own_check(
    check: Callable[[Any], Iterable[tuple[str, str]]], argument: object, path: str
) -> list[ConfigProblem]:
    """What a provider says of its options."""
    try:
        return [ConfigProblem(f"{path}.{key}", text) for key, text in check(argument)]
    except Exception as error:  # noqa: BLE001 - a plugin's own code
        return [ConfigProblem(path, f"could not be checked: {one_line(error)}")]


def _unreadable(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "a folder, where a file is expected"
        with path.open("rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)

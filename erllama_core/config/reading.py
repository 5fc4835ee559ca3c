"""How a file, a mapping and the environment become a configuration."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import attrs

from erllama_core.config.classes import (
    CacheConfig,
    EngineConfig,
    EngineSettings,
    LoggingConfig,
    ModelConfig,
    PluginsConfig,
    PressureConfig,
    TierConfig,
)
from erllama_core.config.environment import overlay
from erllama_core.config.structuring import (
    MOST_NESTING,
    dotted,
    nested_beyond,
    structure_valid_part,
    unknown_key,
)
from erllama_core.errors import ConfigError, ConfigProblem

T = TypeVar("T")

_TIER_KEYS: Final = ("name", "kind")
_SECTIONS: Final = tuple(field.name for field in attrs.fields(EngineConfig))


@attrs.frozen
class LoadedConfig:
    """What could be read of a configuration, and what could not."""

    config: EngineConfig
    """The parts that are right, with defaults for the others."""
    problems: tuple[ConfigProblem, ...]
    source: str | None
    """The file, if there is one."""


def load_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
) -> EngineConfig:
    """A configuration from a TOML file, or from the same structure as a mapping.

    Variables of ``environ`` (the process's own when None) override it. Raises ConfigError
    with every mistake found.
    """
    loaded = read_config(path_or_mapping, environ=environ)
    if loaded.problems:
        raise ConfigError(loaded.problems, loaded.source)
    return loaded.config


def read_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Like :func:`load_config`, for those who want to go on with the parts that are right.

    Raises ConfigError only for what cannot be read as TOML at all.
    """
    if isinstance(path_or_mapping, Mapping):
        source, table = None, path_or_mapping
    else:
        source = os.fspath(path_or_mapping)
        table = _parse(Path(source))
    if nested_beyond(table, MOST_NESTING):
        raise ConfigError([_too_deep("(top)")], source)
    overlaid = overlay(table, os.environ if environ is None else environ, _SECTIONS)
    problems = list(overlaid.problems)
    config = _read_sections(overlaid.table, problems)
    reported = {problem.path for problem in problems}
    problems += [problem for problem in config.problems() if problem.path not in reported]
    named = (_with_variable(problem, overlaid.variables) for problem in problems)
    return LoadedConfig(config, tuple(named), source)


def model_config(options: Mapping[str, Any] | ModelConfig, path: str = "") -> ModelConfig:
    """A model's configuration from the options of ``load_model`` or a ``[models.<id>]`` table.

    One that was made in Python is checked and given back.

    Raises ConfigError with every mistake; ``path`` goes before the paths of its problems.
    """
    config, problems = structure_valid_part(ModelConfig, options, path)
    if config is not None:
        reported = {problem.path for problem in problems}
        for field, message in config.problems():
            problem = ConfigProblem(f"{path}.{field}" if path else field, message)
            if problem.path not in reported:
                problems.append(problem)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _parse(path: Path) -> dict[str, Any]:
    def refuse(place: str, message: str) -> NoReturn:
        raise ConfigError([ConfigProblem(place, message)], str(path))

    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        refuse("the file", f"cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start}", "a TOML file is UTF-8, and this is not")
    except tomllib.TOMLDecodeError as error:
        text = str(error)
        place = re.search(r" \(at (.+)\)$", text)
        if place is None:
            refuse("TOML", text)
        refuse(place[1], f"not TOML: {text[: place.start()]}")
    except ValueError as error:
        # Of Python's own: an integer of more digits than it reads.
        refuse("TOML", f"a value that cannot be read: {error}")
    except RecursionError:
        # The reader calls itself for each bracket within another.
        raise ConfigError([_too_deep("TOML")], str(path)) from None


def _too_deep(place: str) -> ConfigProblem:
    return ConfigProblem(place, f"tables and lists are nested more than {MOST_NESTING} deep")


def _read_sections(table: Mapping[str, Any], problems: list[ConfigProblem]) -> EngineConfig:
    """Every section by itself, so that a mistake in one hides none in another."""
    problems += [unknown_key("", str(key), _SECTIONS) for key in table if key not in _SECTIONS]
    return EngineConfig(
        engine=_section(EngineSettings, table.get("engine", {}), "engine", problems),
        plugins=_section(PluginsConfig, table.get("plugins", {}), "plugins", problems),
        cache=_section(CacheConfig, table.get("cache", {}), "cache", problems),
        tiers=_tiers(table.get("tiers", []), problems),
        models=_models(table.get("models", {}), problems),
        pressure=_section(
            PressureConfig, _source_tables_apart(table.get("pressure", {})), "pressure", problems
        ),
        logging=_section(LoggingConfig, table.get("logging", {}), "logging", problems),
    )


def _section(section_class: type[T], value: object, path: str, problems: list[ConfigProblem]) -> T:
    section, mistakes = structure_valid_part(section_class, value, path)
    problems += mistakes
    return section_class() if section is None else section


def _tiers(value: object, problems: list[ConfigProblem]) -> list[TierConfig]:
    if not isinstance(value, list):
        problems.append(ConfigProblem("tiers", "expected a list of tables, one [[tiers]] for each"))
        return []
    tiers = []
    for index, entry in enumerate(value):
        own: object = entry
        if isinstance(entry, Mapping):
            # Whatever is not the tier's own belongs to its kind.
            options = {key: inner for key, inner in entry.items() if key not in _TIER_KEYS}
            own = {key: entry[key] for key in _TIER_KEYS if key in entry} | {"options": options}
        tier, mistakes = structure_valid_part(TierConfig, own, dotted("tiers", [index]))
        problems += mistakes
        if tier is not None:
            tiers.append(tier)
    return tiers


def _models(value: object, problems: list[ConfigProblem]) -> dict[str, ModelConfig]:
    if not isinstance(value, Mapping):
        problems.append(ConfigProblem("models", "expected tables, one [models.<id>] for each"))
        return {}
    models = {}
    for model_id, options in value.items():
        path = dotted("models", [str(model_id)])
        model, mistakes = structure_valid_part(ModelConfig, options, path)
        problems += mistakes
        if model is not None:
            models[str(model_id)] = model
    return models


def _source_tables_apart(value: object) -> object:
    """``[pressure]`` with its ``[pressure.<source>]`` tables in one field."""
    if not isinstance(value, Mapping):
        return value
    own = {field.name for field in attrs.fields(PressureConfig)} - {"source_options"}
    sources = {
        key: inner for key, inner in value.items() if key not in own and isinstance(inner, Mapping)
    }
    rest = {key: inner for key, inner in value.items() if key not in sources}
    return rest | {"source_options": sources} if sources else rest


def _with_variable(problem: ConfigProblem, variables: Mapping[str, str]) -> ConfigProblem:
    """The problem, naming the environment variable if that is where the value is from."""
    for path, variable in variables.items():
        if problem.path == path or problem.path.startswith((f"{path}.", f"{path}[")):
            return attrs.evolve(problem, message=f"{problem.message} (set by {variable})")
    return problem

"""Environment variables that override a configuration.

``ERLLAMA_<SECTION>__<KEY>``, two underscores between levels: ``ERLLAMA_CACHE__MIN_TOKENS=128``,
``ERLLAMA_MODELS__TINY__CONTEXT_OPTS__N_CTX=4096``, ``ERLLAMA_TIERS__MY_DISK__ROOT=/srv/kv``. A
tier is named by its ``name``. Letters are compared without case, and what cannot be in the name
of a variable (a dash, a dot) is written as an underscore. A value is read as TOML where it is
TOML, as text otherwise.
"""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from erllama_core.config.structuring import MOST_NESTING, dotted, nested_beyond, plain
from erllama_core.errors import ConfigProblem, nearest

PREFIX: Final = "ERLLAMA_"
_IGNORED: Final = "ERLLAMA_TEST_"
_SEPARATOR: Final = "__"


@attrs.frozen
class Overlaid:
    """A configuration after the environment had its say."""

    table: dict[str, Any]
    problems: list[ConfigProblem]
    variables: Mapping[str, str]
    """Which variable set the key at a path."""


def overlay(
    table: Mapping[str, Any], environ: Mapping[str, str], sections: Iterable[str]
) -> Overlaid:
    """``table`` with the overrides of ``environ``; ``table`` itself is not changed.

    Variables without a double underscore are not overrides (``ERLLAMA_TEST_MODEL`` and the
    like); one that names no section is a problem.
    """
    sections = sorted(sections)
    result = plain(table)
    problems: list[ConfigProblem] = []
    variables: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable.startswith(_IGNORED):
            continue
        section, *levels = variable.removeprefix(PREFIX).lower().split(_SEPARATOR)
        if not levels:
            continue
        if section not in sections:
            guess = nearest(section, sections)
            message = f"unknown section {section!r}; known: {', '.join(sections)}"
            problems.append(ConfigProblem(variable, message, guess))
            continue
        try:
            keys = _assign(result, [section, *levels], parse_value(environ[variable]))
        except _NoSuchPlace as error:
            problems.append(ConfigProblem(variable, str(error)))
        else:
            variables[dotted("", keys)] = variable
    return Overlaid(result, problems, variables)


def parse_value(text: str) -> Any:
    """A variable's value: what TOML makes of it, the text itself when that is nothing."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also an integer of too many digits
        return text
    # A value with a line break can hold further keys; a date is no value of any option.
    if set(parsed) != {"value"} or isinstance(parsed["value"], dt.date | dt.time):
        return text
    if nested_beyond(parsed, MOST_NESTING):
        return text
    return parsed["value"]


class _NoSuchPlace(ValueError):
    """A variable names a place that the configuration does not have, in words for a person."""


def _assign(table: dict[str, Any], levels: list[str], value: Any) -> tuple[str | int, ...]:
    """Set the value; where it went. Raises _NoSuchPlace."""
    if not all(levels):
        raise _NoSuchPlace(f"there is nothing between two {_SEPARATOR!r}, or after the last")
    if len(levels) > MOST_NESTING:
        raise _NoSuchPlace(f"{len(levels)} levels; {MOST_NESTING} at most")
    inner: Any = table
    keys: list[str | int] = []
    for position, level in enumerate(levels):
        last = position == len(levels) - 1
        if isinstance(inner, list):
            if level == "ram" and not any(_is_named(tier, level) for tier in inner):
                inner.append({"name": "ram", "kind": "ram"})  # it exists, if only unwritten
            index = _find_tier(inner, level)
            if last:
                raise _NoSuchPlace(f"names the tier {level!r}, but none of its keys")
            keys.append(index)
            inner = inner[index]
            continue
        if not isinstance(inner, dict):
            raise _NoSuchPlace(f"{dotted('', keys)} is no table, so it has no key {level!r}")
        key = _find_key(inner, level)
        keys.append(key)
        if last:
            inner[key] = value
        else:
            inner = inner.setdefault(key, [] if keys == ["tiers"] else {})
    return tuple(keys)


def _find_key(table: Mapping[Any, Any], level: str) -> str:
    matching = [key for key in table if isinstance(key, str) and _spelling(key) == level]
    if len(matching) > 1:
        raise _NoSuchPlace(f"can mean {' or '.join(map(repr, sorted(matching)))}")
    return matching[0] if matching else level


def _is_named(tier: Any, level: str) -> bool:
    return isinstance(tier, dict) and _spelling(str(tier.get("name"))) == level


def _find_tier(tiers: list[Any], level: str) -> int:
    names = [str(tier.get("name")) if isinstance(tier, dict) else "" for tier in tiers]
    matching = [index for index, tier in enumerate(tiers) if _is_named(tier, level)]
    if len(matching) != 1:
        known = ", ".join(map(repr, filter(None, names))) or "none"
        which = "several tiers have" if matching else "no tier has"
        raise _NoSuchPlace(f"{which} the name {level!r}; configured: {known}")
    return matching[0]


def _spelling(key: str) -> str:
    """A key as the name of a variable spells it, in lower case."""
    return re.sub(r"[^a-z0-9_]", "_", key.lower())

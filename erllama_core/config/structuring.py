"""From plain tables to attrs classes, with every mistake told at once.

What cattrs raises becomes ConfigProblems with the full path of each key.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import attrs
from cattrs import (
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
)

from erllama_core.config.converter import Unexpected, converter, describe
from erllama_core.errors import ConfigError, ConfigProblem, PluginFailed, nearest

T = TypeVar("T")
Keys = tuple[str | int, ...]
"""Where something is in a table: keys of tables, indices of lists."""

MOST_NESTING: Final = 64
"""Tables and lists in one another; no option has more than a few."""

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


# ------------------------------------------------------------------------ paths


def dotted(path: str, keys: Iterable[str | int] = ()) -> str:
    """``path`` extended by ``keys``, as TOML writes it: ``models."a.b".tier[0]``."""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
            continue
        name = key if _BARE_KEY.fullmatch(key) else f'"{key}"'
        path = f"{path}.{name}" if path else name
    return path


# ---------------------------------------------------------------------- reading


def structure_options(options_class: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """An instance of an attrs class from a table whose place is ``path``.

    For ``model_opts``, the keys of a tier and the like, whose class is a provider's. Raises
    ConfigError with every mistake, PluginFailed if the class cannot be filled from a table.
    """
    try:
        return structure_nested(options_class, table)
    except (BaseValidationError, ValueError) as error:
        raise ConfigError(problems_of(error, options_class, path)) from None


def structure_valid_part(
    options_class: type[T], table: object, path: str = ""
) -> tuple[T | None, list[ConfigProblem]]:
    """Like :func:`structure_options`, but goes on without the keys that are wrong.

    None when even that cannot be structured, since a required key is missing. So a value in
    one place can be judged although there is a mistake in another.
    """
    try:
        return structure_nested(options_class, table), []
    except (BaseValidationError, ValueError) as error:
        mistakes = list(_locate(error, options_class, ()))
    problems = [_problem(path, found) for found in mistakes]
    if not isinstance(table, Mapping):
        return None, problems
    rest = plain(table)
    while _prune(rest, [found.keys for found in mistakes]):
        try:
            return structure_nested(options_class, rest), problems
        except (BaseValidationError, ValueError) as error:
            mistakes = list(_locate(error, options_class, ()))
    return None, problems


def nested_beyond(value: object, depth: int) -> bool:
    """Whether mappings and lists are in one another more than ``depth`` deep."""
    level: Iterable[object] = (value,)
    for _ in range(depth + 1):
        containers: dict[int, Iterable[object]] = {}  # once each, also where one holds itself
        for item in level:
            if isinstance(item, Mapping):
                containers[id(item)] = item.values()
            elif isinstance(item, list | tuple):
                containers[id(item)] = item
        if not containers:
            return False
        level = itertools.chain.from_iterable(containers.values())
    return True


def plain(value: Any) -> Any:
    """A copy in dicts and lists of what was given in mappings and tuples or lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def problems_of(
    error: BaseException, structured: object = None, path: str = ""
) -> list[ConfigProblem]:
    """What an error of the converter says, one problem for each mistake."""
    return [_problem(path, found) for found in _locate(error, structured, ())]


def unknown_key(path: str, key: str, known: Iterable[str]) -> ConfigProblem:
    """The problem of a key that nothing reads."""
    return _problem(path, _unknown_key((key,), known))


def structure_nested(options_class: type[T], table: object) -> T:
    """For steps of :class:`Prepare`, whose errors are told with those around them.

    Raises what cattrs raises, ValueError, PluginFailed.
    """
    try:
        return converter().structure(table, options_class)
    except (BaseValidationError, ValueError):
        raise
    except Exception as error:
        # cattrs found no way to make one of the class's types, or could not resolve its name.
        raise PluginFailed(
            f"the options class {options_class.__module__}.{options_class.__qualname__} cannot "
            f"be filled from a table: {error}"
        ) from error


def _prune(table: dict[str, Any], places: Iterable[Keys]) -> bool:
    """Remove what ``places`` name; what is not there, with the innermost table around it.

    Of a list, the whole list. False, and nothing removed, when that would be ``table`` itself.
    """
    doomed: list[tuple[dict[str, Any], str]] = []
    for keys in places:
        holder, last = None, ""
        inner: Any = table
        for key in keys:
            if not isinstance(inner, dict) or key not in inner:
                break
            holder, inner, last = inner, inner[key], str(key)
        if holder is None:
            return False
        doomed.append((holder, last))
    for holder, last in doomed:
        holder.pop(last, None)
    return True


# ----------------------------------------------------------------------- errors


@attrs.frozen
class _Located:
    keys: Keys
    message: str
    suggestion: str | None = None


def _problem(path: str, found: _Located) -> ConfigProblem:
    return ConfigProblem(dotted(path, found.keys) or "(top)", found.message, found.suggestion)


def _unknown_key(keys: Keys, known: Iterable[str]) -> _Located:
    known = sorted(known)
    guess = nearest(str(keys[-1]), known)
    listed = "" if guess else f"; known: {', '.join(known) or 'none'}"
    return _Located(keys, f"unknown key{listed}", guess)


def _locate(error: BaseException, structured: object, keys: Keys) -> Iterator[_Located]:
    """Walk the tree of exceptions that cattrs builds."""
    if isinstance(error, ClassValidationError):
        names = [field.name for field in attrs.fields(error.cl)] if attrs.has(error.cl) else []
        inside, others = error.group_exceptions()
        for inner, field in inside:
            if isinstance(inner, KeyError) and inner.args == (field.name,):
                yield _Located((*keys, field.name), f"required: {describe(field.type)}")
            else:
                yield from _locate(inner, field.type, (*keys, field.name))
        for inner in others:
            if isinstance(inner, ForbiddenExtraKeysError):
                for extra in sorted(map(str, inner.extra_fields)):
                    yield _unknown_key((*keys, extra), names)
            else:
                yield _rejected(inner, names, keys)
    elif isinstance(error, IterableValidationError):
        items, others = error.group_exceptions()
        for inner, item in items:
            yield from _locate(inner, item.type, (*keys, item.index))
        for inner in others:
            yield from _locate(inner, structured, keys)
    elif isinstance(error, Unexpected):
        yield _Located(keys, str(error), error.suggestion)
    else:
        text = " ".join(str(error).split())
        yield _Located(keys, text or f"expected {describe(structured)}")


def _rejected(error: BaseException, names: list[str], keys: Keys) -> _Located:
    """The place and words of what a class's own constructor raised.

    The validators of attrs do not say which field they belong to, but begin with its name.
    """
    text = str(error.args[0]) if error.args else type(error).__name__
    match = re.match(r"'(\w+)' ", text)
    field = (match[1],) if match is not None and match[1] in names else ()
    return _Located((*keys, *field), " ".join(text.split()))

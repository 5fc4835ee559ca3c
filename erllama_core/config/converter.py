"""The converter behind every table: what each type accepts, and the words for what it refuses.

One cattrs converter. It converts nothing silently (no number from text, no integer from a
truth value) and refuses unknown keys; where a value does not fit it raises :class:`Unexpected`.
"""

from __future__ import annotations

import enum
import functools
import re
import types
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NewType, Union, cast, get_args, get_origin

import attrs
from cattrs import (
    BaseConverter,
    BaseValidationError,
    Converter,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn

from erllama_core.errors import nearest
from erllama_core.providers import ByteSize

_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_MOST_BYTES: Final = (1 << 63) - 1
_SIZE_WORDS: Final = 'a number of bytes, or text such as "50GiB" or "512MB"'
_LISTS: Final = frozenset({list, tuple, set, frozenset, abc.Sequence, abc.Set, abc.Collection})
_TABLES: Final = frozenset({dict, abc.Mapping, abc.MutableMapping})


@attrs.frozen
class Prepare:
    """Metadata of an Annotated field: a step before its value is structured.

    ``step`` takes the raw value and returns a raw value; it raises ValueError with words that
    say what was expected.
    """

    step: Callable[[Any], Any]


class Unexpected(ValueError):
    """A value is not what belongs there."""

    def __init__(self, expected: str, value: object, suggestion: str | None = None) -> None:
        self.suggestion = suggestion
        super().__init__(f"expected {expected}, got {show(value)}")


# ------------------------------------------------------------------------ words


def show(value: object) -> str:
    """A value as a person would name it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(type_: object) -> str:
    """A type in the words of somebody who writes a configuration."""
    simple: dict[object, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        Path: "a path",
        ByteSize: _SIZE_WORDS,
        types.NoneType: "nothing",
    }
    if type_ in simple:
        return simple[type_]
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in {Union, types.UnionType}:
        members = [describe(member) for member in arguments if member is not types.NoneType]
        return " or ".join(members)
    if origin in _LISTS:
        return "a list"
    if isinstance(type_, NewType):
        return describe(type_.__supertype__)
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in type_)}"
    if origin in _TABLES or (isinstance(type_, type) and attrs.has(type_)):
        return "a table"
    return getattr(type_, "__name__", None) or str(type_)


# -------------------------------------------------------------------- converter


@functools.cache
def converter() -> Converter:
    """The one converter; thread-safe once it is made."""
    made = Converter(detailed_validation=True, forbid_extra_keys=True)
    made.register_structure_hook(bool, _bool)
    made.register_structure_hook(int, _int)
    made.register_structure_hook(float, _float)
    made.register_structure_hook(str, _str)
    made.register_structure_hook(Path, _path)
    made.register_structure_hook_func(lambda type_: type_ is ByteSize, _byte_size)
    made.register_structure_hook_func(lambda type_: _origin(type_) is Literal, _literal)
    made.register_structure_hook_func(
        lambda type_: isinstance(type_, type) and issubclass(type_, enum.Enum), _enum
    )
    made.register_structure_hook_factory(attrs.has, _table_factory)
    made.register_structure_hook_factory(
        lambda type_: _origin(type_) in {Union, types.UnionType}, _union_factory
    )
    made.register_structure_hook_factory(lambda type_: _origin(type_) in _LISTS, _list_factory)
    made.register_structure_hook_factory(lambda type_: _origin(type_) in _TABLES, _mapping_factory)
    made.register_structure_hook_factory(
        lambda type_: any(isinstance(extra, Prepare) for extra in _metadata(type_)),
        _prepared_factory,
    )
    return made


def _origin(type_: Any) -> Any:
    return get_origin(type_)


def _bool(value: object, _type: object) -> bool:
    if not isinstance(value, bool):
        raise Unexpected(describe(bool), value)
    return value


def _int(value: object, type_: Any) -> int:
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return cast("int", _enum(value, type_))
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unexpected(describe(int), value)
    return value


def _float(value: object, _type: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Unexpected(describe(float), value)
    return float(value)


def _str(value: object, type_: Any) -> str:
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return cast("str", _enum(value, type_))
    if not isinstance(value, str):
        raise Unexpected(describe(str), value)
    return value


def _path(value: object, _type: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise Unexpected(describe(Path), value)
    if "\0" in str(value):
        raise Unexpected("a path without NUL characters", value)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{show(value)}: {error}") from error


def _byte_size(value: object, _type: object) -> int:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        factor = _UNITS.get(match[2].lower()) if match is not None else None
        if match is None or factor is None:
            raise Unexpected(_SIZE_WORDS, value)
        size = int(Decimal(match[1]) * factor)
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise Unexpected(_SIZE_WORDS, value)
    if not 0 <= size <= _MOST_BYTES:
        raise Unexpected("a number of bytes from 0 to 2^63 - 1", value)
    return size


def _literal(value: object, type_: object) -> object:
    allowed = get_args(type_)
    for candidate in allowed:
        if type(candidate) is type(value) and candidate == value:
            return value
    words = [candidate for candidate in allowed if isinstance(candidate, str)]
    guess = nearest(value, words) if isinstance(value, str) else None
    raise Unexpected(describe(type_), value, guess)


def _enum(value: object, type_: type[enum.Enum]) -> enum.Enum:
    for member in type_:
        if member is value or (type(member.value) is type(value) and member.value == value):
            return member
    raise Unexpected(describe(type_), value)


def _table_factory(type_: type[Any], converter: BaseConverter) -> Callable[[Any, Any], Any]:
    fill = make_dict_structure_fn(
        type_,
        converter,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
    )

    def structure(value: object, _type: object) -> Any:
        if isinstance(value, type_):
            return value
        if not isinstance(value, Mapping):
            raise Unexpected("a table", value)
        return fill(value, type_)

    return structure


def _union_factory(type_: Any, converter: BaseConverter) -> Callable[[Any, Any], Any]:
    members = [member for member in get_args(type_) if member is not types.NoneType]
    optional = len(members) < len(get_args(type_))

    def structure(value: object, _type: object) -> Any:
        if value is None and optional:
            return None
        if len(members) == 1:
            return converter.structure(value, members[0])
        suggestion = None
        for member in members:
            try:
                return converter.structure(value, member)
            except Unexpected as error:
                suggestion = suggestion or error.suggestion
            except (BaseValidationError, ValueError):
                if isinstance(value, Mapping) and attrs.has(member):
                    raise
        raise Unexpected(describe(type_), value, suggestion)

    return structure


def _list_factory(type_: Any, converter: BaseConverter) -> Callable[[Any, Any], Any]:
    origin, arguments = get_origin(type_), get_args(type_)
    fixed = origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis)
    make: Callable[[list[Any]], Any] = tuple
    if origin in {list, set, frozenset}:
        make = origin
    elif origin is abc.Set:
        make = frozenset

    def structure(value: object, _type: object) -> Any:
        if not isinstance(value, list | tuple | set | frozenset):
            raise Unexpected("a list", value)
        if fixed and len(value) != len(arguments):
            raise Unexpected(f"a list of {len(arguments)}", list(value))
        item_types = arguments if fixed else [arguments[0]] * len(value)
        return make(_items(converter, type_, enumerate(value), item_types))

    return structure


def _mapping_factory(type_: Any, converter: BaseConverter) -> Callable[[Any, Any], Any]:
    item_type = get_args(type_)[1]

    def structure(value: object, _type: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Unexpected("a table", value)
        for key in value:
            if not isinstance(key, str):
                raise Unexpected("a table whose keys are text", key)
        item_types = [item_type] * len(value)
        made = _items(converter, type_, value.items(), item_types)
        return dict(zip(value, made, strict=True))

    return structure


def _items(
    converter: BaseConverter,
    type_: Any,
    items: Iterable[tuple[str | int, Any]],
    item_types: Iterable[Any],
) -> list[Any]:
    made = []
    errors: list[Exception] = []
    for (index, item), item_type in zip(items, item_types, strict=True):
        try:
            made.append(converter.structure(item, item_type))
        except Exception as error:  # noqa: BLE001 - raised below, all together
            error.add_note(IterableValidationNote(f"at {index!r}", index, item_type))
            errors.append(error)
    if errors:
        raise IterableValidationError(f"in {type_}", errors, type_)
    return made


def _metadata(type_: Any) -> tuple[Any, ...]:
    return get_args(type_)[1:] if get_origin(type_) is Annotated else ()


def _prepared_factory(type_: Any, converter: BaseConverter) -> Callable[[Any, Any], Any]:
    steps = [extra.step for extra in _metadata(type_) if isinstance(extra, Prepare)]
    inner = get_args(type_)[0]

    def structure(value: object, _type: object) -> Any:
        for step in steps:
            value = step(value)
        return converter.structure(value, inner)

    return structure

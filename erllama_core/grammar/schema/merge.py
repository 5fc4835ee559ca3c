"""Schemas that hold together: references, ``allOf``, and what stands beside alternatives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

from erllama_core.errors import InvalidGrammar

Schema = Mapping[str, Any]

ANNOTATIONS: Final = frozenset({
    "$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding",
    "contentMediaType", "contentSchema", "default", "definitions", "deprecated", "description",
    "discriminator", "example", "examples", "id", "readOnly", "title", "writeOnly",
})  # fmt: skip
"""Keywords that restrict nothing."""
_GREATEST: Final = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems"})
_LEAST: Final = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems"})
_OBJECT_ENDS: Final = ("additionalProperties",)


def is_annotation(keyword: str) -> bool:
    """Whether a keyword restricts nothing; ``x-`` begins those of other specifications."""
    return keyword in ANNOTATIONS or keyword.startswith("x-")


def assertions(schema: Schema) -> dict[str, Any]:
    """The keywords that restrict something."""
    return {key: value for key, value in schema.items() if not is_annotation(key)}


def json_key(value: Any) -> str:
    """Equal for equal JSON values."""
    return json.dumps(value, sort_keys=True)


class References:
    """What ``$ref`` means, within one schema."""

    def __init__(self, root: Any) -> None:
        self._root: Final = root

    def find(self, reference: Any, path: str) -> tuple[Any, str]:
        """The schema that is referred to, and its path. Raises InvalidGrammar."""
        if not isinstance(reference, str):
            raise InvalidGrammar(f"a reference is a string, not {reference!r}", path=path)
        if reference != "#" and not reference.startswith("#/"):
            raise InvalidGrammar(
                f"the reference {reference!r} leads outside; give it as '#/$defs/...' and put "
                "what it names there",
                path=path,
            )
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise InvalidGrammar(
                    f"the reference {reference!r} leads nowhere: there is no {name!r}", path=path
                )
        return found, reference

    def flatten(self, schema: Any, path: str, seen: frozenset[str] = frozenset()) -> Any:
        """A schema without ``$ref`` and ``allOf`` at its top: true, false, or keywords."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise InvalidGrammar(f"a schema is an object, or true, not {schema!r}", path=path)
        kept = {key: value for key, value in schema.items() if key not in {"$ref", "allOf"}}
        result: Any = kept
        if "$ref" in schema:
            target, where = self.find(schema["$ref"], f"{path}/$ref")
            if where in seen:
                raise InvalidGrammar(
                    f"the reference {where!r} leads back to itself", path=f"{path}/$ref"
                )
            other = self.flatten(target, where, seen | {where})
            result = merged(other, result, path) if assertions(result) else other
        if "allOf" in schema:
            parts = schema["allOf"]
            if not isinstance(parts, list) or not parts:
                raise InvalidGrammar("a list of schemas is needed", path=f"{path}/allOf")
            for number, part in enumerate(parts):
                other = self.flatten(part, f"{path}/allOf/{number}", seen)
                result = merged(result, other, path) if assertions_of(result) else other
        return result


def assertions_of(schema: Any) -> bool:
    """Whether it restricts anything."""
    return bool(assertions(schema)) if isinstance(schema, Mapping) else schema is not True


def merged(one: Any, other: Any, path: str) -> Any:
    """The schema of what is valid by both. Raises InvalidGrammar where that cannot be said."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    result = dict(one)
    for key in _OBJECT_ENDS:
        _check_ends(one, other, key, path)
    for key, value in other.items():
        if key not in result or is_annotation(key):
            result.setdefault(key, value)
        elif result[key] != value or type(result[key]) is not type(value):
            result[key] = _both(key, result[key], value, path)
    return result


def _check_ends(one: Schema, other: Schema, key: str, path: str) -> None:
    """What ends one schema's properties says nothing of those that the other one names."""
    for this, that in ((one, other), (other, one)):
        if this.get(key, True) is not True and that.get("properties"):
            unknown = set(that["properties"]) - set(this.get("properties", ()))
            if unknown:
                raise InvalidGrammar(
                    f"one of the schemas that are to hold together has {key!r}, another one the "
                    f"property {min(unknown)!r} that it does not know",
                    path=path,
                )


def _both(key: str, one: Any, other: Any, path: str) -> Any:
    if key in _GREATEST and _are_numbers(one, other):
        return max(one, other)
    if key in _LEAST and _are_numbers(one, other):
        return min(one, other)
    if key == "required" and isinstance(one, list) and isinstance(other, list):
        return [*one, *(name for name in other if name not in one)]
    if key == "properties" and isinstance(one, Mapping) and isinstance(other, Mapping):
        return {
            name: {"allOf": [s for s in (one.get(name), other.get(name)) if s is not None]}
            for name in dict.fromkeys([*one, *other])
        }
    if key == "enum" and isinstance(one, list) and isinstance(other, list):
        keys = {json_key(value) for value in other}
        return [value for value in one if json_key(value) in keys]
    if key == "type":
        return _common_types(one, other, path)
    raise InvalidGrammar(
        f"two schemas are to hold together, and their {key!r} differ in a way that a grammar "
        "cannot say; write one schema",
        path=path,
    )


def _common_types(one: Any, other: Any, path: str) -> list[str]:
    ones, others = type_names(one, path), type_names(other, path)
    common = [name for name in ones if name in others]
    common += ["integer"] * ("integer" in ones and "number" in others and "integer" not in common)
    common += ["integer"] * ("integer" in others and "number" in ones and "integer" not in common)
    if not common:
        raise InvalidGrammar(f"nothing is of type {one!r} and {other!r}", path=path)
    return common


def type_names(value: Any, path: str) -> list[str]:
    """What ``type`` says, as a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InvalidGrammar(f"a type is a name or a list of names, not {value!r}", path=path)
    return list(names)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)

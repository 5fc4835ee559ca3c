"""Whether no value is valid by two schemas: what ``oneOf`` takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from erllama_core.grammar.schema.merge import Schema, json_key

_TYPES: Final = frozenset({"null", "boolean", "number", "string", "array", "object"})

Flatten = Callable[[Any, str], Any]


def are_apart(one: Any, other: Any, flatten: Flatten) -> bool:
    """Whether it is certain that nothing is valid by both, which are flat.

    They have no type in common, or other values; or every object of one has a member that the
    other one does not allow, or not with such a value.
    """
    if one is False or other is False:
        return True
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    if not _types(one) & _types(other):
        return True
    ones, others = _values(one), _values(other)
    if ones is not None and others is not None:
        return not ones & others
    if _types(one) & _types(other) != {"object"}:
        return False
    return _differ_in_member(one, other, flatten) or _differ_in_member(other, one, flatten)


def _types(schema: Schema) -> set[str]:
    names = schema.get("type", _TYPES)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | frozenset):
        return set(_TYPES)  # a mistake, which is told where it stands
    found = {"number" if name == "integer" else name for name in names if isinstance(name, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        found &= {_type_of(value) for value in values}
    return found


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string")):
        if isinstance(value, kind):
            return name
    return "array" if isinstance(value, list) else "object"


def _values(schema: Any) -> set[str] | None:
    """Its only values, as keys; None when it has others."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return {json_key(schema["const"])}
    values = schema.get("enum")
    return {json_key(value) for value in values} if isinstance(values, list) else None


def _differ_in_member(one: Schema, other: Schema, flatten: Flatten) -> bool:
    """Whether each object of ``one`` has a member that none of ``other`` has."""
    required, named = one.get("required", ()), one.get("properties", {})
    elsewhere = other.get("properties", {})
    if not isinstance(required, list) or not isinstance(elsewhere, Mapping):
        return False
    for name in required:
        if name not in elsewhere:
            if other.get("additionalProperties", True) is False:
                return True
            continue
        if not isinstance(named, Mapping) or name not in named:
            continue
        ones, others = (_values(flatten(s[name], "#")) for s in (named, elsewhere))
        if ones is not None and others is not None and not ones & others:
            return True
    return False

"""From a JSON schema to GBNF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, NoReturn

from erllama_core.errors import InvalidGrammar, nearest
from erllama_core.grammar.schema.apart import are_apart
from erllama_core.grammar.schema.merge import (
    ANNOTATIONS,
    References,
    Schema,
    assertions,
    is_annotation,
    json_key,
    merged,
    type_names,
)
from erllama_core.grammar.schema.numbers import Bound, numbers, whole_numbers
from erllama_core.grammar.schema.pattern import pattern_of
from erllama_core.grammar.schema.rules import Rules, literal
from erllama_core.grammar.schema.strings import FORMATS, other_names

_OF_TYPE: Final = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": (
        "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems",
    ),
    "object": (
        "properties", "required", "additionalProperties", "minProperties", "maxProperties",
        "patternProperties", "propertyNames",
    ),
}  # fmt: skip
"""Keywords by the type that they speak of; they say nothing of others."""
_TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")
_OF_ANY_TYPE: Final = ("type", "enum", "const", "anyOf", "oneOf", "nullable")
_REFUSED: Final = frozenset({
    "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "contains",
    "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains",
    "minContains", "not", "then", "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip
_KNOWN: Final = frozenset(_OF_ANY_TYPE).union(*_OF_TYPE.values()) | _REFUSED | {"$ref", "allOf"}
_MOST_DEPTH: Final = 48
"""Schemas within one another."""
_MOST_SCHEMAS: Final = 10_000
"""Schemas that are looked at, those that several places refer to counted each time."""
_MOST_BOUND_DIGITS: Final = 30
_MOST_NAME: Final = 128
"""Characters of a member's name that additional ones must differ from."""


def gbnf_of_schema(schema: Any) -> str:
    """The GBNF of the JSON texts that a schema describes.

    ``schema``: a mapping or a bool, or their JSON text. Raises InvalidGrammar, with the path.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidGrammar(f"this is no JSON: {error}", path="#") from error
    return _Converter(schema).run()


class _Converter:
    def __init__(self, schema: Any) -> None:
        self._references: Final = References(schema)
        self._rules: Final = Rules()
        self._names: Final[dict[str, str]] = {}
        """The rules of schemas that are referred to, by path."""
        self._pending: Final[list[str]] = []
        self._begins: Final[dict[str, set[str]]] = {}
        """Of schemas that are referred to: which others they are, with nothing around them."""
        self._n_schemas = 0
        self._path = "#"

    def run(self) -> str:
        root = self._refer("#", "#")
        while self._pending:
            where = self._pending.pop()
            target, _ = self._references.find(where, where)
            try:
                self._rules.define(
                    self._names[where], self._convert(target, where, 0, within=where)
                )
            except OverflowError as error:
                raise InvalidGrammar(f"the schema is too large: {error}", path=self._path) from None
        self._check_loops()
        return self._rules.gbnf(root)

    def _refer(self, where: str, path: str) -> str:
        """The rule of a schema that is referred to."""
        if where not in self._names:
            self._references.find(where, path)
            self._names[where] = self._rules.reserve()
            self._pending.append(where)
        return self._names[where]

    def _check_loops(self) -> None:
        """No schema is itself, by way of references alone."""
        done: set[str] = set()
        for start in self._begins:
            under_way: list[tuple[str, list[str]]] = [(start, sorted(self._begins[start]))]
            on_way = {start}
            while under_way:
                where, left = under_way[-1]
                if not left:
                    under_way.pop()
                    on_way.discard(where)
                    done.add(where)
                    continue
                other = left.pop()
                if other in on_way:
                    self._refuse("it is defined as itself", where)
                if other not in done:
                    under_way.append((other, sorted(self._begins.get(other, ()))))
                    on_way.add(other)

    # -------------------------------------------------------------- any schema

    def _convert(self, schema: Any, path: str, depth: int, within: str | None = None) -> str:
        """An atom for a schema. ``within``: what is referred to and is this, if anything is."""
        self._path = path
        self._n_schemas += 1
        if self._n_schemas > _MOST_SCHEMAS:
            raise OverflowError(f"more than {_MOST_SCHEMAS} schemas in it")
        if depth > _MOST_DEPTH:
            self._refuse(f"more than {_MOST_DEPTH} schemas within one another", path)
        if isinstance(schema, Mapping):
            self._check_keywords(schema, path)
            where = _only_reference(schema)
            if where is not None:
                _, where = self._references.find(where, path)
                if within is not None:
                    self._begins.setdefault(within, set()).add(where)
                return self._refer(where, path)
        flat = self._references.flatten(schema, path)
        if flat is False:
            self._refuse("false: no value is valid", path)
        if flat is True:
            return self._rules.shared("value")
        self._check_keywords(flat, path)
        said = assertions(flat)
        if said.get("nullable") is not None:
            return self._nullable(said, path, depth, within)
        for keyword in ("anyOf", "oneOf"):
            if keyword in said:
                return self._alternatives(said, keyword, path, depth, within)
        if "enum" in said or "const" in said:
            return self._values(said, path)
        return self._of_types(said, path, depth)

    def _check_keywords(self, schema: Schema, path: str) -> None:
        for keyword in schema:
            if not isinstance(keyword, str):
                self._refuse(f"a keyword is a string, not {keyword!r}", path)
            if keyword in _REFUSED:
                self._refuse(f"a grammar cannot say {keyword!r}", f"{path}/{keyword}")
            if keyword not in _KNOWN and not is_annotation(keyword):
                guess = nearest(keyword, _KNOWN | ANNOTATIONS)
                hint = f"; did you mean {guess!r}?" if guess else ""
                self._refuse(f"unknown keyword {keyword!r}{hint}", path)
        if "$id" in schema and path != "#":
            self._refuse("'$id' below the schema's top", path)

    def _nullable(self, said: Schema, path: str, depth: int, within: str | None) -> str:
        rest = {key: value for key, value in said.items() if key != "nullable"}
        atom = self._convert(rest, path, depth + 1, within)
        if said["nullable"] is not True:
            return atom
        return self._rules.choice([atom, self._rules.shared("null")])

    def _alternatives(
        self, said: Schema, keyword: str, path: str, depth: int, within: str | None
    ) -> str:
        given = said[keyword]
        base = {key: value for key, value in said.items() if key != keyword}
        if not isinstance(given, list) or not given:
            self._refuse("a list of schemas is needed", f"{path}/{keyword}")
        if keyword == "oneOf":
            self._check_apart(given, base, path)
        atoms = []
        for number, alternative in enumerate(given):
            where = f"{path}/{keyword}/{number}"
            whole = alternative
            if base:
                whole = merged(self._references.flatten(alternative, where), base, where)
            if whole is not False:
                atoms.append(self._convert(whole, where, depth + 1, within))
        if not atoms:
            self._refuse("no value is valid", path)
        return self._rules.choice(atoms)

    def _check_apart(self, given: Sequence[Any], base: Schema, path: str) -> None:
        flat = []
        for number, alternative in enumerate(given):
            where = f"{path}/oneOf/{number}"
            found = self._references.flatten(alternative, where)
            flat.append(merged(found, base, where) if base else found)
        if len(flat) > 200:
            self._refuse("more than 200 alternatives; use anyOf", f"{path}/oneOf")
        for number, one in enumerate(flat):
            for before, other in enumerate(flat[:number]):
                if not are_apart(one, other, self._references.flatten):
                    self._refuse(
                        f"a value could be valid by alternatives {before} and {number}, which a "
                        "grammar cannot tell: use anyOf, or give both a required property with "
                        "a const of its own",
                        f"{path}/oneOf",
                    )

    def _of_types(self, said: Schema, path: str, depth: int) -> str:
        names: Iterable[str]
        if "type" in said:
            names = type_names(said["type"], f"{path}/type")
        else:
            names = [name for name, keys in _OF_TYPE.items() if not said.keys().isdisjoint(keys)]
            if not names:
                return self._rules.shared("value")
        atoms = []
        for name in names:
            if name not in _TYPES:
                guess = nearest(name, _TYPES)
                hint = f"; did you mean {guess!r}?" if guess else ""
                self._refuse(f"unknown type {name!r}{hint}", f"{path}/type")
            atoms.append(self._of_type(name, said, path, depth))
        if not atoms:
            self._refuse("no types", f"{path}/type")
        return self._rules.choice(atoms)

    def _of_type(self, name: str, said: Schema, path: str, depth: int) -> str:
        if name == "string":
            return self._string(said, path)
        if name in {"integer", "number"}:
            return self._number(said, path, whole=name == "integer")
        if name == "array":
            return self._array(said, path, depth)
        if name == "object":
            return self._object(said, path, depth)
        return self._rules.shared(name)

    # ------------------------------------------------------------------ values

    def _values(self, said: Schema, path: str) -> str:
        keyword = "const" if "const" in said else "enum"
        values = [said["const"]] if keyword == "const" else said["enum"]
        if not isinstance(values, list):
            self._refuse("a list of values is needed", f"{path}/enum")
        if keyword == "const" and isinstance(said.get("enum"), list):
            values = [v for v in values if json_key(v) in {json_key(w) for w in said["enum"]}]
        if "type" in said:
            names = type_names(said["type"], f"{path}/type")
            values = [value for value in values if _is_of(value, names)]
        for other in said.keys() - {"type", "enum", "const"}:
            self._refuse(f"{other!r} beside {keyword!r}; leave out the values that it excludes",
                         f"{path}/{other}")  # fmt: skip
        if not values:
            self._refuse("no value is left", f"{path}/{keyword}")
        plain = [value for value in values if not isinstance(value, list | Mapping)]
        atoms = [self._constant(v, f"{path}/{keyword}") for v in values if v not in plain]
        if plain:
            texts = [self._text(value, f"{path}/{keyword}") for value in plain]
            atoms.append(self._rules.one_of(texts))
        return self._rules.choice(atoms)

    def _text(self, value: Any, path: str) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError) as error:
            self._refuse(f"not a JSON value: {value!r}", path, error)
        return text

    def _constant(self, value: Any, path: str, depth: int = 0) -> str:
        """A value with white space where that may be."""
        if depth > _MOST_DEPTH:
            self._refuse("a value that is nested too deeply", path)
        if isinstance(value, Mapping):
            parts = [
                f'{literal(self._text(str(key), path))} ":" ws '
                f"{self._constant(item, path, depth + 1)}"
                for key, item in value.items()
            ]
            return self._listed("{", parts, "}")
        if isinstance(value, list):
            return self._listed("[", [self._constant(v, path, depth + 1) for v in value], "]")
        return literal(self._text(value, path))

    def _listed(self, left: str, parts: Sequence[str], right: str) -> str:
        self._rules.shared("ws")
        if not parts:
            return self._rules.add(f'"{left}" ws "{right}"')
        return self._rules.add(f'"{left}" ws ' + ' "," ws '.join(parts) + f' ws "{right}"')

    def _string(self, said: Schema, path: str) -> str:
        least, most = self._count(said, "minLength", path), self._count(said, "maxLength", path)
        asked = [key for key in ("pattern", "format") if key in said]
        if asked and (least is not None or most is not None or len(asked) > 1):
            self._refuse(
                f"{asked[0]!r} together with 'minLength', 'maxLength' or another one of its kind; "
                "say it in one pattern",
                f"{path}/{asked[0]}",
            )
        if "pattern" in said:
            where = f"{path}/pattern"
            if not isinstance(said["pattern"], str):
                self._refuse("a regular expression is needed", where)
            return self._rules.add(rf'"\"" {pattern_of(self._rules, said["pattern"], where)} "\""')
        if "format" in said:
            text = FORMATS.get(said["format"]) if isinstance(said["format"], str) else None
            if text is None:
                self._refuse(
                    f"the format {said['format']!r} is none of {', '.join(sorted(FORMATS))}; leave "
                    "it out, or give a pattern",
                    f"{path}/format",
                )
            return self._rules.add(rf'"\"" {text} "\""')
        if least is None and most is None:
            return self._rules.shared("string")
        least = least or 0
        self._check_order(least, most, path, "minLength")
        text = self._rules.repeated(self._rules.shared("char"), least, most, path)
        return self._rules.add(rf'"\"" {text} "\""')

    def _number(self, said: Schema, path: str, *, whole: bool) -> str:
        if "multipleOf" in said and not (whole and said["multipleOf"] == 1):
            self._refuse("a grammar cannot say 'multipleOf'", f"{path}/multipleOf")
        low = self._bound(said, path, "minimum", "exclusiveMinimum", max)
        high = self._bound(said, path, "maximum", "exclusiveMaximum", min)
        atom = (whole_numbers if whole else numbers)(self._rules, low, high)
        if atom is None:
            self._refuse("no number is within its bounds", path)
        return atom

    def _bound(
        self, said: Schema, path: str, plain: str, exclusive: str, pick: Callable[..., Any]
    ) -> Bound | None:
        bounds = []
        for keyword, excluded in ((plain, False), (exclusive, True)):
            if keyword not in said:
                continue
            value = said[keyword]
            if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
                self._refuse(f"a number is needed, not {value!r}", f"{path}/{keyword}")
            if not math.isfinite(value):
                self._refuse("a finite number is needed", f"{path}/{keyword}")
            number = Decimal(str(value)) if not isinstance(value, int) else Decimal(value)
            digits = format(number, "f").lstrip("-").partition(".")
            if max(len(digits[0]), len(digits[2])) > _MOST_BOUND_DIGITS:
                self._refuse("a bound of too many digits", f"{path}/{keyword}")
            bounds.append(Bound(number, excluded))
        if not bounds:
            return None
        edge = pick(bound.value for bound in bounds)
        return Bound(edge, any(bound.excluded for bound in bounds if bound.value == edge))

    # ------------------------------------------------------------------ arrays

    def _array(self, said: Schema, path: str, depth: int) -> str:
        self._rules.shared("ws")
        first = said.get("prefixItems", [])
        rest, rest_path = said.get("items", not first), f"{path}/items"
        first_path = f"{path}/prefixItems"
        if isinstance(rest, list):  # as drafts before 2020-12 have it
            first, first_path = rest, rest_path
            rest, rest_path = said.get("additionalItems", not first), f"{path}/additionalItems"
        if not isinstance(first, list):
            self._refuse("a list of schemas is needed", first_path)
        least = self._count(said, "minItems", path) or 0
        most = self._count(said, "maxItems", path)
        if said.get("uniqueItems", False) is not False and (most is None or most > 1):
            self._refuse("a grammar cannot say 'uniqueItems'", f"{path}/uniqueItems")
        if rest is False:
            most = len(first) if most is None else min(most, len(first))
        self._check_order(least, most, path, "minItems")
        wanted = len(first) if most is None else min(most, len(first))
        atoms = [
            self._convert(schema, f"{first_path}/{number}", depth + 1)
            for number, schema in enumerate(first[:wanted])
        ]
        if most is None or most > len(first):
            atoms.append(self._convert(rest, rest_path, depth + 1))
        content = self._items(atoms, len(first), least, most, path)
        if not content:
            return self._rules.add('"[" ws "]"')
        return self._rules.add(f'"[" ws {content} "]"')

    def _items(
        self, atoms: Sequence[str], n_first: int, least: int, most: int | None, path: str
    ) -> str:
        """Between the brackets. ``atoms``: the first items, then the one that may be repeated."""
        following = ""
        if len(atoms) > n_first:
            again = self._rules.add(f'"," ws {atoms[n_first]}')
            done = max(1, n_first)
            following = self._rules.repeated(
                again, max(0, least - done), None if most is None else most - done, path
            )
        for number in range(min(n_first, len(atoms)) - 1, 0, -1):
            text = f'"," ws {atoms[number]} {following}'.strip()
            following = self._rules.add(text if number < least else f'{text} | ""')
        if not atoms:
            return ""
        whole = f"{atoms[0]} {following} ws" if following else f"{atoms[0]} ws"
        return whole if least else f"({whole})?"

    # ----------------------------------------------------------------- objects

    def _object(self, said: Schema, path: str, depth: int) -> str:
        self._rules.shared("ws")
        named = said.get("properties", {})
        required = said.get("required", [])
        others = said.get("additionalProperties", not named)
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            self._refuse("schemas by name are needed", f"{path}/properties")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse("a list of names is needed", f"{path}/required")
        if said.get("patternProperties"):
            self._refuse("a grammar cannot say 'patternProperties'", f"{path}/patternProperties")
        if said.get("propertyNames", True) is not True:
            self._refuse("a grammar cannot say 'propertyNames'", f"{path}/propertyNames")
        properties = dict(named)
        for name in required:
            if name not in properties:
                if others is False and "additionalProperties" in said:
                    self._refuse(f"{name!r} is required and not allowed", f"{path}/required")
                properties[name] = said.get("additionalProperties", True)
        self._check_size(said, properties, required, others, path)
        members = []
        for name, schema in properties.items():
            where = f"{path}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            if schema is False:
                if name in required:
                    self._refuse("it is required, and no value is valid", where)
                continue
            key = literal(self._text(name, where))
            atom = self._convert(schema, where, depth + 1)
            members.append((self._rules.add(f'{key} ":" ws {atom}'), name in required))
        more = None if others is False else self._others(properties, others, path, depth)
        content = self._members(members, more, self._count(said, "maxProperties", path), path)
        return self._rules.add(f'"{{" ws {content} "}}"'.replace("  ", " "))

    def _others(self, named: Schema, schema: Any, path: str, depth: int) -> str:
        """A member that is none of those that have names."""
        where = f"{path}/additionalProperties"
        if any(len(name) > _MOST_NAME for name in named):
            self._refuse(f"a property's name has more than {_MOST_NAME} characters", where)
        atom = self._convert(schema, where, depth + 1)
        key = other_names(self._rules, named) if named else self._rules.shared("string")
        return self._rules.add(f'{key} ":" ws {atom}')

    def _members(
        self, members: Sequence[tuple[str, bool]], more: str | None, most: int | None, path: str
    ) -> str:
        """Between the braces: the members in their order, then others.

        Two rules for each member: what comes when nothing has come so far, and what comes then.
        """
        add = self._rules.add
        first = following = '""'
        if more is not None:
            again = add(f'"," ws {more}')
            if members:
                following = add(f"{again}*")
                first = add(f'{more} {again}* ws | ""')
            else:
                rest = self._rules.repeated(again, 0, None if most is None else most - 1, path)
                first = add(f'{more} {rest} ws | ""') if most != 0 else '""'
        following = add(f"{following} ws")
        for member, is_required in reversed(members):
            alone = f"{member} {following}"
            first = add(alone) if is_required else add(f"{alone} | {first}")
            text = f'"," ws {member} {following}'
            following = add(text) if is_required else add(f"{text} | {following}")
        return first

    def _check_size(
        self, said: Schema, named: Schema, required: Sequence[str], others: Any, path: str
    ) -> None:
        least = self._count(said, "minProperties", path)
        most = self._count(said, "maxProperties", path)
        if least is not None and least > len(set(required)):
            self._refuse(
                "a grammar cannot count properties that need not be there",
                f"{path}/minProperties",
            )
        if most is not None and (most < len(named) or (named and others is not False)):
            self._refuse("a grammar cannot count properties", f"{path}/maxProperties")

    # ------------------------------------------------------------------- parts

    def _count(self, said: Schema, keyword: str, path: str) -> int | None:
        value = said.get(keyword)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self._refuse(f"a whole number from 0 is needed, not {value!r}", f"{path}/{keyword}")
        return value

    def _check_order(self, least: int, most: int | None, path: str, keyword: str) -> None:
        if most is not None and least > most:
            self._refuse(f"at least {least}, and {most} at most", f"{path}/{keyword}")

    def _refuse(self, what: str, path: str, cause: Exception | None = None) -> NoReturn:
        raise InvalidGrammar(what, path=path) from cause


def _only_reference(schema: Schema) -> Any:
    """What a schema refers to that says nothing else."""
    said = assertions(schema)
    if len(said) != 1:
        return None
    parts = said.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], Mapping):
        return _only_reference(parts[0])
    return said.get("$ref")


def _is_of(value: Any, names: Sequence[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in names
    if value is None:
        return "null" in names
    if isinstance(value, str):
        return "string" in names
    if isinstance(value, int):
        return "integer" in names or "number" in names
    if isinstance(value, float):
        return "number" in names or ("integer" in names and value.is_integer())
    return ("array" if isinstance(value, list) else "object") in names

"""JSON schemas as grammars, judged by the package jsonschema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.compile import compile_schema
from grammars import matches, refusal, some_text

VALIDATOR = jsonschema.Draft202012Validator


def is_valid(value: Any, schema: Any) -> bool:
    checker = VALIDATOR.FORMAT_CHECKER
    return VALIDATOR(schema, format_checker=checker).is_valid(value)


def accepts(schema: Any, value: Any) -> bool:
    """Whether a value is a text of the schema's grammar, as Python writes it in several ways."""
    grammar = compile_schema(schema)
    texts = [
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        json.dumps(value, ensure_ascii=False, indent=2),
    ]
    found = {matches(grammar, text) for text in texts}
    assert len(found) == 1, texts
    return found.pop()


# ---------------------------------------------------------------- random schemas

Instance = tuple[Any, Any]
"""A schema, and a value that is valid by it."""

names = st.sampled_from(["a", "ab", "b", "né", 'q"', "x/y", "~"])
texts = st.text(st.sampled_from('ab"\\/\n\té\U0001f600\x1f'), max_size=6)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), texts)


@st.composite
def strings(draw: st.DrawFn) -> Instance:
    value = draw(texts)
    schema: dict[str, Any] = {"type": "string"}
    if draw(st.booleans()):
        schema["minLength"] = draw(st.integers(0, len(value)))
    if draw(st.booleans()):
        schema["maxLength"] = draw(st.integers(len(value), 9))
    return schema, value


@st.composite
def integers(draw: st.DrawFn) -> Instance:
    value = draw(st.integers(-1200, 1200) | st.integers(-(10**14), 10**14))
    schema: dict[str, Any] = {"type": "integer"}
    below = draw(st.none() | st.integers(0, 300))
    above = draw(st.none() | st.integers(0, 300))
    if below is not None:
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = value - below
        schema.update({} if below else {"minimum": value})
        if not below:
            schema.pop("exclusiveMinimum", None)
    if above is not None:
        key = draw(st.sampled_from(["maximum", "exclusiveMaximum"])) if above else "maximum"
        schema[key] = value + above
    return schema, value


@st.composite
def decimals(draw: st.DrawFn) -> Instance:
    value = draw(st.integers(-99999, 99999)) / 1000
    schema: dict[str, Any] = {"type": "number"}
    below, above = (draw(st.none() | st.integers(1, 5000)) for _ in range(2))
    if below is not None:
        key = draw(st.sampled_from(["minimum", "exclusiveMinimum"]))
        schema[key] = round(value - below / 1000, 3)
    if above is not None:
        key = draw(st.sampled_from(["maximum", "exclusiveMaximum"]))
        schema[key] = round(value + above / 1000, 3)
    return schema, value


@st.composite
def enums(draw: st.DrawFn) -> Instance:
    compound = st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=2)
    values = draw(st.lists(scalars | compound, min_size=1, max_size=4))
    if draw(st.booleans()):
        return {"const": values[0]}, values[0]
    return {"enum": values}, draw(st.sampled_from(values))


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Instance]) -> Instance:
    if draw(st.booleans()):
        first = draw(st.lists(inner, min_size=1, max_size=3))
        count = draw(st.integers(0, len(first)))
        schema: dict[str, Any] = {"type": "array", "prefixItems": [s for s, _ in first]}
        values = [value for _, value in first[:count]]
        if draw(st.booleans()):
            rest = draw(inner)
            schema["items"] = rest[0]
            values += [rest[1]] * draw(st.integers(0, 2)) if count == len(first) else []
    else:
        rest = draw(inner)
        schema = {"type": "array", "items": rest[0]}
        values = [rest[1]] * draw(st.integers(0, 4))
    if draw(st.booleans()):
        schema["minItems"] = draw(st.integers(0, len(values)))
    if draw(st.booleans()):
        schema["maxItems"] = draw(st.integers(len(values), 6))
    return schema, values


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Instance]) -> Instance:
    members: dict[str, Instance] = draw(st.dictionaries(names, inner, max_size=4))
    coin: st.SearchStrategy[bool] = st.booleans()
    present = {name for name in members if draw(coin)}
    schema: dict[str, Any] = {"type": "object"}
    if draw(coin) or members:
        schema["properties"] = {name: s for name, (s, _) in members.items()}
    value = {name: v for name, (_, v) in members.items() if name in present}
    required = sorted(name for name in present if draw(coin))
    if draw(coin) or required:
        schema["required"] = required
    kind = draw(st.sampled_from(["nothing", "false", "schema"]))
    if kind == "false":
        schema["additionalProperties"] = False
    if kind == "schema":
        others = draw(inner)
        schema["additionalProperties"] = others[0]
        more = draw(st.sets(st.sampled_from(["c", "aa", "abc", "nè", "q", "\\", "/x"])))
        value |= dict.fromkeys(sorted(more), others[1])
    return schema, value


@st.composite
def alternatives(draw: st.DrawFn, inner: st.SearchStrategy[Instance]) -> Instance:
    several = draw(st.lists(inner, min_size=1, max_size=3))
    return {"anyOf": [schema for schema, _ in several]}, draw(st.sampled_from(several))[1]


instances: st.SearchStrategy[Instance] = st.recursive(
    st.one_of(
        strings(),
        integers(),
        decimals(),
        enums(),
        st.tuples(st.just({"type": ["boolean", "null"]}), st.none() | st.booleans()),
        st.tuples(st.just({}) | st.just(True), scalars),
    ),
    lambda inner: st.one_of(arrays(inner), objects(inner), alternatives(inner)),
    max_leaves=6,
)


@settings(max_examples=200)
@given(instance=instances)
def test_valid_values_are_texts_of_the_grammar(instance: Instance) -> None:
    """A value that a schema was made for is accepted, however it is laid out."""
    schema, value = instance
    assert is_valid(value, schema)
    assert accepts(schema, value)


@settings(max_examples=200)
@given(instance=instances, seed=st.integers(0, 2**32))
def test_texts_of_the_grammar_are_valid(instance: Instance, seed: int) -> None:
    """What is drawn from a schema's grammar is JSON and valid by the schema."""
    schema, _ = instance
    grammar = compile_schema(schema)
    rng = random.Random(seed)
    for _ in range(3):
        text = some_text(grammar, rng)
        assume(text is not None)
        assert text is not None
        assert is_valid(json.loads(text), schema), text


# --------------------------------------------------------------- single keywords

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "left": {"$ref": "#/$defs/node"},
                "right": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
TAGGED = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind"],
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}},
            "required": ["kind"],
        },
    ],
    "discriminator": {"propertyName": "kind"},
}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (TREE, [{"name": "a", "left": {"name": "b"}, "right": None}], [{}, {"name": 1}]),
        (TAGGED, [{"kind": "cat", "lives": 9}, {"kind": "dog"}], [{"kind": "cow"}, {"lives": 9}]),
        ({"type": ["string", "null"], "maxLength": 1}, ["a", None], ["ab", 1]),
        ({"type": "string", "nullable": True}, ["a", None], [1]),
        ({"minLength": 2}, ["ab"], ["a"]),
        ({"type": "string", "format": "date"}, ["2024-02-28"], ["2024-02-30", "24-1-1"]),
        (
            {"type": "string", "format": "date-time"},
            ["2024-12-31T23:59:59Z", "2024-01-01T00:00:00.5+01:00"],
            ["2024-12-31"],
        ),
        ({"type": "string", "format": "time"}, ["12:00:00Z"], ["25:00:00Z"]),
        (
            {"type": "string", "format": "uuid"},
            ["123e4567-e89b-12d3-a456-426614174000"],
            ["123e4567"],
        ),
        ({"type": "string", "format": "ipv4"}, ["192.168.0.1", "255.255.255.255"], ["256.1.1.1"]),
        ({"type": "integer", "multipleOf": 1}, [3], [3.5]),
        ({"type": "integer", "minimum": 1.5, "maximum": 3.9}, [2, 3], [1, 4]),
        ({"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1}, [-2], [-3, -1]),
        ({"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1, 1.0], [-0.1, 1.1]),
        ({"type": "number", "exclusiveMinimum": 0}, [0.001, 7], [0, -1]),
        (
            {"type": "number", "minimum": 2.2, "exclusiveMaximum": 2.25},
            [2.2, 2.2499],
            [2.25, 2.1999],
        ),
        ({"const": {"a": [1, None]}}, [{"a": [1, None]}], [{"a": [1]}, {}]),
        ({"enum": [1, 2.5, "x", None], "type": ["integer", "string"]}, [1, "x"], [2.5, None]),
        ({"prefixItems": [{"type": "integer"}], "items": False}, [[], [1]], [[1, 2]]),
        (
            {"items": [{"type": "integer"}], "additionalItems": {"type": "string"}},
            [[], [1], [1, "a"]],
            [["a"], [1, 2]],
        ),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [[None, None]], [[None]]),
        ({"type": "array", "maxItems": 0}, [[]], [[1]]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
            [{}, {"a": 1, "b": 2}],
            [{"a": "b"}, {"a": 1, "b": 2, "c": 3}],
        ),
        (
            {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
            [{"x": 1}],
            [{"x": "y"}, {}],
        ),
        ({"type": "object", "properties": {"a": False, "b": True}}, [{"b": [1]}], [{"a": 1}]),
        (
            {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"type": "string"}}}],
             "$defs": {"a": {"type": "object", "properties": {"x": {"type": "integer"}},
                             "required": ["x"]}}},
            [{"x": 1}, {"x": 1, "y": "z"}],
            [{"y": "z"}, {"x": 1, "y": 2}],
        ),
        (
            {"type": "integer", "allOf": [{"minimum": 3}, {"minimum": 5}], "maximum": 6},
            [5, 6],
            [4, 7],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
             "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
            [{}],
        ),
        ({"$ref": "#/$defs/a%25b", "$defs": {"a%b": {"type": "null"}}}, [None], [1]),
        ('{"type": "boolean"}', [True], [0]),
        (True, [None, [{"a": 1}]], []),
    ],
)  # fmt: skip
def test_keywords(schema: Any, valid: list[Any], invalid: list[Any]) -> None:
    """What a keyword allows is accepted, what it forbids is not."""
    meant = json.loads(schema) if isinstance(schema, str) else schema
    for value in valid:
        if not isinstance(meant, dict) or not meant.keys() & {"nullable", "additionalItems"}:
            assert is_valid(value, meant)
        assert accepts(schema, value), value
    for value in invalid:
        assert not accepts(schema, value), value


def test_properties_come_in_their_order_and_no_others() -> None:
    """An object has the properties that are named, in their order, unless more are let in."""
    named: dict[str, Any] = {"properties": {"a": {"type": "null"}, "b": {"type": "null"}}}
    assert accepts(named, {"a": None, "b": None})
    assert not accepts(named, {"b": None, "a": None})
    assert not accepts(named, {"a": None, "c": 1})
    assert accepts({**named, "additionalProperties": True}, {"a": None, "c": 1})


def test_other_properties_cannot_pass_for_named_ones() -> None:
    """An additional property has no name of the schema's, in no way of writing it."""
    schema = {
        "properties": {"ab": {"type": "null"}, "c\n": {"type": "null"}, "": {"type": "null"}},
        "additionalProperties": {"type": "integer"},
    }
    grammar = compile_schema(schema)
    for name in ('"ab"', '"\\u0061b"', '"c\\n"', '"c\\u000a"', '""'):
        assert not matches(grammar, "{" + name + ": 1}"), name
    for name in ('"a"', '"abc"', '"c"', '"c\\n\\n"', '"\\n"', '"d"', '"a\\""'):
        assert matches(grammar, "{" + name + ": 1}"), name


# ------------------------------------------------------------------- patterns

PATTERNS = {
    r"^a+b?$": (["a", "aab"], ["b", "xa"]),
    r"b": (["b", "abc", "\nb"], ["a"]),
    r"^a|b$": (["ax", "xb"], ["xax"]),
    r"^(a|bc){2,3}$": (["aa", "bcabc"], ["a", "aaaa"]),
    r"^[^a-c\"]$": (["d", "é", "\\"], ["a", '"', ""]),
    r"^\d{3}-\d{4}$": (["555-1234"], ["555-123"]),
    r"^\w+\.\w+$": (["a_1.b"], ["a.", "é.b"]),
    r"^[\w\s]*$": (["a b", ""], ["-"]),
    r"^\S\D\W$": (["aa-"], ["aa1", " a-"]),
    r"^[^\s]$": (["a", "-"], [" ", "\x1f"]),
    r'^"\\"$': (['"\\"'], ["\\"]),
    r"^\t\x41\u00e9$": (["\tAé"], ["A"]),
    r"^.$": (["a", "\t", "\U0001f600"], ["\n", "ab"]),
    r"^(?:ab)*?$": (["", "abab"], ["a"]),
    r"": (["", "x"], []),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    """A string matches a pattern as jsonschema would have it, and what is drawn does so too."""
    found, missed = PATTERNS[pattern]
    schema = {"type": "string", "pattern": pattern}
    for text in found:
        assert is_valid(text, schema)
        assert accepts(schema, text), text
    for text in missed:
        assert not accepts(schema, text), text
    rng = random.Random(pattern)
    for _ in range(20):
        drawn = some_text(compile_schema(schema), rng)
        assert drawn is None or is_valid(json.loads(drawn), schema), drawn


# ------------------------------------------------------------- what is refused

DEEP: Any = {"type": "integer"}
for _ in range(80):
    DEEP = {"type": "array", "items": DEEP}
WIDE = {  # each level refers to the next twice, in a way that has to be written out
    "$ref": "#/$defs/d0",
    "$defs": {
        f"d{n}": {
            "properties": {
                key: {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"minProperties": 0}]}
                for key in "ab"
            }
        }
        for n in range(30)
    }
    | {"d30": {"type": "object"}},
}


@pytest.mark.parametrize(
    ("schema", "path", "problem"),
    [
        ("{", "#", "no JSON"),
        ("[" * 100_000, "#", "no JSON"),
        ([], "#", "a schema is an object"),
        (False, "#", "no value is valid"),
        ({"type": "strin"}, "#/type", "did you mean 'string'"),
        ({"type": 3}, "#/type", "a name or a list"),
        ({"type": "object", "requird": []}, "#", "did you mean 'required'"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a/not", "cannot say 'not'"),
        ({"items": {"if": True}}, "#/items/if", "cannot say 'if'"),
        ({"prefixItems": [{}, {"format": "email"}]}, "#/prefixItems/1/format", "none of"),
        ({"properties": {"a/b~": 3}}, "#/properties/a~1b~0", "a schema is an object"),
        ({"$ref": "#/$defs/x"}, "#", "leads nowhere"),
        ({"$ref": "other.json"}, "#", "leads outside"),
        ({"$ref": "#"}, "#", "defined as itself"),
        (
            {"anyOf": [{"$ref": "#/$defs/a"}, {}], "$defs": {"a": {"anyOf": [{"$ref": "#"}]}}},
            None,
            "defined as itself",
        ),
        (
            {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}],
             "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}},
            "#/$defs/a/allOf/0/$ref",
            "back to itself",
        ),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "#",
            "no value that ends",
        ),
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "#/oneOf", "alternatives 0 and 1"),
        ({"oneOf": [{"const": 1}, {"enum": [1, 2]}]}, "#/oneOf", "alternatives 0 and 1"),
        ({"anyOf": []}, "#/anyOf", "a list of schemas"),
        ({"enum": []}, "#/enum", "no value is left"),
        ({"enum": [1], "type": "string"}, "#/enum", "no value is left"),
        ({"enum": ["a"], "maxLength": 3}, "#/maxLength", "beside 'enum'"),
        ({"const": "\ud800"}, "#/const", "not a JSON value"),
        ({"const": float("nan")}, "#/const", "not a JSON value"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "#", "no number"),
        ({"type": "integer", "exclusiveMinimum": True}, "#/exclusiveMinimum", "a number is needed"),
        ({"type": "number", "minimum": 1e300}, "#/minimum", "too many digits"),
        ({"type": "number", "multipleOf": 0.5}, "#/multipleOf", "multipleOf"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#/minLength", "at least 3"),
        ({"type": "string", "maxLength": 100_000}, "#", "counted"),
        ({"type": "string", "maxLength": -1}, "#/maxLength", "whole number"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "#/pattern", "together with"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "#/minItems", "at least 2"),
        ({"type": "array", "items": {}, "minItems": 10**9}, "#", "counted"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems", "uniqueItems"),
        ({"patternProperties": {"a": {}}}, "#/patternProperties", "patternProperties"),
        ({"propertyNames": {"maxLength": 3}}, "#/propertyNames", "propertyNames"),
        ({"minProperties": 1}, "#/minProperties", "cannot count"),
        ({"properties": {"a": {}}, "maxProperties": 0}, "#/maxProperties", "cannot count"),
        ({"required": ["a"], "additionalProperties": False}, "#/required", "not allowed"),
        (
            {"allOf": [{"type": "object", "additionalProperties": False},
                       {"properties": {"a": {}}}]},
            "#",
            "does not know",
        ),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "#", "nothing is of type"),
        (DEEP, "#" + "/items" * 49, "within one another"),
        (WIDE, None, "too large"),
        ({"enum": ["x" * 600_000]}, None, "too large"),
        *(
            ({"type": "string", "pattern": pattern}, "#/pattern", "has at character")
            for pattern in (
                "(?=a)", "(?!a)", "(?<n>a)", r"\1", r"\bx", "a^", "a$b", "(a$)", "a**", "(a*)*",
                "[z-a]", "[a", "(a", "a)", "[]", "a{3,1}", "a{", "*", r"\p{L}", r"\ud800", "\\",
            )
        ),
    ],
)  # fmt: skip
def test_what_a_grammar_cannot_say_is_refused_with_its_path(
    schema: Any, path: str | None, problem: str
) -> None:
    """No keyword is ignored: what cannot be held to is an error that says where it stands."""
    with pytest.raises(InvalidGrammar, match=problem) as caught:
        compile_schema(schema)
    assert caught.value.path is not None
    if path is not None:
        assert caught.value.path == path
        assert f"json_schema, {path}: " in str(caught.value)


def test_many_optional_properties_are_no_trouble() -> None:
    """Two hundred properties, each of which may be missing, are read and followed."""
    named = {f"property-{n}": {"type": "boolean"} for n in range(200)}
    value = {name: True for number, name in enumerate(named) if number % 3}
    assert accepts({"type": "object", "properties": named}, value)


@settings(max_examples=100)
@given(
    schema=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from([
                    "type", "properties", "required", "items", "prefixItems", "enum", "anyOf",
                    "oneOf", "allOf", "$ref", "$defs", "minimum", "maxLength", "pattern", "const",
                    "additionalProperties", "nullable", "format", "minItems",
                ]),
                inner | st.sampled_from(["object", "string", "#", "#/$defs/a", ["a"]]),
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)  # fmt: skip
def test_any_schema_is_taken_or_refused(schema: Any) -> None:
    """Whatever is given, it becomes a grammar or InvalidGrammar."""
    error = refusal(compile_schema, schema)
    assert error is None or error.path is not None

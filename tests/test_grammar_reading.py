"""GBNF: what is read, what it means, and what is refused, with the place."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.check import has_end
from erllama_core.grammar.compile import compile_gbnf
from erllama_core.grammar.limits import MOST_REPEATS, MOST_TEXT_BYTES
from erllama_core.interfaces.grammar import CharSet, characters_from
from grammars import follow, matches, refusal

JSON = r"""
# llama.cpp's own, from its grammars folder
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("{}", True),
        ('{"a": 1, "b": [true, null, {"c": "d\\n"}]}', True),
        ('{"é\U0001f600": -1.5e3}', True),
        ("[1]", False),
        ('{"a"}', False),
        ('{"a": 01}', False),
        ('{"a": "\x01"}', False),
    ],
)
def test_a_usual_grammar_is_followed(text: str, fits: bool) -> None:
    """llama.cpp's JSON grammar matches JSON objects and nothing else."""
    assert matches(compile_gbnf(JSON), text) is fits


# ------------------------------------------------- against regular expressions

LETTERS = "abé☃\U0001f600"
Both = tuple[str, str]
"""The same language in GBNF and as a regular expression."""


def _sets(chosen: list[str], negated: bool) -> Both:
    inside = "".join(sorted(set(chosen)))
    return (f"[{'^' if negated else ''}{inside}]",) * 2


def _repeats(inner: Both, kind: str) -> Both:
    return f"({inner[0]}){kind}", f"(?:{inner[1]}){kind}"


characters = st.sampled_from(LETTERS)
atoms = st.one_of(
    st.text(characters, min_size=1, max_size=3).map(lambda t: (f'"{t}"', t)),
    st.builds(_sets, st.lists(characters, min_size=1, max_size=3), st.booleans()),
    st.just((".", r"[\s\S]")),
)


def _larger(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    kinds = st.sampled_from(["?", "{2}", "{1,3}", "{2,}", "+"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: (" ".join(p[0] for p in parts), "".join(p[1] for p in parts))
        ),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: (
                "(" + " | ".join(p[0] for p in parts) + ")",
                "(?:" + "|".join(p[1] for p in parts) + ")",
            )
        ),
        st.builds(_repeats, inner, kinds),
    )


languages = st.recursive(atoms, _larger, max_leaves=8)


@settings(max_examples=300)
@given(language=languages, text=st.text(characters, max_size=8))
def test_it_means_what_the_regular_expression_means(language: Both, text: str) -> None:
    """A text is whole by the grammar if the same regular expression matches it, and each of its
    beginnings can then be gone on with; byte by byte or all at once.
    """
    gbnf, expression = language
    refused = refusal(compile_gbnf, f"root ::= {gbnf}")
    if refused is not None:
        assert "repetition" in refused.problem  # of what may be empty, or of too much
        return
    grammar = compile_gbnf(f"root ::= {gbnf}")
    whole = re.fullmatch(expression, text) is not None
    assert matches(grammar, text) is whole
    at_once = grammar.begin().after(text.encode()) if text else grammar.begin()
    assert (at_once is not None and at_once.may_end) is whole
    if whole:
        data = text.encode()
        for end in range(1, len(data) + 1):
            assert grammar.begin().allows(data[:end])


@given(first=st.integers(0x80, 0x10FFFF), cut=st.integers(1, 3))
def test_the_beginning_of_a_character_bounds_it(first: int, cut: int) -> None:
    """Bytes of which a character lacks some tell exactly the characters that they can become."""
    if 0xD800 <= first <= 0xDFFF:
        return
    data = chr(first).encode()
    low, high = characters_from(data[: min(cut, len(data) - 1)])
    assert low <= first <= high
    head = data[: min(cut, len(data) - 1)]
    for code in (low, high):
        assert chr(code).encode().startswith(head)
    for code in (low - 1, high + 1):
        if 0x80 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            assert not chr(code).encode().startswith(head)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300))), code=st.integers(1, 400)
)
def test_sets_of_characters(ranges: list[tuple[int, int]], code: int) -> None:
    """A set has what its ranges have, its opposite what they have not."""
    ranges = [(min(pair), max(pair)) for pair in ranges]
    inside = any(first <= code <= last for first, last in ranges)
    assert (code in CharSet.of(ranges)) is inside
    assert (code in CharSet.of(ranges, negated=True)) is not inside


@pytest.mark.parametrize(
    "data", [b"\x80", b"\xc3(", b"\xe0\x80", b"\xed\xa0", b"\xff", b"\xf4\x90"]
)
def test_what_is_not_utf8_never_fits(data: bytes) -> None:
    """Even where any character may come, bytes of no character do not."""
    assert compile_gbnf("root ::= .*  \n").begin().after(data) is None


def test_a_reply_does_not_end_within_a_character() -> None:
    """Where every text is whole, one that is cut within a character is not."""
    state = compile_gbnf("root ::= .*").begin()
    assert state.may_end
    within = state.after("é".encode()[:1])
    assert within is not None
    assert not within.may_end
    assert not within.allows(b"e")


# ------------------------------------------------------------- what is refused

NESTED = "root ::= " + "(" * 200 + '"a"' + ")" * 200
FORKS = "\n".join(f'a{n} ::= a{n + 1} "x" | a{n + 1} "y"' for n in range(60))
CHAIN = "\n".join(f"a{n} ::= a{n + 1}" for n in range(5000))


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("", (1, 1), "no rule named root"),
        ('x ::= "a"', (1, 10), "no rule named root"),
        ("root ::= a", (1, 10), "'a' is not defined"),
        ('root ::= "a"\n\nb ::= ("x" | nix)', (3, 14), "'nix' is not defined"),
        ('root ::= "a"\nroot ::= "b"', (2, 1), "a second time"),
        ('root = "a"', (1, 6), "'::=' was expected"),
        ('root ::= "a', (1, 10), "does not end"),
        ("root ::= [a", (1, 10), "does not end"),
        ('root ::= ("a"', (1, 10), "does not end"),
        ('root ::= "a")', (1, 13), "the end of the rule"),
        ("root ::= 'a'", (1, 10), "the end of the rule"),
        ('root ::= "\\q"', (1, 11), "escape"),
        ('root ::= "\\x4"', (1, 11), "hexadecimal"),
        ('root ::= "\\UFFFFFFFF"', (1, 11), "not a character"),
        ('root ::= "\\uD800"', (1, 11), "not a character"),
        ('root ::= "\\x00"', (1, 11), "NUL"),
        ('root ::= "a\0b"', (1, 12), "NUL"),
        ('root ::= "\ud800"', (1, 11), "surrogate"),
        ("root ::= [z-a]", (1, 11), "ends before it begins"),
        ("root ::= []", (1, 10), "without characters"),
        ("root ::= [^]", (1, 10), "without characters"),
        ("root ::= *", (1, 10), "nothing before it"),
        ('root ::= ""*', (1, 12), "nothing before it"),
        ('root ::= "a"{3,2}', (1, 13), "at least 3 and at most 2"),
        ('root ::= "a"{,2}', (1, 14), "a number was expected"),
        ('root ::= "a"{0,1000000}', (1, 13), "more than 1999"),
        ('root ::= "a"{99999999999999999999999999}', (1, 13), "more than 1999"),
        ('root ::= ("a"{0,50}){50}', (1, 21), "repetitions within one another"),
        (f'root ::= "{"a" * 1000}"{{0,1999}}', (1, 1012), "too large"),
        ("root ::= <[17]>", (1, 10), "name a token"),
        ("root ::= !<[17]>", (1, 10), "name a token"),
        (NESTED, None, "groups within one another"),
        ("root ::= ", None, "root is empty"),
        ('root ::= ""', None, "root is empty"),
        ('root ::= root "a" | "b"', None, "left recursion"),
        ('root ::= x\nx ::= y "a" | "c"\ny ::= x "b"', None, "left recursion"),
        ('root ::= ("a"?)*', None, "left recursion"),
        # llama.cpp takes e for one that is never empty, and does not end on it.
        ('root ::= e root "x" | "y"\ne ::= n n\nn ::= "" | "z"', None, "left recursion"),
        (f'root ::= a0\n{FORKS}\na60 ::= "z"', None, "begin with one another"),
        (f'root ::= a0\n{CHAIN}\na5000 ::= "z"', None, "begin with one another"),
        ('root ::= "a" root "b" | "a" root "c" | "d"', None, "too ambiguous"),
        ('root ::= "(ab" root ")" | "(ab" root "]" | "x"', None, "too ambiguous"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_place(
    text: str, place: tuple[int, int] | None, problem: str
) -> None:
    """A mistake, or what would make llama.cpp abort, hang or blow up, is an error at once."""
    with pytest.raises(InvalidGrammar, match=problem) as caught:
        compile_gbnf(text)
    error = caught.value
    if place is not None:
        assert (error.line, error.column) == place
        assert str(error).startswith(f"grammar, line {place[0]}, column {place[1]}: ")
        line = text.split("\n")[place[0] - 1]
        assert error.excerpt == line[place[1] - 1 :][:32]
    assert error.path is None


def test_a_grammar_that_is_too_long_is_refused() -> None:
    """Its size is bounded before it is read."""
    with pytest.raises(InvalidGrammar, match="limit"):
        compile_gbnf("# " + "x" * MOST_TEXT_BYTES)


def test_a_large_grammar_is_read() -> None:
    """Four hundred tools are no attack."""
    tools = " | ".join(f"tool{n}" for n in range(400))
    rules = [
        rf'tool{n} ::= "{{\"name\": \"tool{n}\", \"x\": " [0-9]{{1,9}} "}}"' for n in range(400)
    ]
    grammar = compile_gbnf("\n".join([f"root ::= {tools}", *rules]))
    assert matches(grammar, '{"name": "tool399", "x": 12}')
    assert not matches(grammar, '{"name": "tool400", "x": 12}')


def test_repetitions_up_to_the_limit_are_counted() -> None:
    """The largest repetition that llama.cpp keeps is exact here as well."""
    grammar = compile_gbnf(f'root ::= "a"{{2,{MOST_REPEATS}}}')
    assert matches(grammar, "a" * MOST_REPEATS)
    assert follow(grammar, "a" * (MOST_REPEATS + 1)) is None
    assert not matches(grammar, "a")


def test_a_grammar_without_an_end_is_told_from_others() -> None:
    """A reply that cannot end by itself is allowed, and can be told."""
    assert not has_end(compile_gbnf('root ::= "a" root'))
    assert has_end(compile_gbnf('root ::= "a" root | "b"'))


@settings(max_examples=300)
@given(
    st.text(
        st.sampled_from(
            ['"', "[", "]", "(", ")", "|", "*", "+", "?", "{", "}", ",", "^", "-", "\\"]
        )
        | st.sampled_from("ab0 \n\t#.:=<!\0é\ud800"),
        max_size=30,
    )
)
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever is given, it is a grammar or InvalidGrammar, whose place is within the text."""
    for given_text in (text, f"root ::= {text}", f'root ::= "a" {text}\nab ::= "b"'):
        error = refusal(compile_gbnf, given_text)
        if error is not None and error.line is not None:
            assert error.column is not None
            line = given_text.split("\n")[error.line - 1]
            assert 1 <= error.column <= len(line) + 1

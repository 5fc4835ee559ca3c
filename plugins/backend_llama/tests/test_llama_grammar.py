"""Grammars as llama.cpp follows them, and what it is never told."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from erllama_backend_llama import candidates
from erllama_backend_llama.constrained import ConstrainedLlamaSampler
from erllama_backend_llama.grammar import LlamaGrammar
from erllama_core.errors import EngineClosed, InvalidGrammar
from erllama_core.grammar.compile import compile_gbnf
from erllama_core.interfaces.backend import (
    ConstrainedSampler,
    Constrains,
    Constraint,
    Mark,
    SamplingParams,
    TellsLogits,
)
from erllama_core.interfaces.grammar import Element, Grammar, GrammarState

Bench = Callable[..., Any]
TOKENS = [(11 * index + 3) % 256 for index in range(40)]
NOTHING: frozenset[int] = frozenset()


JSON = r"""
root   ::= "{" ws (pair ("," ws pair)*)? "}"
pair   ::= string ":" ws value
value  ::= root | "[" ws (value ("," ws value)*)? "]" | string | number | "true" | "null"
string ::= "\"" ([^"\\\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)?
ws     ::= | " " | "\n" [ \t]{0,20}
"""
GRAMMARS = {
    "json": JSON,
    "several bytes": 'root ::= [ß-é☃\U0001f600-\U0001f602]{2,6} "é" .*',
    "alternatives": 'root ::= ("ab" | "abc" | "abcd" [x-z]+ | [^a-y] "!")+ | "ß"',
    "recursive": 'root ::= "(" root? ")" root? | [0-9]',
    "repeated": 'root ::= ("a"{2,4} "b"?){1,3} "c"{0,2}',
    "ends within": 'root ::= "a" "b"* "é"?',
}
PARAMS = {
    "greedy": SamplingParams(),
    "usual": SamplingParams(temperature=0.8, seed=3),
    "hot": SamplingParams(temperature=3.0, top_k=100, top_p=1.0, min_p=0.0, seed=4),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.4, seed=5),
    "greedy, penalties": SamplingParams(repetition_penalty=1.4),
    "rewarded": SamplingParams(temperature=1.0, repetition_penalty=0.8, seed=7),
    "no cut at all": SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=6),
}


def all_tokens(n_vocab: int) -> candidates.Candidates:
    return candidates.of_row(np.zeros(n_vocab, dtype=np.float32))


@pytest.mark.parametrize("name", GRAMMARS)
def test_llama_and_the_cores_own_walk_agree(bench: Bench, name: str) -> None:
    """At every place of many texts, the tokens that llama.cpp lets through are those that
    following the rules lets through; asked one by one, and all at once.
    """
    vocabulary = bench("llama", n_ctx=256).model.vocabulary
    grammar = compile_gbnf(GRAMMARS[name])
    rng = random.Random(name)
    for _ in range(12):
        native = LlamaGrammar(vocabulary, Constraint(grammar, NOTHING))
        state: GrammarState | None = grammar.begin()
        for _ in range(30):
            assert state is not None
            expected = {
                token
                for token in range(vocabulary.n_tokens)
                if (
                    state.may_end
                    if token in vocabulary.end_of_generation
                    else state.allows(vocabulary.piece(token))
                )
            }
            at_once = native.allowed(all_tokens(vocabulary.n_tokens))
            assert set(at_once["id"].tolist()) == expected
            assert {t for t in range(vocabulary.n_tokens) if native.allows(t)} == expected
            going_on = sorted(expected - vocabulary.end_of_generation)
            if not going_on:
                break
            token = rng.choice(going_on)
            native.accept(token)
            state = state.after(vocabulary.piece(token))
        native.close()


def test_it_has_the_abilities(bench: Bench) -> None:
    """The model makes constrained samplers, and its context tells logits."""
    b = bench("llama", n_ctx=256)
    abilities = isinstance(b.model, Constrains), isinstance(b.context, TellsLogits)
    assert abilities == (True, True)
    row = b.feed(0, TOKENS)
    for token in (0, 17, b.model.vocabulary.n_tokens - 1):
        assert b.context.logit(0, token) == pytest.approx(float(row[token]))
    sampler = b.model.new_constrained_sampler(
        SamplingParams(), b"", Constraint(compile_gbnf(JSON), NOTHING)
    )
    assert isinstance(sampler, ConstrainedSampler)
    sampler.close()


def ways_to_draw(b: Any, mark: Mark) -> list[Callable[[Any], int]]:
    """From the live row, and from the mark of it."""
    return [lambda s: int(b.context.sample(0, s)), lambda s: int(s.sample_mark(mark))]


def say(b: Any, sampler: Any, n_tokens: int, start: Mark | None) -> list[int]:
    """A reply, token by token, from sequence 0 as it stands; from stored logits at first."""
    said: list[int] = []
    ends = b.model.vocabulary.end_of_generation
    if start is not None:
        token = sampler.sample_mark(start)
        if token is None:
            token = b.context.sample(0, sampler)
        said.append(token)
    while len(said) < n_tokens and not (said and said[-1] in ends):
        if said:
            b.feed(0, [said[-1]])
        said.append(b.context.sample(0, sampler))
    return said


@pytest.mark.parametrize("name", PARAMS)
def test_stored_logits_draw_what_live_ones_do(bench: Bench, name: str) -> None:
    """A reply under a grammar is the same whether its first token comes from a mark, of any size
    that serves, or not; where the mark has too little that fits, the live row goes on from there.
    """
    b = bench("llama", n_ctx=512)
    params = PARAMS[name]
    constraint = Constraint(compile_gbnf(JSON), NOTHING)
    b.feed(0, TOKENS)
    marks = [b.context.mark(0, size) for size in (None, 280, 170, 101, 41, 5, 1)]
    replies, without = [], 0
    for mark in [None, *marks]:
        if mark is not None and not mark.serves(params):
            continue
        b.truncate(0, len(TOKENS) - 1)
        b.feed(0, TOKENS[-1:])
        sampler = b.model.new_constrained_sampler(params, b.pack(TOKENS), constraint)
        if mark is not None and not mark.is_whole:
            probe = b.model.new_constrained_sampler(params, b.pack(TOKENS), constraint)
            without += probe.sample_mark(mark) is None
            probe.close()
        replies.append((say(b, sampler, 24, mark), sampler.turned_down))
        sampler.close()
    assert all(reply == replies[0] for reply in replies[1:])
    assert replies[0][1] > 0
    if name == "greedy":
        assert without  # a mark of the largest logit alone cannot do
    text = b"".join(map(b.model.vocabulary.piece, replies[0][0]))
    fits = compile_gbnf(JSON).begin()
    ends = b.model.vocabulary.end_of_generation
    if replies[0][0][-1] not in ends:
        assert fits.allows(text)


@pytest.mark.parametrize("name", PARAMS)
def test_what_fits_is_drawn_as_without_a_grammar(bench: Bench, name: str) -> None:
    """A grammar that a draw fits changes no draw, and a second one goes on with the same seed."""
    b = bench("llama", n_ctx=512)
    b.feed(0, TOKENS)
    mark = b.context.mark(0, None)
    anything = Constraint(compile_gbnf("root ::= .*"), NOTHING)
    same = 0
    for seed in range(40):
        params = attrs.evolve(PARAMS[name], seed=seed)
        plain = b.model.new_sampler(params, b.pack(TOKENS))
        held = b.model.new_constrained_sampler(params, b.pack(TOKENS), anything)
        for sample in ways_to_draw(b, mark):
            token, other = sample(plain), sample(held)
            if held.turned_down:  # bytes that begin no character
                break
            assert other == token
            same += 1
        plain.close()
        held.close()
    assert same > 10 or name == "greedy"


def test_a_turned_down_token_counts_for_no_penalty(bench: Bench) -> None:
    """What did not come is not repeated when it comes."""
    b = bench("llama", n_ctx=256)
    row = b.feed(0, TOKENS[:1])
    for token in range(200):  # on to a place where the likeliest token of all is a letter
        if 97 <= int(row.argmax()) < 123:
            break
        row = b.feed(0, [token])
    best, other, third = sorted(range(97, 123), key=lambda token: -row[token])[:3]
    assert best == int(row.argmax())
    fits = f'root ::= "{chr(other)}" [{chr(best)}{chr(third)}]'
    params = SamplingParams(repetition_penalty=1e6)
    mark = b.context.mark(0, None)
    for sample in ways_to_draw(b, mark):
        sampler = b.model.new_constrained_sampler(
            params, b"", Constraint(compile_gbnf(fits), NOTHING)
        )
        assert [sample(sampler), sample(sampler)] == [other, best]
        sampler.close()


def test_a_whole_row_is_asked_only_where_a_draw_can_reach_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a token was turned down, the largest logits do if they hold all that can be drawn."""
    monkeypatch.setattr("erllama_backend_llama.constrained._FIRST_TRIED", 60)
    b = bench("llama", n_ctx=256)
    b.feed(0, TOKENS)
    asked: list[int] = []
    whole = LlamaGrammar.allowed

    def allowed(self: LlamaGrammar, tried: candidates.Candidates) -> candidates.Candidates:
        asked.append(tried.size)
        return whole(self, tried)

    monkeypatch.setattr(LlamaGrammar, "allowed", allowed)
    n_vocab = b.model.vocabulary.n_tokens

    def drawn(params: SamplingParams, text: str) -> tuple[int, list[int]]:
        asked.clear()
        sampler = b.model.new_constrained_sampler(
            params, b"", Constraint(compile_gbnf(text), NOTHING)
        )
        token = b.context.sample(0, sampler)
        sampler.close()
        return token, list(asked)

    row = b.whole_row(b.context.mark(0, None))
    order = np.argsort(-row, kind="stable")
    near = [chr(t) for t in order[1:60] if chr(t).isalnum() and t < 128]
    far = next(chr(t) for t in order[60:] if t < 128 and chr(t).isalnum())
    some = "".join(near)
    assert drawn(SamplingParams(), f"root ::= [{some}]")[1] == [60]
    assert drawn(SamplingParams(), f'root ::= "{far}"') == (ord(far), [60, n_vocab])
    hot = SamplingParams(temperature=2.0, top_k=0, seed=2)
    assert drawn(hot, f"root ::= [{some}]")[1] in ([], [n_vocab])
    few = attrs.evolve(hot, top_k=len(near))
    assert drawn(few, f"root ::= [{some}]")[1] in ([], [60])
    more = attrs.evolve(hot, top_k=len(near) + 1)
    assert drawn(more, f"root ::= [{some}]")[1] in ([], [60, n_vocab])


def test_excluded_tokens_never_come(bench: Bench) -> None:
    """A token that is excluded does not fit, alone or among others, whatever its spelling."""
    vocabulary = bench("llama", n_ctx=256).model.vocabulary
    spelt = {token: text for token, text in vocabulary.control_tokens.items() if text.isprintable()}
    token, text = next(
        (token, text)
        for token, text in spelt.items()
        if token not in vocabulary.end_of_generation and text and '"' not in text
    )
    grammar = compile_gbnf(f'root ::= "{text}"')
    for excluded, fits in ((frozenset(), True), (frozenset({token}), False)):
        native = LlamaGrammar(vocabulary, Constraint(grammar, excluded))
        assert native.allows(token) is fits
        ids = native.allowed(all_tokens(vocabulary.n_tokens))["id"]
        assert (token in ids) is fits
        assert ord(text[0]) in ids  # its spelling does
        native.close()


def test_no_token_that_fits_is_an_error(bench: Bench) -> None:
    """What the vocabulary cannot spell is told, and nothing is drawn."""
    b = bench("llama", n_ctx=256)
    b.feed(0, TOKENS)
    everything = (
        frozenset(range(b.model.vocabulary.n_tokens)) - b.model.vocabulary.end_of_generation
    )
    sampler = b.model.new_constrained_sampler(
        SamplingParams(), b"", Constraint(compile_gbnf('root ::= "a"'), everything)
    )
    with pytest.raises(InvalidGrammar, match="no token of the vocabulary fits"):
        b.context.sample(0, sampler)
    with pytest.raises(InvalidGrammar, match="no token of the vocabulary fits"):
        sampler.sample_mark(b.context.mark(0, None))
    sampler.close()


def test_what_llama_refuses_is_an_error(bench: Bench) -> None:
    """A text that the core never hands over does not end the process."""
    b = bench("llama", n_ctx=256)
    no_elements: tuple[Element, ...] = ()
    for text in ("", "root ::= root", "other ::= [a]"):
        grammar = Grammar(text, no_elements, (), 0)
        with pytest.raises(InvalidGrammar, match=r"llama\.cpp refuses"):
            b.model.new_constrained_sampler(SamplingParams(), b"", Constraint(grammar, NOTHING))


def test_a_grammar_that_takes_too_long_ends_its_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check did not foresee is noticed by the time that a token takes."""
    monkeypatch.setattr("erllama_backend_llama.grammar._MOST_SECONDS", 0.0)
    vocabulary = bench("llama", n_ctx=256).model.vocabulary
    native = LlamaGrammar(vocabulary, Constraint(compile_gbnf(JSON), NOTHING))
    with pytest.raises(InvalidGrammar, match="too ambiguous"):
        native.allows(ord("{"))
    native.close()


def test_a_closed_sampler_is_not_used(bench: Bench) -> None:
    """After close, which may come twice, drawing raises; other samplers are unharmed."""
    b = bench("llama", n_ctx=256)
    b.feed(0, TOKENS)
    constraint = Constraint(compile_gbnf(JSON), NOTHING)
    sampler, other = (
        b.model.new_constrained_sampler(SamplingParams(), b"", constraint) for _ in range(2)
    )
    assert isinstance(sampler, ConstrainedLlamaSampler)
    sampler.close()
    sampler.close()
    with pytest.raises(EngineClosed):
        b.context.sample(0, sampler)
    assert b.context.sample(0, other) == ord("{")
    other.close()
    b.model.close()
    with pytest.raises(EngineClosed):
        b.model.new_constrained_sampler(SamplingParams(), b"", constraint)

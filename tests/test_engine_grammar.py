"""Requests under a grammar or a JSON schema, and log-probabilities, on the stub."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from erllama_backend_stub import VOCABULARY, StubVocabulary
from erllama_core import Done, Engine, Model, TextDelta, ThinkingDelta, ThinkingEnd, ToolCallEnd
from erllama_core.cache import space as cache_space
from erllama_core.errors import InvalidGrammar, NotSupported
from erllama_core.grammar.compile import compile_gbnf
from erllama_core.results import TokenLogprob
from grammars import matches
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3
DIGITS = 'root ::= "{" [0-9]{4} "}"'
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
}
WILD: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


# ------------------------------------------------------------------ the reply


def test_pattern_8_a_grammar_shapes_the_reply(engine: Engine) -> None:
    """The reply is a text of the grammar and ends when that does, streamed or not."""
    model = load_stub(engine)
    grammar = 'root ::= "{" ws "\\"n\\":" ws digit "}"\ndigit ::= [0-9]\nws ::= [ \\t\\n]*'
    options: dict[str, Any] = {"grammar": grammar, "response_tokens": 64, "temperature": 0.5}
    done = model.complete("Reply with JSON:", **options)
    assert done.finish_reason == "stop"
    assert set(json.loads(done.reply)) == {"n"}
    stream = model.infer("Reply with JSON:", **options)
    *deltas, end = stream
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == done.reply
    assert isinstance(end, Done)
    assert end.stats.grammar_rejections == done.stats.grammar_rejections > 0


@pytest.mark.parametrize("kv_class", KV_CLASSES)
@pytest.mark.parametrize("seed", range(4))
def test_a_schema_shapes_the_reply(engine: Engine, kv_class: str, seed: int) -> None:
    """The reply is JSON that is valid by the schema, whatever is drawn; given as text as well."""
    model = load_stub(engine, kv_class=kv_class)
    done = model.complete(PROMPT, json_schema=SCHEMA, seed=seed, **WILD)
    found = json.loads(done.reply)
    assert set(found) == {"name", "age"}
    assert 1 <= len(found["name"]) <= 8
    assert 0 <= found["age"] <= 99
    assert done.finish_reason == "stop"
    again = model.complete(PROMPT, json_schema=json.dumps(SCHEMA), seed=seed, **WILD)
    assert again.reply == done.reply


def test_a_reply_that_is_cut_off_is_the_beginning_of_one(engine: Engine) -> None:
    """response_tokens and stop sequences end a reply under a grammar as any other."""
    model = load_stub(engine)
    done = model.complete(PROMPT, grammar=DIGITS, response_tokens=3)
    assert (done.finish_reason, len(done.reply)) == ("length", 3)
    done = model.complete(PROMPT, grammar='root ::= "abc" "def"*', stop_sequences=["cd"])
    assert (done.reply, done.stop_sequence) == ("ab", "cd")


def test_a_model_that_wants_to_end_goes_on(engine: Engine) -> None:
    """The end of generation fits only where the text is whole; the script's does not before."""
    model = engine.load_model(backend="stub", model_opts={"script": ["12"]})
    prompt = model.apply_chat_template([{"role": "user", "content": "a number"}])
    assert model.complete(prompt).reply == "12"
    done = model.complete(prompt, grammar="root ::= [0-9]{5}")
    assert done.reply.startswith("12")
    assert len(done.reply) == 5
    done = model.complete(prompt, grammar="root ::= [0-9]+")
    assert (done.reply, done.finish_reason) == ("12", "stop")
    assert done.stats.grammar_rejections == 0


def test_what_comes_in_several_bytes(engine: Engine) -> None:
    """A character of several tokens is one character of the grammar."""
    model = load_stub(engine)
    done = model.complete(PROMPT, grammar='root ::= [é☃]{3} "\U0001f600"', **WILD)
    assert set(done.reply[:3]) <= set("é☃")
    assert done.reply[3:] == "\U0001f600"
    assert len(done.generated) == len(done.reply.encode())


# ------------------------------------------------------------------- mistakes


def test_mistakes_raise_from_the_call(engine: Engine) -> None:
    """A wrong grammar or schema, or both, never reach the worker."""
    model = load_stub(engine)
    for call in (model.complete, model.infer):
        with pytest.raises(InvalidGrammar, match="'nix' is not defined") as caught:
            call(PROMPT, grammar='root ::= "a" nix')
        assert isinstance(caught.value, ValueError)
    with pytest.raises(InvalidGrammar, match="#/properties/a/type") as caught:
        model.infer(PROMPT, json_schema={"properties": {"a": {"type": "integr"}}})
    assert caught.value.path == "#/properties/a/type"
    with pytest.raises(ValueError, match="one of them only"):
        model.complete(PROMPT, grammar=DIGITS, json_schema={})
    with pytest.raises(TypeError, match="grammar=3"):
        model.complete(PROMPT, grammar=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="json_schema"):
        model.complete(PROMPT, json_schema=[])  # type: ignore[arg-type]
    for wrong, kind in ((-1, ValueError), (101, ValueError), ("2", TypeError), (1.0, TypeError)):
        with pytest.raises(kind, match="logprobs"):
            model.complete(PROMPT, logprobs=wrong)  # type: ignore[arg-type]
    assert model.queue_depth() == 0


def test_a_backend_without_grammars_says_so(engine: Engine) -> None:
    """A grammar is an ability that a backend may lack; so are log-probabilities."""
    model = load_stub(engine)
    bare: Any = SimpleNamespace(new_sampler=None, vocabulary=VOCABULARY)
    hidden: Any = model
    hidden._backend = bare
    with pytest.raises(NotSupported, match="'stub' has no grammars"):
        model.complete([65], grammar=DIGITS)
    hidden._parts = attrs.evolve(hidden._parts, context=bare)
    with pytest.raises(NotSupported, match="log-probabilities"):
        model.complete([65], logprobs=True)


def test_a_grammar_that_no_token_fits_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a vocabulary cannot spell what has to come, the request fails, and others go on."""
    whole = StubVocabulary.piece
    monkeypatch.setattr(
        StubVocabulary, "piece", lambda self, token: b"a" if token == 98 else whole(self, token)
    )
    model = load_stub(engine)
    other = model.infer(PROMPT, response_tokens=40)
    stream = model.infer(PROMPT, grammar='root ::= "ab"')
    with pytest.raises(InvalidGrammar, match="no token of the vocabulary fits"):
        list(stream)
    assert len(other.result().generated) == 40
    assert model.complete(PROMPT, grammar='root ::= "ac"').reply == "ac"


# ---------------------------------------------------- the same in every company


LONG = 'root ::= ([a-z]{20} "-"){6} [0-9]{30}'


def replies(model: Model, prompts: list[str], *, together: bool) -> list[tuple[str, int]]:
    options = [
        {"grammar": LONG, "seed": number, **WILD} | ({"top_k": 0} if number % 3 == 2 else {})
        for number in range(len(prompts))
    ]
    if together:
        streams = [model.infer(p, **o) for p, o in zip(prompts, options, strict=True)]
        done = [stream.result() for stream in streams]
    else:
        done = [model.complete(p, **o) for p, o in zip(prompts, options, strict=True)]
    return [(d.reply, d.stats.grammar_rejections) for d in done]


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_alone_together_and_preempted_it_is_the_same(kv_class: str) -> None:
    """A reply under a grammar does not depend on what else runs, or on losing its cells."""
    prompts = [f"{number} is the number" for number in range(4)]
    with make_engine() as engine:
        alone = load_stub(engine, "alone", kv_class=kv_class, weights="w")
        expected = replies(alone, prompts, together=False)
        assert len({reply for reply, _ in expected}) == len(prompts)
        crowded = load_stub(
            engine,
            "crowded",
            kv_class=kv_class,
            weights="w",
            tier=[],
            context_opts={"n_ctx": 300, "n_seq_max": 4},
        )
        assert replies(crowded, prompts, together=True) == expected
        assert crowded.info().preemptions > 0


# Sizes of marks with every reach; contexts that cannot be cut keep all logits whatever the size.
@pytest.mark.parametrize(
    ("kv_class", "mark_size", "top_k"),
    [
        (kv_class, mark_size, top_k)
        for kv_class in KV_CLASSES
        for mark_size in ((1024, 70, 21) if kv_class == "span" else (21,))
        for top_k in (0, 1, 20)
    ],
)
def test_stored_logits_draw_what_live_ones_do(
    monkeypatch: pytest.MonkeyPatch, kv_class: str, mark_size: int, top_k: int
) -> None:
    """A reply that begins with stored logits is the one that begins with a forward pass, also
    where the grammar turns down all that the stored ones hold; then one token is computed.
    """
    monkeypatch.setattr(cache_space, "MARK_SIZE", mark_size)
    for penalty, seed in itertools.product((1.0, 1.4), range(2)):
        options: dict[str, Any] = {
            "json_schema": SCHEMA,
            "temperature": 2.0,
            "top_k": top_k,
            "repetition_penalty": penalty,
            "seed": seed,
            "logprobs": 2,
        }
        with make_engine() as engine:
            model = load_stub(engine, kv_class=kv_class)
            cold = model.complete(PROMPT, **options)
            assert cold.cache_hit_kind == "cold"
            model.prefill_only(PROMPT)
            model.settle()
            warm = model.complete(PROMPT, **options)
            assert warm.generated == cold.generated
            assert warm.logprobs == cold.logprobs
            assert warm.stats.grammar_rejections == cold.stats.grammar_rejections
            n_prompt = warm.stats.prompt_tokens
            reach = None if not top_k else top_k + (64 if penalty != 1.0 else 0)
            if kv_class != "span" or mark_size == 1024:
                assert (warm.cache_hit_kind, warm.cache_delta.read) == ("exact", n_prompt)
            elif reach is None or reach >= mark_size:
                # The stored logits may not do: all but the last token are reused then.
                assert warm.cache_delta.read >= n_prompt - 1


def test_a_mark_with_too_little_that_fits_leaves_one_token_to_compute(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to come first is not among the stored logits: read and created say so."""
    monkeypatch.setattr(cache_space, "MARK_SIZE", 8)
    model = load_stub(engine)
    model.prefill_only(PROMPT)
    model.settle()
    n_prompt = len(model.tokenize(PROMPT))
    hits = engine.cache.counters().hits_exact
    plain = model.complete(PROMPT, response_tokens=1)
    assert (plain.cache_hit_kind, plain.cache_delta.read) == ("exact", n_prompt)
    done = model.complete(PROMPT, grammar='root ::= "\\n" "x"', logprobs=3)
    assert done.reply == "\nx"
    assert (done.cache_hit_kind, done.cache_delta.read) == ("partial", n_prompt - 1)
    assert done.committed_tokens == n_prompt + 2
    assert engine.cache.counters().hits_exact == hits + 1
    session = model.complete(PROMPT, grammar='root ::= "\\n" "x"', session_id=1)
    assert session.generated == done.generated


def test_other_tokens_of_the_same_text_keep_the_grammar(engine: Engine) -> None:
    """A prompt that goes on with a stored reply's own tokens is still held to its grammar."""
    model = load_stub(engine, digraphs=True, script=["the thing in the well"])
    first = model.apply_chat_template([{"role": "user", "content": "what is it?"}])
    said = model.complete(first, session_id=None).reply
    model.settle()
    second = model.apply_chat_template(
        [
            {"role": "user", "content": "what is it?"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "a number"},
        ]
    )
    done = model.complete(second, grammar=DIGITS, repetition_penalty=1.2)
    assert done.stats.prompt_tokens > len(second)  # it was respelt, letter by letter
    assert matches(compile_gbnf(DIGITS), done.reply)


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    """The same seed gives the same reply under a grammar, another one another."""
    model = load_stub(engine)
    texts = [
        model.complete(PROMPT, grammar="root ::= [a-z]{20}", temperature=1.0, seed=seed).reply
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_penalties_count_what_came_and_not_what_was_turned_down(engine: Engine) -> None:
    """A token that the grammar turned down is no repetition when it comes next."""
    model = load_stub(engine)
    tried = 0
    for prompt in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        turned_down = model.complete(prompt, response_tokens=1).reply
        if turned_down in prompt + '1~"\\]^-':
            continue
        options: dict[str, Any] = {"grammar": f'root ::= "1" [{turned_down}~]'}
        plain = model.complete(prompt, **options)
        assert plain.stats.grammar_rejections >= 1
        if plain.reply == "1" + turned_down:  # else a penalty would change nothing
            tried += 1
            assert model.complete(prompt, repetition_penalty=1e9, **options).reply == plain.reply
    assert tried > 1


# -------------------------------------------------------------- other callers


def test_sessions_and_coroutines_take_grammars(engine: Engine) -> None:
    """continue_session and the awaitable calls have the same options."""
    model = load_stub(engine)
    model.complete(PROMPT, session_id="s", response_tokens=8)
    stream = model.continue_session(
        model.tokenize("more"), session_id="s", grammar=DIGITS, logprobs=True
    )
    done = stream.result()
    assert matches(compile_gbnf(DIGITS), done.reply)
    assert done.logprobs is not None

    async def run() -> str:
        reply = await engine.aio.complete(model, PROMPT, json_schema=SCHEMA)
        with pytest.raises(InvalidGrammar):
            await engine.aio.infer(model, PROMPT, grammar="nonsense")
        return reply.reply

    assert set(json.loads(asyncio.run(run()))) == {"name", "age"}


# ----------------------------------------------- thinking, calls, control tokens

TAGS: dict[str, Any] = {
    "thinking_markers": {"start": "<think>", "end": "</think>"},
    "tool_call_markers": {"start": "<tool_call>", "end": "</tool_call>"},
}
BOTH = r"""
root ::= "<think>" [a-z]{3,6} "</think>" text "<tool_call>{\"n\": " [0-9]{2} "}</tool_call>"
text ::= [A-Z]{2}
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_grammar_forces_thinking_and_calls(engine: Engine, seed: int) -> None:
    """Markers that a grammar asks for are markers, and their contents what it says."""
    model = engine.load_model(backend="stub", model_opts={}, **TAGS)
    stream = model.infer(PROMPT, grammar=BOTH, thinking=True, temperature=1.0, seed=seed)
    done = stream.result()
    assert done.thinking.islower()
    assert 3 <= len(done.thinking) <= 6
    assert done.reply.isupper()
    assert len(done.reply) == 2
    (call,) = done.tool_calls
    assert 10 <= json.loads(call)["n"] + 10 < 110


def test_a_call_under_a_grammar_is_drawn_with_the_requests_sampler(engine: Engine) -> None:
    """A grammar governs every token, and the greedy syntax of tool calls is off."""
    model = engine.load_model(backend="stub", model_opts={}, **TAGS)

    def call(seed: int) -> bytes:
        grammar = 'root ::= "<tool_call>" [a-z]{12} "</tool_call>"'
        done = model.complete(PROMPT, grammar=grammar, temperature=1.0, seed=seed)
        return done.tool_calls[0]

    assert call(1) == call(1) != call(2)


def test_control_tokens_do_not_pass_for_text(engine: Engine) -> None:
    """A control token that is no part of the reply's text does not fit where its spelling does."""
    model = engine.load_model(backend="stub", model_opts={"script": ["<think><|im_start|>"]})
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    grammar = 'root ::= "<think>" "<|im_start|>" "x"'
    assert model.complete(prompt).reply == ""  # control tokens are silent
    done = model.complete(prompt, grammar=grammar)
    assert done.reply == "<think><|im_start|>x"
    assert len(done.generated) == len(done.reply)
    # Where it is a marker of the request, the token itself is as good as its spelling.
    thinker = engine.load_model(backend="stub", model_opts={"script": ["<think>y"]}, **TAGS)
    stream = thinker.infer(prompt, grammar='root ::= "<think>y</think>"', thinking=True)
    events = list(stream)
    assert [type(event) for event in events[:-1]] == [ThinkingDelta, ThinkingEnd]
    assert isinstance(events[-1], Done)
    assert events[-1].stats.completion_tokens < len("<think>y</think>")
    assert not any(isinstance(event, ToolCallEnd) for event in events)


# ----------------------------------------------------------------- probabilities


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    """Each token has its own and the most likely ones', whatever was done to draw it."""
    model = load_stub(engine)
    done = model.complete(PROMPT, response_tokens=6, temperature=3.0, seed=4, logprobs=3)
    assert done.logprobs is not None
    assert done.logprobs == done.stats.logprobs
    assert [entry.token for entry in done.logprobs] == list(done.generated)
    assert b"".join(entry.data for entry in done.logprobs).decode() == done.reply
    for entry in done.logprobs:
        assert len(entry.top) == 3
        values = [other.logprob for other in entry.top]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] < 0
        assert all(not other.top for other in entry.top)
        same = [other.logprob for other in entry.top if other.token == entry.token]
        assert same in ([], [entry.logprob])
    whole = model.complete(PROMPT, response_tokens=1, logprobs=100)
    assert whole.logprobs is not None
    total = sum(math.exp(other.logprob) for other in whole.logprobs[0].top)
    assert total == pytest.approx(1.0, abs=1e-3)  # 95 printable tokens have nearly all of it


def test_log_probabilities_come_before_their_text_in_a_stream(engine: Engine) -> None:
    """A stream has an event for each token; without logprobs it has none."""
    model = load_stub(engine)
    events = list(model.infer(PROMPT, response_tokens=3, logprobs=True))
    kinds = [type(event) for event in events]
    assert kinds == [TokenLogprob, TextDelta] * 3 + [Done]
    assert all(not event.top for event in events if isinstance(event, TokenLogprob))
    for none in (None, False):
        plain = model.complete(PROMPT, response_tokens=3, logprobs=none)
        assert plain.logprobs is None


def test_a_token_of_a_grammar_has_the_models_probability(engine: Engine) -> None:
    """What a grammar forces may be unlikely; the log-probability tells."""
    model = load_stub(engine)
    done = model.complete(PROMPT, grammar='root ::= "\\n"', logprobs=1)
    assert done.logprobs is not None
    (entry,) = done.logprobs
    assert entry.data == b"\n"
    assert entry.logprob < -400 < -10 < entry.top[0].logprob

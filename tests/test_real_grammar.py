"""Grammars, schemas and log-probabilities on a real model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from erllama_core import Engine, Model, TextDelta, ThinkingDelta, ThinkingEnd, ToolCallEnd
from erllama_core.grammar.compile import compile_gbnf
from erllama_core.interfaces.stream import ToolCallDelta
from grammars import matches
from stub_engine import make_engine
from tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.real_model

TAGS: dict[str, Any] = {
    "thinking_markers": {"start": "<think>", "end": "</think>"},
    "tool_call_markers": {"start": "<tool_call>", "end": "</tool_call>"},
}
SHORT = {"type": "string", "maxLength": 8}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0,
     "maximum": 120}}, "required": ["name", "age"], "additionalProperties": False},
    {"enum": ["red", "green", "blue", None, 7]},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 1,
     "maxItems": 4},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"why": SHORT},
     "required": ["why"]}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
     "n": {"type": "integer", "minimum": 0, "maximum": 9},
     "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}}, "required": ["n", "left"]},
     "leaf": {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}}},
    {"prefixItems": [SHORT, {"type": "boolean"}], "minItems": 2},
    {"type": "string", "format": "date"},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
     "required": ["b"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(demo_model_path: Path) -> Iterator[Model]:
    with make_engine() as engine:
        yield load(engine, demo_model_path)


def load(engine: Engine, path: Path) -> Model:
    return engine.load_model(
        backend="llama",
        model_path=str(path),
        # One thread: on a machine that is busy, llama.cpp's threads wait for one another.
        context_opts={"n_ctx": 4096, "n_seq_max": 8, "n_threads": 1},
        policy={"min_tokens": 8, "cold_min_tokens": 8},
        **TAGS,
    )


def test_a_hundred_replies_under_schemas_are_valid(model: Model) -> None:
    """JSON under a schema parses and is valid, a hundred times of a hundred."""
    prompts = [
        model.apply_chat_template(
            [{"role": "user", "content": f"Give me some JSON by this schema: {json.dumps(schema)}"}]
        )
        for schema in SCHEMAS
    ]
    streams = [
        (schema, model.infer(prompt, json_schema=schema, seed=seed, temperature=1.2, top_p=1.0))
        for seed in range(10)
        for schema, prompt in zip(SCHEMAS, prompts, strict=True)
    ]
    assert len(streams) == 100
    for schema, stream in streams:
        done = stream.result()
        assert done.finish_reason == "stop", done.reply
        value = json.loads(done.reply)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


BOTH = r"""
root  ::= "<think>" words "</think>" words "<tool_call>" call "</tool_call>" " Done."
words ::= (" "? [a-z]+){1,4} "."
call  ::= "{\"name\": \"" ("look" | "ask") "\", \"n\": " [1-9] [0-9]? "}"
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_forced_thinking_and_calls_make_their_events(model: Model, seed: int | None) -> None:
    """Markers that a grammar forces, of several ordinary tokens each, meet the processors."""
    prompt = model.apply_chat_template([{"role": "user", "content": "Look around, then tell me."}])
    for marker in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert len(model.tokenize(marker, add_bos=False)) > 1
    options: dict[str, Any] = {"grammar": BOTH, "thinking": True, "response_tokens": 120}
    if seed is not None:
        options |= {"seed": seed, "temperature": 1.0}
    stream = model.infer(prompt, **options)
    *events, _ = stream
    kinds = [kind for kind, _ in itertools.groupby(type(event) for event in events)]
    assert kinds == [ThinkingDelta, ThinkingEnd, TextDelta, ToolCallDelta, ToolCallEnd, TextDelta]
    done = stream.result()
    assert done.finish_reason == "stop"
    assert "<" not in done.thinking + done.reply
    assert done.reply.endswith(". Done.")
    (call,) = done.tool_calls
    assert json.loads(call)["name"] in {"look", "ask"}
    text = model.detokenize(done.generated)
    assert matches(compile_gbnf(BOTH), text)
    spoken = done.reply.removesuffix(" Done.")
    assert text == (
        f"<think>{done.thinking}</think>{spoken}<tool_call>{call.decode()}</tool_call> Done."
    )
    # Where nobody looks for thinking, its markers are the reply's.
    plain = model.complete(prompt, **{**options, "thinking": False})
    assert plain.reply.startswith("<think>")


@pytest.mark.parametrize("tags", ["control", "user"])
def test_forced_markers_that_are_single_tokens(
    tmp_path: Path, tags: Literal["control", "user"]
) -> None:
    """The same where the vocabulary has each marker as one token, control token or not."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", tags=tags)
    grammar = r'root ::= "<think>" [a-z]{2} "</think>" [A-Z]{2} "<tool_call>" [0-9] "</tool_call>"'
    singles = 0
    with make_engine() as engine:
        model = load(engine, path)
        markers = [model.tokenize(f"<{name}>", add_bos=False) for name in ("think", "/think")]
        assert [len(tokens) for tokens in markers] == [1, 1]
        for seed in range(12):
            done = model.complete(
                "a prompt", grammar=grammar, thinking=True, temperature=2.0, top_k=0, seed=seed
            )
            assert (len(done.thinking), done.thinking.islower()) == (2, True)
            assert (len(done.reply), done.reply.isupper()) == (2, True)
            (call,) = done.tool_calls
            assert call.isdigit()
            singles += markers[0][0] in done.generated
            # The tokens have no text for a request that looks for no thinking.
            plain = model.complete("a prompt", grammar=grammar, temperature=2.0, top_k=0, seed=seed)
            assert plain.reply.startswith("<think>")
    assert singles


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 3, "top_k": 0},
        {"temperature": 1.0, "seed": 3, "top_k": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "text", ['root ::= "{" .*', 'root ::= "\\U0001f600" .*', "root ::= [a-z ]+"]
)
def test_stored_logits_draw_what_computed_ones_do(
    demo_model_path: Path, options: dict[str, Any], text: str
) -> None:
    """The first token under a grammar, and its log-probability, are the same from the cache.

    What is unlikely is not among the logits that are stored: then one token is computed.
    """
    options = {**options, "grammar": text, "response_tokens": 1, "logprobs": 3}
    prompt = "The weather in Paris is usually mild, but in winter it can be quite"
    with make_engine() as engine:
        model = engine.load_model(
            backend="llama",
            model_path=str(demo_model_path),
            # Without flash attention a token computed alone has the logits that it has in a batch.
            context_opts={"n_ctx": 512, "flash_attn": False, "resident_cells_max": 0},
            policy={"min_tokens": 8, "cold_min_tokens": 8},
        )
        cold = model.complete(prompt, cache_salt="another", **options)
        model.prefill_only(prompt)
        model.settle()
        warm = model.complete(prompt, **options)
        assert warm.generated == cold.generated
        assert warm.logprobs is not None
        assert cold.logprobs is not None
        assert warm.logprobs[0].token == cold.logprobs[0].token
        assert warm.logprobs[0].logprob == pytest.approx(cold.logprobs[0].logprob, abs=1e-3)
        assert warm.stats.grammar_rejections == cold.stats.grammar_rejections
        n_prompt = warm.stats.prompt_tokens
        assert warm.cache_delta.read >= n_prompt - 1
        if text == "root ::= [a-z ]+" and options.get("top_k", 40) == 40:
            assert warm.cache_delta.read == n_prompt


def test_log_probabilities_add_up(model: Model) -> None:
    """They are logarithms of probabilities; a greedy reply has the likeliest token each time."""
    prompt = model.apply_chat_template([{"role": "user", "content": "Say hello."}])
    done = model.complete(prompt, response_tokens=8, logprobs=5)
    assert done.logprobs is not None
    for entry in done.logprobs:
        assert entry.top[0].token == entry.token
        assert entry.top[0].logprob == pytest.approx(entry.logprob, abs=1e-6)
        values = [other.logprob for other in entry.top]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in values)

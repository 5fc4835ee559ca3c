"""Chats of ten turns, rendered anew each turn: all of the turn before is found again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from erllama_core import Completion, Model
from stub_engine import make_engine
from tiny_gguf import ARCHS, Arch, write_tiny_gguf

TURNS = 10
WILD: dict[str, Any] = {"temperature": 2.0, "top_k": 400, "top_p": 1.0, "min_p": 0.0}
"""Sampling that spells words in tokens no tokeniser would choose."""
QUESTIONS = ["Tell me of the sea.", "Why?", "And the well-known lighthouse, 1849?", "¿Qué más?"]
GRAMMAR = r"""
root ::= "<think>" word{2,4} "</think>" word{1,4} call{0,2}
word ::= [A-Za-z]{2,7} [ ,.]
call ::= "<tool_call>" " "{0,1} "{\"name\" :\"look\", \"at\":\"" [a-z]{3,6} "\"}" "</tool_call>"
"""
"""A reply that thinks, says something and may call, spaced as no template would."""
ASCII = "root ::= [ -~]+"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def chat(model: Model, *, replay: bool, tools: Any = None, **options: Any) -> list[Completion]:
    """Ten turns as a front end has them: the text of a reply, and ids for its tool calls."""
    messages: list[dict[str, Any]] = []
    said = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        prompt = model.apply_chat_template(messages, tools=tools)
        done = model.complete(prompt, seed=turn, thinking=True, **options)
        message: dict[str, Any] = {"role": "assistant", "content": done.reply}
        calls = [
            {
                "id": f"call_{turn}_{number}" if replay else "nobody's",
                "type": "function",
                "function": {"name": "look", "arguments": call.decode("utf-8", "replace")},
            }
            for number, call in enumerate(done.tool_calls)
        ]
        if calls:
            message["tool_calls"] = calls
        if replay:
            ids = [f"turn_{turn}", *(str(call["id"]) for call in calls)]
            assert model.put_replay(ids, done)
            if not calls:  # OpenAI's messages have no other place for an id
                message["replay"] = f"turn_{turn}"
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": "a hill"} for call in calls
        ]
        said.append(done)
    return said


def shares(said: list[Completion]) -> list[float]:
    """For each turn but the first, how much of the turn before it reused."""
    return [
        now.cache_delta.read / before.committed_tokens for before, now in itertools.pairwise(said)
    ]


def tiny(
    tmp_path: Path,
    engine: Any,
    arch: Arch,
    says: Any,
    tags: Any = "control",
    *,
    unified: bool = True,
    markers: bool = True,
) -> Model:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", arch, says=says, tags=tags)
    marked: dict[str, Any] = {
        "thinking_markers": {"start": "<think>", "end": "</think>"},
        "tool_call_markers": {"start": "<tool_call>", "end": "</tool_call>"},
    }
    loaded: Model = engine.load_model(
        model_path=str(path),
        context_opts={
            "n_ctx": 2048,
            "n_threads": 1,
            "resident_cells_max": 0,
            "kv_unified": unified,
        },
        policy={"min_tokens": 0, "cold_min_tokens": 0},
        **(marked if markers else {}),
    )
    return loaded


@pytest.mark.parametrize("arch", ARCHS)
def test_ten_turns_of_a_tiny_model(arch: Arch, tmp_path: Path) -> None:
    """Replies of any printable characters, by their text alone."""
    with make_engine() as engine:
        model = tiny(tmp_path, engine, arch, "text")
        said = chat(model, replay=False, response_tokens=40, temperature=1.5)
        assert min(shares(said)) >= 0.98
        assert len({done.reply for done in said}) == TURNS


@pytest.mark.parametrize("cells", ["unified", "separate"])
@pytest.mark.parametrize("arch", ["qwen35", "lfm2", "mamba", "gemma3"])
def test_ten_turns_that_a_grammar_keeps_to_ascii(arch: Arch, cells: str, tmp_path: Path) -> None:
    """Weights that would say anything are turned down, token by token, for about half a token
    more each: of every turn all that the one before had committed is read again. Markers are
    ASCII too, and a reply without them would be rendered otherwise; here there are none.
    """
    with make_engine() as engine:
        model = tiny(tmp_path, engine, arch, "anything", unified=cells == "unified", markers=False)
        options: dict[str, Any] = {"grammar": ASCII, "response_tokens": 40, "temperature": 1.0}
        said = chat(model, replay=False, **options)
        ratios = shares(said)
        turned_down = sum(done.stats.grammar_rejections for done in said)
        drawn = sum(len(done.generated) for done in said)
        assert min(ratios) >= 0.95, ratios
        assert all(done.cache_hit_kind == "partial" for done in said[1:])
        assert all(done.reply.isascii() and done.reply.isprintable() for done in said)
        assert turned_down > drawn // 4, "the weights say ASCII by themselves, so it shows little"
        assert len({done.reply for done in said}) == TURNS
        assert engine.cache.counters().state_rejected == 0


@pytest.mark.parametrize("tags", ["control", "user"])
@pytest.mark.parametrize("arch", ARCHS)
def test_ten_turns_with_thinking_and_tools(arch: Arch, tags: str, tmp_path: Path) -> None:
    """With markers that are single tokens, control tokens or not, anywhere in the replies: kept
    turns are found again to the last token, which what a template makes of them is not.
    """
    with make_engine() as engine:
        model = tiny(tmp_path, engine, arch, "tags", tags)
        options: dict[str, Any] = {"response_tokens": 60, "temperature": 1.5, "tools": TOOLS}
        said = chat(model, replay=True, **options)
        assert min(shares(said)) >= 0.98
        assert any(done.thinking for done in said), "no reply thinks, so this shows little"
        assert any(done.tool_calls for done in said), "no reply calls, so this shows little"
        assert min(shares(chat(model, replay=False, cache_salt="other", **options))) < 0.9


@pytest.mark.real_model
def test_ten_turns_of_a_real_chat_with_thinking_and_tools(demo_model_path: Path) -> None:
    """The same with real tokens, of which a marker is a part, or several."""
    with make_engine() as engine:
        model = engine.load_model(
            model_path=str(demo_model_path),
            context_opts={"n_ctx": 2048, "n_threads": 1, "resident_cells_max": 0},
            policy={"min_tokens": 0, "cold_min_tokens": 0},
            # What any reply has in it.
            thinking_markers={"start": " t", "end": "e "},
            tool_call_markers={"start": "a", "end": "i"},
        )
        said = chat(model, replay=True, response_tokens=24, **WILD)
        assert min(shares(said)) >= 0.98
        assert any(done.thinking for done in said)
        assert any(done.tool_calls for done in said)
        assert (
            min(shares(chat(model, replay=False, cache_salt="b", response_tokens=24, **WILD))) < 0.9
        )


@pytest.mark.real_model
def test_ten_turns_of_a_real_chat_under_a_grammar(demo_model_path: Path) -> None:
    """The same where a grammar has a real model think and call, in markers of several tokens."""
    with make_engine() as engine:
        model = engine.load_model(
            model_path=str(demo_model_path),
            context_opts={"n_ctx": 2048, "n_threads": 1, "resident_cells_max": 0},
            policy={"min_tokens": 0, "cold_min_tokens": 0},
            thinking_markers={"start": "<think>", "end": "</think>"},
            tool_call_markers={"start": "<tool_call>", "end": "</tool_call>"},
        )
        assert len(model.tokenize("<tool_call>")) > 1
        options: dict[str, Any] = {"grammar": GRAMMAR, "temperature": 1.0, "tools": TOOLS}
        said = chat(model, replay=True, **options)
        assert min(shares(said)) >= 0.98
        assert all(done.thinking for done in said)
        assert sum(len(done.tool_calls) for done in said) >= TURNS // 2
        assert min(shares(chat(model, replay=False, cache_salt="b", **options))) < 0.9

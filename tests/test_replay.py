"""Turns that are kept under an id and come back to the letter."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_core import Completion, Engine, Model, Prompt, Replay
from erllama_core.errors import CacheError, CorruptBlock, EngineClosed, InvalidPrompt
from erllama_core.interfaces.block import ObjectId
from erllama_core.model import replay as replay_module
from erllama_tier_disk.store import FileTier
from held_tier import HeldTier, engine_with
from stub_engine import make_engine

THINK = {"start": "<think>", "end": "</think>"}
CALL = {"start": "<tool_call>", "end": "</tool_call>"}
SAID = 'So.<tool_call>{"name" :"look", "arguments":{ }}</tool_call> <tool_call>two</tool_call>'
THOUGHT = "<think>\nhm,  hm</think>" + SAID

TEMPLATE = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.content is string -%}
    {{- m.content.split('</think>')[-1] | trim -}}
{%- elif m.content is iterable -%}
    {%- for part in m.content if part.text -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
    {{- '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""Drops thinking and writes tool calls in its own way, as templates do."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def speaking(engine: Engine, *script: str, template: str = TEMPLATE, **options: Any) -> Model:
    return engine.load_model(
        backend="stub",
        tier=options.pop("tier", ["ram"]),
        context_opts={"n_ctx": 4096, "n_seq_max": 2, "resident_cells_max": 0},
        policy={"boundary_align_tokens": 32, "min_tokens": 0, "cold_min_tokens": 0},
        chat_template=template,
        thinking_markers=THINK,
        tool_call_markers=CALL,
        model_opts={"script": list(script), **options.pop("model_opts", {})},
        **options,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def called(reply: str | None, *ids: str) -> dict[str, Any]:
    """An assistant's message as a client of OpenAI's API sends it back."""
    calls = [
        {"id": one, "type": "function", "function": {"name": "look", "arguments": "{}"}}
        for one in ids
    ]
    return {"role": "assistant", "content": reply, "tool_calls": calls}


def ask(model: Model, messages: list[dict[str, Any]], **variables: Any) -> Completion:
    return model.complete(model.apply_chat_template(messages, **variables), thinking=True)


def test_pattern_11_a_tool_call_comes_back_to_the_letter(engine: Engine) -> None:
    """The next prompt begins with every token of the last context, the call's bytes among them."""
    model = speaking(engine, THOUGHT, "Done.")
    messages = [user("Look twice.")]
    first = ask(model, messages)
    assert len(first.tool_calls) == 2
    assert model.put_replay(["call_1", "call_2"], first)
    messages += [
        called(first.reply, "call_1", "call_2"),
        {"role": "tool", "tool_call_id": "call_1", "content": "a well"},
        {"role": "tool", "tool_call_id": "call_2", "content": "a hill"},
    ]
    prompt = model.apply_chat_template(messages)
    assert prompt[: len(first.context_tokens)] == list(first.context_tokens)
    assert prompt.text is not None
    assert f"assistant\n{THOUGHT}<|im_end|>\n<|im_start|>tool\na well" in prompt.text
    second = model.complete(prompt)
    assert second.cache_delta.read == first.committed_tokens
    # Without the ids it is what the template makes of it, which is something else.
    for message in messages[1]["tool_calls"]:
        message["id"] += "0"
    plain = model.apply_chat_template(messages)
    assert plain[: len(first.context_tokens)] != list(first.context_tokens)
    assert engine.cache.counters().saves_dropped == 0


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "replay": "turn"},
        {"role": "assistant", "replay": ["unknown", "turn"], "content": "So. "},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "turn"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "turn", "name": "look"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm,  hm", "signature": "turn"},
                {"type": "text", "text": "So. "},
            ],
        },
    ],
)
def test_what_a_front_end_has_in_hand(engine: Engine, message: dict[str, Any]) -> None:
    """Our own key, OpenAI's ids of tool calls, and Anthropic's ids and signatures all lead to
    the turn.
    """
    model = speaking(engine, THOUGHT)
    first = ask(model, [user("Look.")])
    assert first.reply == "So. "
    model.put_replay("turn", first)
    prompt = model.apply_chat_template([user("Look."), message, user("And?")])
    assert prompt[: len(first.context_tokens)] == list(first.context_tokens)


def test_an_unknown_id_is_an_ordinary_message(engine: Engine) -> None:
    """A chat whose ids nobody kept is rendered as if they were not there."""
    model = speaking(engine, SAID)
    chat = [user("Look."), {"role": "assistant", "content": "So."}, user("And?")]
    expected = model.apply_chat_template(chat)
    chat[1] = {**chat[1], "replay": "nobody's"}
    assert model.apply_chat_template(chat) == expected
    assert model.get_replay("nobody's") is None
    model.drop_replay("nobody's")


def test_an_edited_turn_is_not_replayed(engine: Engine) -> None:
    """A message that says something else than the turn did is rendered as it is."""
    model = speaking(engine, SAID)
    first = ask(model, [user("Look.")])
    model.put_replay("turn", first)
    said = {"role": "assistant", "content": "Something else.", "replay": "turn"}
    prompt = model.apply_chat_template([user("Look."), said, user("And?")])
    assert prompt.text is not None
    assert "assistant\nSomething else.<|im_end|>" in prompt.text
    # Only an assistant's message is a turn of the model's.
    forged = {"role": "user", "content": "", "replay": "turn"}
    text = model.apply_chat_template([user("Look."), forged]).text
    assert text is not None
    assert "tool_call" not in text


def test_a_salt_is_a_world_of_its_own(engine: Engine) -> None:
    """One caller's ids mean nothing to a caller with another salt, or to another model."""
    model = speaking(engine, SAID)
    other = speaking(engine, SAID, model_opts={"weights": "others"})
    prompt = model.apply_chat_template([user("Look.")])
    first = model.complete(prompt, cache_salt="a")
    model.put_replay("turn", first, cache_salt="a")
    chat = [user("Look."), {"role": "assistant", "replay": "turn", "content": ""}, user("And?")]
    held = list(first.context_tokens)
    assert model.apply_chat_template(chat, cache_salt="a")[: len(held)] == held
    for salt in (None, "b"):
        assert model.apply_chat_template(chat, cache_salt=salt)[: len(held)] != held
        assert model.get_replay("turn", cache_salt=salt) is None
    assert other.get_replay("turn", cache_salt="a") is None


def test_an_id_stands_for_one_turn(engine: Engine) -> None:
    """Keeping a turn twice is harmless; another one under its id is refused until it is dropped."""
    model = speaking(engine, "one", "two")
    first = ask(model, [user("?")])
    second = ask(model, [user("?"), {"role": "assistant", "content": "one"}, user("?")])
    assert model.put_replay("turn", first)
    assert model.put_replay("turn", first)
    with pytest.raises(ValueError, match="'turn' names something else already"):
        model.put_replay("turn", second)
    model.drop_replay("turn")
    assert model.get_replay("turn") is None
    assert model.put_replay("turn", second)
    kept = model.get_replay("turn")
    assert kept is not None
    assert (kept.data, kept.reply) == (b"two", "two")


def test_a_turn_that_a_tier_does_not_let_go_of_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever drops a turn knows that it may come back."""
    with make_engine(tmp_path) as engine:
        model = speaking(engine, "one", tier=["ram", "disk"])
        assert model.put_replay("turn", ask(model, [user("?")]))
        engine.flush()

        def delete(self: FileTier, object_id: ObjectId) -> bool:
            raise OSError("read-only file system")

        monkeypatch.setattr(FileTier, "delete", delete)
        with pytest.raises(CacheError, match="read-only file system"):
            model.drop_replay("turn")


@pytest.mark.parametrize("write", ["through", "back"])
def test_a_turn_outlives_the_process(tmp_path: Path, write: str) -> None:
    """After a restart the turn is found on disk, before the disk was scanned, and its state too."""
    policy = {"boundary_align_tokens": 32, "min_tokens": 0, "cold_min_tokens": 0, "write": write}
    with make_engine(tmp_path, cache=policy) as engine:
        model = speaking(engine, THOUGHT, "Well.", tier=["ram", "disk"])
        first = ask(model, [user("Look.")])
        assert model.put_replay("turn", first)
    with make_engine(tmp_path, cache=policy) as engine:
        model = speaking(engine, THOUGHT, "Well.", tier=["ram", "disk"])
        chat = [user("Look."), called(first.reply, "turn"), user("And?")]
        prompt = model.apply_chat_template(chat)
        assert prompt[: len(first.context_tokens)] == list(first.context_tokens)
        assert model.complete(prompt).cache_delta.read == first.committed_tokens
        assert model.get_replay("turn") == Replay(
            generated=first.generated,
            data=THOUGHT.encode(),
            reply=first.reply,
            prompt_end=first.context_tokens[: -len(first.generated)],
        )


def test_another_process_finds_it_at_once(tmp_path: Path) -> None:
    """Two engines on one root, the second one long since scanned, and no rescan between."""
    tiers = [{"name": "disk", "kind": "disk", "root": str(tmp_path), "rescan_interval_s": 3600}]
    with make_engine(tiers=tiers) as one, make_engine(tiers=tiers) as two:
        reader = speaking(two, SAID, tier=["disk"])
        assert two.cache.wait_scanned(10)
        assert reader.get_replay("turn") is None
        writer = speaking(one, SAID, tier=["disk"])
        first = ask(writer, [user("Look.")])
        writer.put_replay("turn", first)
        assert one.flush(10)
        kept = reader.get_replay("turn")
        assert kept is not None
        assert kept.generated == first.generated
        (row,) = [row for row in two.cache.dump() if row.kind == "replay"]
        assert (row.tier, row.save_reason) == ("disk", "finish")


def test_a_damaged_turn_is_a_miss(tmp_path: Path) -> None:
    """A file that was changed is dropped and counted, and the chat is rendered without it."""
    with make_engine(tmp_path) as engine:
        model = speaking(engine, SAID, tier=["disk"])
        first = ask(model, [user("Look.")])
        model.put_replay("turn", first)
        assert engine.flush(10)
        (path,) = tmp_path.glob("objects/*/*.replay.kvc")
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        chat = [user("Look."), called(first.reply, "turn"), user("And?")]
        prompt = model.apply_chat_template(chat)
        assert prompt[: len(first.context_tokens)] != list(first.context_tokens)
        assert engine.cache.counters().corrupt == 1
        assert not path.exists()
        assert model.put_replay("turn", first)


def test_turns_are_evicted_like_anything_else(tmp_path: Path) -> None:
    """They count towards a quota, are listed and summed up, and go when room is made."""
    with make_engine(tmp_path) as engine:
        model = speaking(engine, SAID, tier=["ram", "disk"])
        first = ask(model, [user("Look.")])
        model.put_replay("turn", first)
        assert engine.flush(10)
        assert all(usage.by_kind["replay"].objects == 1 for usage in engine.cache.usage())
        engine.cache.evict_bytes(1 << 30, ["ram"])
        assert model.get_replay("turn") is not None, "the disk has it still"
        engine.cache.gc()
        assert model.get_replay("turn") is None
        assert not list(tmp_path.glob("objects/*/*.kvc"))


def test_the_command_line_knows_turns(tmp_path: Path) -> None:
    """``erllama cache verify`` and ``ls`` find nothing wrong with a kept turn."""
    with make_engine(tmp_path) as engine:
        model = speaking(engine, SAID, tier=["disk"])
        model.put_replay("turn", ask(model, [user("Look.")]))
    command = [sys.executable, "-m", "erllama_core", "cache"]
    options = ["--json", "--root", str(tmp_path)]
    verified = subprocess.run(
        [*command, "verify", *options], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    listed = subprocess.run([*command, "ls", *options], capture_output=True, text=True, check=True)
    assert "replay" in {row["kind"] for row in json.loads(listed.stdout)}


def test_a_tier_that_hangs_holds_nobody_up() -> None:
    """A turn is found while it waits to be written; one that cannot be read in time is a miss."""
    held = HeldTier()
    held.writes.clear()
    with engine_with({"held": held}) as engine:
        model = speaking(engine, SAID, tier=["held"])
        first = ask(model, [user("Look.")])
        assert model.put_replay("turn", first)
        assert model.get_replay("turn") is not None
        held.writes.set()
        assert engine.flush(10)
    held.reads.clear()
    with engine_with({"held": held}, cache={"read_timeout_ms": 50}) as engine:
        model = speaking(engine, SAID, tier=["held"])
        for _ in range(3):  # the tier is left alone after the first one
            assert model.get_replay("turn") is None
        assert engine.cache.counters().reads_given_up == 1
        prompt = model.apply_chat_template([user("Look."), called("So. ", "turn"), user("?")])
        assert prompt[: len(first.context_tokens)] != list(first.context_tokens)
        held.reads.set()


def test_without_tiers_nothing_is_kept(engine: Engine) -> None:
    """Then it is said so, and every id is unknown."""
    model = speaking(engine, SAID, tier=[])
    assert not model.put_replay("turn", ask(model, [user("Look.")]))
    assert model.get_replay("turn") is None


def test_what_cannot_be_kept(engine: Engine) -> None:
    """A turn without tokens, an id that is none, and another model's tokens are refused."""
    model = speaking(engine, SAID)
    first = ask(model, [user("Look.")])
    stream = model.infer(model.apply_chat_template([user("Look.")]))
    stream.cancel()
    ended = stream.result()
    if not ended.generated:
        with pytest.raises(ValueError, match="nothing was generated"):
            model.put_replay("turn", ended)
    for ids in ("", [], ["a", ""], ["x" * 2000], [7]):
        with pytest.raises(ValueError, match="id"):
            model.put_replay(ids, first)  # type: ignore[arg-type]
    digraphs = speaking(engine, SAID, model_opts={"digraphs": True})
    foreign = digraphs.complete(digraphs.tokenize("thing"), response_tokens=2)
    with pytest.raises(InvalidPrompt):
        model.put_replay("turn", foreign)
    model.unload()
    for call in (
        lambda: model.put_replay("turn", first),
        lambda: model.get_replay("turn"),
        lambda: model.drop_replay("turn"),
    ):
        with pytest.raises(EngineClosed):
            call()


def test_a_payload_that_contradicts_itself_is_corrupt() -> None:
    """Whatever bytes are cut off or added, a stored turn is not read as another one."""
    turn = Replay(generated=(1, 2), data=b"\xffab", reply="a\ufffd\ud800", prompt_end=(3,))
    payload = replay_module.encode(turn)
    assert replay_module.decode(payload) == turn
    not_utf8 = payload[:-1] + b"\xff"
    for damaged in (payload[:-1], payload + b"x", payload[:10], b"", payload[4:], not_utf8):
        with pytest.raises(CorruptBlock):
            replay_module.decode(damaged)


# ------------------------------------------------------------ where turns begin

OPENS = TEMPLATE.replace(
    "'<|im_start|>assistant\n' -}}{%- endif", "'<|im_start|>assistant\n<think>\n' -}}{%- endif"
)
SHOWS_EMPTY = TEMPLATE.replace(
    "'<|im_start|>' + m.role + '\n'",
    "'<|im_start|>' + m.role + ('\n<think>\n\n</think>\n\n' if m.role == 'assistant' else '\n')",
)


@pytest.mark.parametrize("template", [OPENS, SHOWS_EMPTY])
@pytest.mark.parametrize("typed", ["Look.", "<|im_end|>", "<think>"])
def test_a_turn_stands_behind_what_it_was_drawn_after(
    engine: Engine, template: str, typed: str
) -> None:
    """A template that begins a turn in one way and shows it in another one gives the prompt that
    the turn answered, whatever was typed.
    """
    model = speaking(
        engine,
        "hm</think>So.",
        "x",
        template=template,
        model_opts={"reply_marker": "assistant\n"},
    )
    chat = [user(typed)]
    for turn in range(3):
        prompt = model.apply_chat_template(chat)
        done = model.complete(prompt, response_tokens=20, thinking=True)
        model.put_replay(f"turn {turn}", done)
        chat += [{"role": "assistant", "replay": f"turn {turn}"}, user(typed)]
        following = model.apply_chat_template(chat)
        assert following[: len(done.context_tokens)] == list(done.context_tokens)
        assert model.detokenize(following) == following.text
        assert following.count(259) == 2 * turn + 4


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("m.content.split", "(m.content ~ m.content).split"),
        TEMPLATE.replace("m.content.split", "('' if m.role == 'assistant' else m.content).split"),
        TEMPLATE.replace("{%- for m in messages -%}", "{%- for m in messages[::-1] -%}"),
        "{%- if messages[1] and not messages[1].tool_calls -%}{{ raise_exception('no') }}"
        "{%- endif -%}" + TEMPLATE,
    ],
)
def test_a_template_that_has_no_place_for_turns(engine: Engine, template: str) -> None:
    """Where a turn cannot be put in its place, the chat is rendered as it is."""
    model = speaking(engine, SAID, SAID, template=template)
    chat = [user("Look.")]
    for turn in range(2):
        done = ask(model, [user("Look.")])
        model.put_replay(f"turn {turn}", done)
        chat += [called("So. ", f"turn {turn}"), user("And?")]
    plain = [{**m, "tool_calls": [{**c, "id": "-"} for c in m.get("tool_calls", [])]} for m in chat]
    expected = model.apply_chat_template(plain)
    assert model.apply_chat_template(chat) == expected


def test_characters_that_stand_in_may_be_typed(engine: Engine) -> None:
    """The private characters that a rendering uses for turns come through when they were typed."""
    model = speaking(engine, SAID)
    typed = "".join(map(chr, range(0x10FFF0, 0x10FFFE))) + chr(0x100000) + "<|im_end|>"
    first = ask(model, [user(typed)])
    model.put_replay("turn", first)
    prompt = model.apply_chat_template([user(typed), called("", "turn"), user(typed)])
    assert prompt[: len(first.context_tokens)] == list(first.context_tokens)
    assert prompt.text is not None
    assert prompt.text.count(typed) == 2


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(
        st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "x", " ", "\n", "日"])).map(
            lambda parts: "".join(parts) + "."
        ),
        min_size=1,
        max_size=4,
    ),
    questions=st.lists(st.text("a<|>im_end\n", max_size=12), min_size=4, max_size=4),
    template=st.sampled_from([TEMPLATE, OPENS, SHOWS_EMPTY]),
)
def test_any_chat_goes_on_from_all_of_its_turns(
    script: list[str], questions: list[str], template: str
) -> None:
    """Whatever a model says and a user types, each prompt begins with the context before it."""
    with make_engine() as engine:
        model = speaking(
            engine, *script, template=template, model_opts={"reply_marker": "assistant\n"}
        )
        chat: list[dict[str, Any]] = []
        before: Completion | None = None
        for turn, question in enumerate(questions):
            chat.append(user(question))
            prompt = model.apply_chat_template(chat)
            assert isinstance(prompt, Prompt)
            if before is not None:
                assert prompt[: len(before.context_tokens)] == list(before.context_tokens)
            before = model.complete(prompt, response_tokens=30)
            model.put_replay(str(turn), before)
            chat.append(called(before.reply, str(turn)))


def test_the_twins_of_the_engine() -> None:
    """The same by the engine's methods, and by its awaitable ones."""

    async def run() -> None:
        with make_engine() as engine:
            model = speaking(engine, SAID)
            first = ask(model, [user("Look.")])
            assert engine.put_replay(model.id, "one", first)
            assert await engine.aio.put_replay(model, ["two"], first)
            for name in ("one", "two"):
                kept = engine.get_replay(model, name)
                assert kept is not None
                assert kept == await engine.aio.get_replay(model.id, name)
            engine.drop_replay(model, "one")
            await engine.aio.drop_replay(model, "two")
            assert engine.get_replay(model, "one") is engine.get_replay(model, "two") is None

    asyncio.run(run())

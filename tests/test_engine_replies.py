"""Stop sequences, thinking and tool calls as requests see them, on the stub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erllama_backend_stub.faults import gate
from erllama_core import (
    Done,
    Engine,
    Model,
    PluginHost,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCallDelta,
    ToolCallEnd,
    load_config,
    verify_thinking,
)
from erllama_core.errors import ConfigError, NotSupported, PluginMissing
from stub_engine import load_stub, make_engine

CHAT = [{"role": "user", "content": "hello"}]
TAGS = {"start": "<think>", "end": "</think>"}
PLAIN_TAGS = {"start": "[think]", "end": "[/think]"}
CALL_TAGS = {"start": "<tool_call>", "end": "</tool_call>"}
KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def speaking(engine: Engine, *script: str, free: str = "", **options: Any) -> Model:
    """A model that says what is scripted."""
    return engine.load_model(
        backend="stub",
        context_opts={"n_ctx": 1024, "n_seq_max": 2},
        policy={"boundary_align_tokens": 32, "min_tokens": 8, "cold_min_tokens": 8},
        model_opts={"script": list(script), "script_free": free},
        **options,
    )


# -------------------------------------------------------------- stop sequences


def test_pattern_9_a_stop_sequence_trims_the_reply(engine: Engine) -> None:
    """The reply ends before the stop, which is named; without one in it nothing is."""
    model = speaking(engine, "one\ntwo\nEND of it", "never")
    prompt = model.apply_chat_template(CHAT)
    done = model.complete(prompt, response_tokens=64, stop_sequences=["END", "\n\nUser:"])
    assert (done.reply, done.finish_reason) == ("one\ntwo\n", "stop")
    assert done.stop_sequence == done.stats.stop_sequence == "END"
    for limit, reason in ((64, "stop"), (5, "length")):
        done = model.complete(prompt, response_tokens=limit, stop_sequences=["\n\nUser:"])
        assert (done.finish_reason, done.stop_sequence) == (reason, None)


def test_pattern_9_streaming(engine: Engine) -> None:
    """No delta has any of the stop, and Done carries it."""
    model = speaking(engine, "so\n\nUser: hi")
    stream = model.infer(model.apply_chat_template(CHAT), stop_sequences=["\n\nUser:"])
    *deltas, done = stream
    assert [delta.text for delta in deltas if isinstance(delta, TextDelta)] == ["s", "o"]
    assert isinstance(done, Done)
    assert done.stats.stop_sequence == "\n\nUser:"


@pytest.mark.parametrize(
    ("reply", "stop", "kept"),
    [
        ("END", "END", ""),
        ("a日本b", "本", "a日"),
        ("a日本b", "日本", "a"),
        ("aaab", "aab", "a"),
        ("x\u00e9", "\u00e9", "x"),
    ],
)
def test_where_a_stop_may_be(engine: Engine, reply: str, stop: str, kept: str) -> None:
    """At the very start, in characters of several bytes, behind what it begins like."""
    model = speaking(engine, reply)
    done = model.complete(model.apply_chat_template(CHAT), stop_sequences=[stop])
    assert (done.reply, done.stop_sequence, done.finish_reason) == (kept, stop, "stop")


def test_a_stops_tokens_are_generated_and_found_again(engine: Engine) -> None:
    """What was computed up to the stop's last token is saved, and serves the next prompt."""
    model = speaking(engine, "fine. END more")
    prompt = model.apply_chat_template(CHAT)
    done = model.complete(prompt, stop_sequences=["END"])
    assert done.generated == tuple(b"fine. END")
    assert done.committed_tokens == len(done.context_tokens) == len(prompt) + 9
    assert done.finish_key is not None
    engine.flush()
    again = model.complete([*done.context_tokens, 65], response_tokens=1)
    assert again.cache_delta.read == done.committed_tokens
    assert model.info().available_seqs == 2


def test_what_is_held_back_is_delivered_at_every_other_end(engine: Engine) -> None:
    """The end of generation, the last token allowed, and a cancelled request."""
    model = speaking(engine, "say EN")
    prompt = model.apply_chat_template(CHAT)
    for limit in (None, 6, 5):
        done = model.complete(prompt, response_tokens=limit, stop_sequences=["END"])
        assert done.reply == "say EN"[:limit]
        assert done.stop_sequence is None
    held = gate("held back")
    model = load_stub(
        engine,
        script=("say EN" * 20,),
        faults={"hang_step": 7, "hang_gate": "held back"},
        policy={"prefill_chunk_size": 1000},
    )
    stream = model.infer(model.apply_chat_template(CHAT), stop_sequences=["ENsayD"])
    assert held.wait_reached(10)
    stream.cancel()
    held.open()
    done = stream.result()
    assert done.finish_reason == "cancelled"
    assert done.reply == bytes(done.generated).decode()


def test_a_stop_that_the_last_token_decides(engine: Engine) -> None:
    """A stop that waited for a longer one listed first is met when there is no more."""
    model = speaking(engine, "x ab")
    prompt = model.apply_chat_template(CHAT)
    for limit in (4, None):
        done = model.complete(prompt, response_tokens=limit, stop_sequences=["abc", "ab"])
        assert (done.reply, done.stop_sequence, done.finish_reason) == ("x ", "ab", "stop")


@pytest.mark.parametrize(
    ("stops", "error", "text"),
    [
        ("END", TypeError, "a list of strings"),
        (b"END", TypeError, "a list of strings"),
        ([b"END"], TypeError, r"stop_sequences\[0\]=b'END': a string"),
        (["a", ""], ValueError, r"stop_sequences\[1\] is empty"),
        (["\ud800"], ValueError, "lone surrogate"),
        (["x" * 20_000], ValueError, "20000 bytes together; 16384 is the limit"),
        (["ab"] * 10_000, ValueError, "20000 bytes"),
    ],
)
def test_stops_that_cannot_be(
    engine: Engine, stops: Any, error: type[Exception], text: str
) -> None:
    """A wrong list is refused by the call, with what is wrong in it."""
    model = speaking(engine, "x")
    with pytest.raises(error, match=text):
        model.complete(model.apply_chat_template(CHAT), stop_sequences=stops)


def test_overlapping_and_repeated_stops(engine: Engine) -> None:
    """Stops may contain one another, or be there twice; none, or None, is none."""
    model = speaking(engine, "say END.")
    prompt = model.apply_chat_template(CHAT)
    done = model.complete(prompt, stop_sequences=("ND", "END", "END.", "ND"))
    assert (done.reply, done.stop_sequence) == ("say ", "END")
    assert model.complete(prompt, stop_sequences=[]).reply == "say END."
    assert model.complete(prompt, stop_sequences=None).reply == "say END."


def test_a_model_without_the_processor_refuses_stops(engine: Engine) -> None:
    """A stop that nobody would look for is no request that can be served."""
    model = speaking(engine, "say END.", processors=[])
    with pytest.raises(NotSupported, match="'stop_sequences'"):
        model.complete(model.apply_chat_template(CHAT), stop_sequences=["END"])


# -------------------------------------------------------------------- thinking


@pytest.mark.parametrize("tags", [TAGS, PLAIN_TAGS])
def test_pattern_10_thinking_is_apart(tmp_path: Path, tags: dict[str, str]) -> None:
    """Thinking comes as deltas with a signed end, whether its markers are one token or many."""
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    said = f"{tags['start']}hm, 日本{tags['end']}The answer."
    with make_engine(engine={"thinking_signing_key_file": str(key_file)}) as engine:
        model = speaking(engine, said, thinking_markers=tags)
        stream = model.infer(model.apply_chat_template(CHAT), thinking=True)
        events = list(stream)
        done = stream.result()
        assert "".join(e.text for e in events if isinstance(e, ThinkingDelta)) == "hm, 日本"
        (end,) = [event for event in events if isinstance(event, ThinkingEnd)]
        assert done.thinking == "hm, 日本"
        assert done.thinking_signature == end.signature
        assert verify_thinking(done.thinking, end.signature, KEY)
        assert engine.verify_thinking(done.thinking, end.signature)
        assert not engine.verify_thinking(done.thinking + ".", end.signature)
        assert done.reply == "The answer."


def test_without_a_key_signatures_are_empty(engine: Engine) -> None:
    """Then nothing verifies."""
    model = speaking(engine, "<think>hm</think>so", thinking_markers=TAGS)
    done = model.complete(model.apply_chat_template(CHAT), thinking=True)
    assert (done.thinking, done.thinking_signature) == ("hm", b"")
    assert not engine.verify_thinking("hm", b"")


def test_pattern_10_a_budget(engine: Engine) -> None:
    """At most so many thinking deltas; what the model thinks beyond that is text."""
    model = speaking(engine, "<think>12345</think>so", thinking_markers=TAGS)
    prompt = model.apply_chat_template(CHAT)
    for budget, thinking, reply in ((2, "12", "345so"), (0, "12345", "so"), (-1, "12345", "so")):
        done = model.complete(prompt, thinking=True, thinking_budget_tokens=budget)
        assert (done.thinking, done.reply) == (thinking, reply)
        assert len(done.generated) == 9


@pytest.mark.parametrize(("tags", "marked"), [(TAGS, "hmso"), (PLAIN_TAGS, "[think]hm[/think]so")])
def test_thinking_that_is_not_asked_for(engine: Engine, tags: dict[str, str], marked: str) -> None:
    """Without thinking, or without markers, every event is as if there were no processor."""
    said = f"{tags['start']}hm{tags['end']}so"
    bare = speaking(engine, said, processors=[])
    model = speaking(engine, said, thinking_markers=tags)
    unmarked = speaking(engine, said)
    prompt = model.apply_chat_template(CHAT)
    expected = [event for event in bare.infer(prompt) if isinstance(event, TextDelta)]
    assert "".join(event.text for event in expected) == marked
    for asked in (model.infer(prompt), unmarked.infer(prompt, thinking=True)):
        *events, done = asked
        assert events == expected
        assert isinstance(done, Done)


def test_a_prompt_that_opens_thinking(engine: Engine) -> None:
    """A template that begins the block makes the reply begin within it."""
    model = speaking(engine, "<think>\nhm</think>so", thinking_markers=TAGS)
    prompt = model.tokenize("<|im_start|>assistant\n<think>\n")
    done = model.complete(prompt, thinking=True)
    assert (done.thinking, done.reply) == ("hm", "so")
    assert model.complete(prompt).reply == "hmso"


def test_a_block_open_at_the_end(engine: Engine) -> None:
    """A reply that is cut while it thinks has the thinking, signed or not, and no text."""
    model = speaking(engine, "<think>so much to say", thinking_markers=TAGS)
    stream = model.infer(model.apply_chat_template(CHAT), thinking=True, response_tokens=5)
    *_, end, done = stream
    assert isinstance(end, ThinkingEnd)
    assert isinstance(done, Done)
    assert (stream.result().thinking, stream.result().reply) == ("so m", "")


# ------------------------------------------------------------------ tool calls


@pytest.mark.parametrize("tags", [CALL_TAGS, {"start": "[call]", "end": "[/call]"}])
def test_pattern_11_tool_calls_are_apart(engine: Engine, tags: dict[str, str]) -> None:
    """Each call's bytes come as deltas, then whole; text around them is the reply."""
    start, end = tags["start"], tags["end"]
    model = speaking(
        engine, f'I look.{start}{{"n": "é"}}{end} {start}two{end}.', tool_call_markers=tags
    )
    stream = model.infer(model.apply_chat_template(CHAT))
    events = list(stream)
    deltas = b"".join(event.data for event in events if isinstance(event, ToolCallDelta))
    done = stream.result()
    assert done.tool_calls == ('{"n": "é"}'.encode(), b"two")
    assert done.tool_calls == tuple(e.data for e in events if isinstance(e, ToolCallEnd))
    assert deltas == b"".join(done.tool_calls)
    assert done.reply == "I look. ."


def test_calls_that_follow_or_end_with_the_reply(engine: Engine) -> None:
    """A start marker ends the call before it; with "$eos" the end of generation ends the last."""
    markers = {"start": "<tool_call>", "end": "$eos"}
    model = speaking(engine, "<tool_call>one<tool_call>two", tool_call_markers=markers)
    prompt = model.apply_chat_template(CHAT)
    assert model.complete(prompt).tool_calls == (b"one", b"two")
    assert model.complete(prompt, response_tokens=6).tool_calls == (b"one", b"t")


FORM = "say <tool_call>{~~~~~~<arg>~~~~~~~~</arg>~~~~}</tool_call>~~~~"
SYNTAX = [at for at, c in enumerate("{~~~~~~<arg>********</arg>~~~~}") if c == "~"]
PAYLOAD = [at for at, c in enumerate("{~~~~~~<arg>********</arg>~~~~}") if c == "*"]


def calls(model: Model, seeds: range, **options: Any) -> list[tuple[bytes, tuple[int, ...]]]:
    """The call of each seed, and all tokens that were drawn."""
    prompt = model.apply_chat_template(CHAT)
    found = []
    for seed in seeds:
        done = model.complete(prompt, temperature=5.0, top_k=0, seed=seed, **options)
        (call,) = done.tool_calls
        found.append((call, done.generated))
    return found


def test_pattern_11_syntax_is_drawn_greedily_and_payload_is_not(engine: Engine) -> None:
    """In a call, every open token of syntax is the greedy one where it stands, whatever the
    seed; payload and text depend on the seed.
    """
    markers = {**CALL_TAGS, "payload_start": "<arg>", "payload_end": "</arg>"}
    model = speaking(engine, FORM, free="~", tool_call_markers=markers)
    prompt = model.apply_chat_template(CHAT)
    found = calls(model, range(5))
    # Before the payload nothing depends on the seed at all.
    assert len({bytes(call[at] for at in SYNTAX[:6]) for call, _ in found}) == 1
    assert len({bytes(call[at] for at in PAYLOAD) for call, _ in found}) == 5
    assert len({generated[-4:] for _, generated in found}) == 5, "text after it"
    greedy_payload = 0
    for call, generated in found:
        opening = generated.index(263) + 1  # the token <tool_call>
        for at in (*SYNTAX, *PAYLOAD):
            context = [*prompt, *generated[: opening + at]]
            best = model.complete(context, response_tokens=1).generated
            if at in SYNTAX:
                assert best == (call[at],)
            else:
                greedy_payload += best == (call[at],)
    assert greedy_payload < len(PAYLOAD) * len(found) / 2


def test_without_payload_markers_a_whole_call_is_greedy(engine: Engine) -> None:
    """Then no seed changes anything in it; and without any markers no token is swapped."""
    model = speaking(engine, FORM, free="~", tool_call_markers=CALL_TAGS)
    assert len({call for call, _ in calls(model, range(4))}) == 1
    off = speaking(engine, FORM, free="~")
    prompt = off.apply_chat_template(CHAT)
    drawn = {
        off.complete(prompt, temperature=5.0, top_k=0, seed=seed).generated for seed in range(4)
    }
    assert len(drawn) == 4
    assert len({tokens[5:12] for tokens in drawn}) == 4


# --------------------------------------------------------------- configuration


def test_processors_of_a_model(engine: Engine) -> None:
    """An unknown one is refused when the model is loaded, and so are options for none."""
    with pytest.raises(PluginMissing, match="'stop_sequence'"):
        speaking(engine, processors=["stop_sequence"])
    with pytest.raises(ConfigError) as caught:
        speaking(engine, processor_opts={"stop_sequences": {"longest": 3}})
    assert caught.value.problems[0].path == "processor_opts.stop_sequences.longest"
    assert engine.models() == []


def test_markers_that_are_equal(engine: Engine) -> None:
    """Markers that cannot be told apart are refused with their places."""
    with pytest.raises(ConfigError) as caught:
        speaking(
            engine,
            thinking_markers=TAGS,
            tool_call_markers={"start": "<think>", "end": "x"},
        )
    assert [problem.path for problem in caught.value.problems] == ["tool_call_markers.start"]


def test_the_check_names_a_model_s_processors() -> None:
    """`erllama check` tells a processor that no plugin has, with its place."""
    from erllama_core.config import check_config

    config = load_config(
        {"models": {"m": {"backend": "stub", "processors": ["thinkin"]}}}, environ={}
    )
    (problem,) = check_config(config, PluginHost())
    assert (problem.path, problem.suggestion) == ("models.m.processors", "thinking")


# ------------------------------------------------------------------ a real model


@pytest.mark.real_model
def test_markers_and_stops_in_a_real_reply(demo_model_path: Path) -> None:
    """Pieces of a real model's own reply, cut anywhere in its tokens, are found as stops and
    as markers, and everything around them is delivered.
    """
    with make_engine() as engine:

        def load(**options: Any) -> Model:
            return engine.load_model(
                model_path=str(demo_model_path), context_opts={"n_ctx": 512}, **options
            )

        plain = load()
        prompt = plain.apply_chat_template([{"role": "user", "content": "Tell me about lamps."}])
        whole = plain.complete(prompt, response_tokens=32)
        text = whole.reply
        for at in (0, 31):
            stop = text[at : at + 5]
            done = plain.complete(prompt, response_tokens=32, stop_sequences=["\0", stop])
            assert done.reply == text[: text.index(stop)]
            assert done.stop_sequence == stop
            assert done.generated == whole.generated[: len(done.generated)]
        plain.unload()
        marked = load(
            thinking_markers={"start": text[9:16], "end": text[23:30]},
            tool_call_markers={"start": text[41:48], "end": text[60:67]},
        )
        done = marked.complete(prompt, response_tokens=32, thinking=True)
        assert done.generated == whole.generated
        assert (done.thinking, done.tool_calls) == (text[16:23], (text[48:60].encode(),))
        assert done.reply == text[:9] + text[30:41] + text[67:]

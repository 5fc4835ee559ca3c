"""Scripted replies."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_backend_stub import StubContext, StubModel, StubOptions, open_model
from erllama_core.errors import ModelLoadError
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    RangeExport,
    RangeImport,
    Row,
    SamplingParams,
)

ASK = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"


def load(*script: str, **options: object) -> StubModel:
    return open_model(
        BackendRequest(
            model_path=None,
            options=StubOptions(script=script, **options),  # type: ignore[arg-type]
            context=ContextOptions(n_seq_max=2),
        )
    )


def reply(
    model: StubModel,
    prompt: str,
    *,
    params: SamplingParams | None = None,
    limit: int = 40,
    context: StubContext | None = None,
    cached: int = 0,
) -> str:
    """The reply up to its end or ``limit`` tokens."""
    vocabulary = model.vocabulary
    packed = vocabulary.tokenize(prompt, add_bos=False, parse_special=True)
    context = context or model.open_context()
    sampler = model.new_sampler(params or SamplingParams(), packed)
    context.step([Row(0, cached, packed[4 * cached :], logits=True)])
    length, text = len(packed) // 4, b""
    for _ in range(limit):
        token = context.sample(0, sampler)
        if token in vocabulary.end_of_generation:
            return text.decode() + "."
        text += vocabulary.piece(token)
        context.step([Row(0, length, struct.pack("<I", token), logits=True)])
        length += 1
    return text.decode(errors="replace")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_are_played_in_order_and_the_last_again(temperature: float) -> None:
    """The first reply comes in the first assistant turn, the last in all that follow."""
    model = load("Grüß dich", "Fine", "Bye")
    params = SamplingParams(temperature=temperature)
    prompt = ""
    for expected in ("Grüß dich", "Fine", "Bye", "Bye"):
        prompt += ASK
        assert reply(model, prompt, params=params) == f"{expected}."
        prompt += f"{expected}<|im_end|>\n"


def test_control_tokens_in_the_script_are_control_tokens() -> None:
    """A reply can think and call tools."""
    model = load("<think>hm</think><tool_call>{}</tool_call>")
    context = model.open_context()
    prompt = model.vocabulary.tokenize(ASK, add_bos=False, parse_special=True)
    context.step([Row(0, 0, prompt, logits=True)])
    token = context.sample(0, model.new_sampler(SamplingParams(), prompt))
    assert model.vocabulary.control_tokens[token] == "<think>"
    assert reply(model, ASK) == "<think>hm</think><tool_call>{}</tool_call>."


def test_an_empty_thinking_block_does_not_disturb_the_script() -> None:
    """A generation prompt that switches thinking off still opens a turn."""
    assert reply(load("Hi"), ASK + "<think>\n\n</think>\n\n") == "Hi."


def test_a_reply_that_was_begun_is_finished() -> None:
    """A context that ends within the scripted reply goes on with the rest."""
    assert reply(load("Hello"), ASK + "Hel") == "lo."


def test_contexts_that_the_script_does_not_know_are_unscripted() -> None:
    """Without the marker, or after other words than the script's, nothing is forced."""
    model, plain = load("Hello", eog_rate=0.1), load(eog_rate=0.1)
    for prompt in ("Hello?", ASK + "Hex"):
        assert reply(model, prompt) == reply(plain, prompt)


def test_the_marker_can_be_any_text() -> None:
    """Prompts without chat markup have turns too, where the marker says so."""
    model = load("4", "9", reply_marker="Answer:")
    assert reply(model, "2+2? Answer:") == "4."
    assert reply(model, "2+2? Answer:4\n3*3? Answer:") == "9."


def test_a_script_that_cannot_be_played_is_refused() -> None:
    """A reply with the marker in it would never end."""
    with pytest.raises(ModelLoadError, match="reply_marker"):
        load("a Answer: b", reply_marker="Answer:")
    with pytest.raises(TypeError, match="tuple"):
        StubOptions(script="abc")  # type: ignore[arg-type]


@given(cut=st.integers(1, len(ASK) - 40))
def test_restored_contexts_are_scripted_alike(cut: int) -> None:
    """The script reads restored cells, so the cache cannot change what is said."""
    model = load("Hi", "Ho")
    prompt = ASK + "Hi<|im_end|>\n" + ASK
    packed = model.vocabulary.tokenize(prompt, add_bos=False, parse_special=True)
    source, target = model.open_context(), model.open_context()
    source.step([Row(1, 0, packed, logits=False)])
    data = bytearray(source.range_bytes(1, 0, cut))
    source.export_ranges(1, [RangeExport(0, cut, memoryview(data))])
    target.import_ranges(0, [RangeImport(0, cut, cut, memoryview(data))])
    assert reply(model, prompt, context=target, cached=cut) == "Ho."


def test_a_script_leaves_tokens_open() -> None:
    """Where the script has its free character, seeds differ; everything else is as scripted."""
    model = load("a~~~~b", script_free="~")
    said = {
        reply(model, ASK, params=SamplingParams(temperature=5.0, top_k=0, seed=seed))
        for seed in range(4)
    }
    assert len(said) == 4
    assert all(len(text) == 7 and text[0] == "a" and text[5:] == "b." for text in said)
    with pytest.raises(ValueError, match="script_free"):
        load("a", script_free="~~")

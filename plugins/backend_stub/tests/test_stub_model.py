"""The model as a whole: options, identity, template, embeddings, the provider."""

from __future__ import annotations

import math
import struct
from typing import Any

import cattrs
import jinja2
import pytest

from erllama_backend_stub import StubFaults, StubModel, StubOptions, open_model, plugin
from erllama_core.errors import InvalidPrompt, ModelLoadError
from erllama_core.interfaces.backend import (
    BackendModel,
    BackendRequest,
    Context,
    ContextOptions,
    CostPrior,
    DeclaresCosts,
    Embeds,
    KVClass,
    Row,
    Sampler,
    SamplingParams,
    Vocabulary,
)


def load(context: ContextOptions | None = None, **options: Any) -> StubModel:
    return open_model(
        BackendRequest(
            model_path=None,
            options=StubOptions(**options),
            context=context or ContextOptions(),
        )
    )


def test_the_provider_makes_a_model() -> None:
    """What the hook returns is usable with its default options."""
    (provider,) = plugin.erllama_backends()
    assert provider.name == "stub"
    request = BackendRequest(model_path=None, options=provider.config(), context=ContextOptions())
    # The annotations are the test: mypy holds the classes to the protocols.
    model: BackendModel = provider.factory(request)
    context: Context = load().open_context()
    vocabulary: Vocabulary = load().vocabulary
    sampler: Sampler = load().new_sampler(SamplingParams(), b"")
    assert isinstance(model, Embeds)
    assert context.kv_class is KVClass.SPAN
    assert model.vocabulary == vocabulary
    sampler.close()
    context.close()
    model.close()


def test_costs_are_declared_when_the_options_say_so() -> None:
    """By default it declares none, so that whatever is stored is restored."""
    silent, told = load().open_context(), load(declared_us_per_token=250).open_context()
    assert isinstance(silent, DeclaresCosts)
    assert silent.cost_prior is None
    assert told.cost_prior == CostPrior(compute_s_per_token=0.00025, import_s_per_byte=1e-9)


def test_options_can_be_structured_from_a_table() -> None:
    """A configuration's plain values become the options, nested ones too."""
    table = {
        "kv_class": "whole",
        "script": ["a", "b"],
        "eog_rate": 0.5,
        "max_block_tokens": 16,
        "faults": {"fail_step": 3},
    }
    assert cattrs.structure(table, StubOptions) == StubOptions(
        kv_class="whole",
        script=("a", "b"),
        eog_rate=0.5,
        max_block_tokens=16,
        faults=StubFaults(fail_step=3),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cell_bytes", 8),
        ("cell_bytes", 33),
        ("max_block_tokens", 0),
        ("eog_rate", 1.1),
        ("eog_rate", -0.1),
        ("reply_marker", ""),
        ("decode_us", -1.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: object) -> None:
    """The error names the option."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        StubOptions(**options)


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_seq_max"])
def test_a_context_of_nothing_is_refused(name: str) -> None:
    """The error names the context option."""
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(ModelLoadError, match=name):
        load(ContextOptions(**nothing))


def greedy(model: StubModel, prompt: str, count: int) -> str:
    packed = model.vocabulary.tokenize(prompt, add_bos=False, parse_special=True)
    context, sampler = model.open_context(), model.new_sampler(SamplingParams(), packed)
    context.step([Row(0, 0, packed, logits=True)])
    tokens: list[int] = []
    for length in range(len(packed) // 4, len(packed) // 4 + count):
        tokens.append(context.sample(0, sampler))
        context.step([Row(0, length, struct.pack("<I", tokens[-1]), logits=True)])
    return model.vocabulary.detokenize(struct.pack(f"<{count}I", *tokens)).decode()


@pytest.mark.parametrize(
    ("kv_class", "expected"),
    [
        ("span", "7.J-Yt&.N! MW,Gd"),
        ("checkpoint", 'wW#r-GV">8n;CEn9'),
        ("whole", "7.J-Yt&.N! MW,Gd"),
    ],
)
def test_output_is_the_same_on_every_machine_and_in_every_release(
    kv_class: str, expected: str
) -> None:
    """A change of this text is a change of ``model.ARITHMETIC``: stored state would be wrong."""
    assert greedy(load(kv_class=kv_class), "Once upon a time", 16) == expected


def test_simulated_costs_change_no_output() -> None:
    """A slow model says what a fast one says."""
    slow = load(prefill_us_per_token=1.0, decode_us=1.0)
    assert greedy(slow, "abc", 8) == greedy(load(), "abc", 8)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "other"},
        {"kv_class": "checkpoint"},
        {"cell_bytes": 64},
        {"eog_rate": 0.1},
        {"script": ("a",)},
        {"script": ("a",), "reply_marker": "x"},
        {"script": ("a", "")},
    ],
)
def test_identity_tells_incompatible_models_apart(options: dict[str, Any]) -> None:
    """Whatever changes state or logits changes the identity."""
    others = [load(), load(script=("a",))]
    same = load(**options).identity()
    assert load(**options).identity() == same
    assert sum(other.identity() == same for other in others) == (options == {"script": ("a",)})


def test_identity_ignores_what_changes_nothing() -> None:
    """Where cells lie, and how many there are, is no part of it; KV types are."""
    assert load(ContextOptions(n_ctx=64, n_seq_max=3, kv_unified=False)).identity() == (
        load().identity()
    )
    assert load(ContextOptions(type_v="q8_0")).identity() != load().identity()


@pytest.mark.parametrize("trims", [False, True])
def test_the_template_renders_a_chat(trims: bool) -> None:
    """Turns, tools, calls and the generation prompt come out alike in either environment."""
    model = load()
    environment = jinja2.Environment(trim_blocks=trims, lstrip_blocks=trims)
    template = environment.from_string(model.chat_template or "")
    text = template.render(
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        ],
        tools=[{"name": "f"}],
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert text == (
        "<|im_start|>system\n"
        "You can call these tools, each as JSON between <tool_call> and </tool_call>:\n"
        '{"name": "f"}\n<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f"}</tool_call><|im_end|>\n'
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    packed = model.vocabulary.tokenize(text, add_bos=False, parse_special=True)
    assert model.vocabulary.detokenize(packed) == text.encode()


def test_embeddings_are_unit_vectors_of_the_text() -> None:
    """Equal tokens and weights give equal vectors of length 1, others give others."""
    tokens, other = struct.pack("<2I", 1, 2), struct.pack("<2I", 2, 1)
    vector = load().embed(tokens)
    assert len(vector) == 32
    assert math.hypot(*vector) == pytest.approx(1.0)
    assert load().embed(memoryview(tokens)) == vector
    assert load().embed(other) != vector
    assert load(weights="other").embed(tokens) != vector
    with pytest.raises(InvalidPrompt):
        load().embed(b"")
    with pytest.raises(InvalidPrompt):
        load().embed(struct.pack("<I", 265))


def test_the_model_describes_itself() -> None:
    """Its description and quantisation are fit for a listing."""
    model = load(weights="tiny")
    assert "tiny" in model.description
    assert (model.quantisation.type, model.quantisation.bits) == ("f32", 32)

"""Embeddings: one vector for a text, from a context of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from llama_cpp import llama_cpp

from erllama_backend_llama.model import LlamaModel, load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core import Engine, Model, load_config
from erllama_core.errors import (
    ConfigError,
    EngineClosed,
    InvalidPrompt,
    NotSupported,
    PromptTooLong,
    TextTooLong,
)
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    Embeds,
    Row,
    SamplingParams,
)
from tiny_gguf import ARCHS, Arch

Tiny = Callable[..., Path]
Load = Callable[..., LlamaModel]
TEXT = [40, 41, 42, 43, 44, 45, 46]


def pack(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<u4").tobytes()


def vector(model: LlamaModel, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    return np.array(model.embed(pack(tokens)))


@pytest.fixture
def opened() -> Any:
    """``opened(path, context, **model_opts)``: a loaded model, closed after the test."""
    models: list[LlamaModel] = []

    def make(path: Path, context: dict[str, Any] | None = None, **options: Any) -> LlamaModel:
        chosen = ContextOptions(**{"n_threads": 1, "n_ctx": 1024, **(context or {})})
        request = BackendRequest(model_path=path, options=LlamaOptions(**options), context=chosen)
        models.append(load_model(request))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.mark.parametrize("arch", [*ARCHS, "bert"])
def test_every_kind_of_model_embeds(opened: Load, tiny: Tiny, arch: Arch) -> None:
    """A vector of length 1, the same for the same text, and another one for another text."""
    model = opened(tiny(arch))
    assert isinstance(model, Embeds)
    one = vector(model, TEXT)
    other = vector(model, [*TEXT[:-1], 99])
    assert abs(np.linalg.norm(one) - 1) < 1e-6
    assert np.array_equal(vector(model, TEXT), one)
    assert float(one @ other) < 0.9999
    # Every token counts, not only the last ones.
    assert float(one @ vector(model, [99, *TEXT[1:]])) < 0.9999


def test_the_context_grows_with_the_text(opened: Load, tiny: Tiny) -> None:
    """A text longer than any before is embedded as a whole, and short ones are as they were."""
    model = opened(tiny("llama"), {"n_ctx": 4096})
    short = vector(model, TEXT)
    lengths = [511, 512, 513, 3000, 4096]
    vectors = [vector(model, (TEXT * 600)[:length]) for length in lengths]
    assert all(abs(np.linalg.norm(v) - 1) < 1e-6 for v in vectors)
    # It is one piece: a first token is the first one, however much follows it.
    first = opened(tiny("llama"), {"n_ctx": 4096}, pooling="cls")
    assert float(vector(first, (TEXT * 600)[:3000]) @ vector(first, TEXT[:1])) > 0.9999
    assert float(vector(model, TEXT) @ short) > 0.9999
    with pytest.raises(TextTooLong, match="4097 tokens; 4096 at most") as caught:
        model.embed(pack([40] * 4097))
    assert (caught.value.prompt_tokens, caught.value.limit_tokens) == (4097, 4096)
    assert isinstance(caught.value, PromptTooLong)


def test_learned_positions_bound_a_text(opened: Load, tiny: Tiny) -> None:
    """An encoder takes no more than it was trained for, which llama.cpp would abort on."""
    model = opened(tiny("bert", context_length=512), {"n_ctx": 2048})
    vector(model, [40] * 512)
    with pytest.raises(TextTooLong, match="512 at most"):
        model.embed(pack([40] * 513))


def test_pooling(opened: Load, tiny: Tiny) -> None:
    """The option says how, else the file does, else it is the mean."""
    asked = {
        name: vector(opened(tiny("llama"), pooling=name), TEXT) for name in ("mean", "cls", "last")
    }
    assert np.array_equal(vector(opened(tiny("llama")), TEXT), asked["mean"])
    for first, second in (("mean", "cls"), ("mean", "last"), ("cls", "last")):
        assert float(asked[first] @ asked[second]) < 0.999
    of_file = opened(tiny("llama", pooling=3))
    assert np.array_equal(vector(of_file, TEXT), asked["last"])
    overruled = opened(tiny("llama", pooling=3), pooling="mean")
    assert np.array_equal(vector(overruled, TEXT), asked["mean"])
    none_of_its_own = opened(tiny("llama", pooling=0))
    assert np.array_equal(vector(none_of_its_own, TEXT), asked["mean"])


def test_a_model_that_ranks(opened: Load, tiny: Tiny) -> None:
    """Its own pooling gives no embedding, so one must be asked for."""
    with pytest.raises(NotSupported, match=r"model_opts\.pooling"):
        opened(tiny("llama", pooling=4)).embed(pack(TEXT))
    vector(opened(tiny("llama", pooling=4), pooling="cls"), TEXT)


def test_a_token_that_ends_a_text_is_added(opened: Load, tiny: Tiny) -> None:
    """A model that wants an end token behind a text has it once, given or not."""
    model = opened(tiny("llama", add_eos=True), pooling="last")
    (end,) = (t for t, text in model.vocabulary.control_tokens.items() if text == "<|eos|>")
    assert np.array_equal(vector(model, TEXT), vector(model, [*TEXT, end]))
    plain = opened(tiny("llama"), pooling="last")
    assert float(vector(plain, TEXT) @ vector(plain, [*TEXT, end])) < 0.999


def test_what_cannot_be_embedded(opened: Load, tiny: Tiny) -> None:
    """No tokens, and tokens that there are none of."""
    model = opened(tiny("llama"))
    with pytest.raises(InvalidPrompt, match="no tokens"):
        model.embed(b"")
    with pytest.raises(InvalidPrompt, match="outside the vocabulary"):
        model.embed(pack([5, 100_000]))
    vector(model, TEXT)


def test_many_threads_at_once(opened: Load, tiny: Tiny) -> None:
    """Each gets the vector of its own text, while the model's context computes other things."""
    model = opened(tiny("llama"))
    context = model.open_context()
    texts = [[40 + n, *TEXT * (n + 1)] for n in range(6)]
    expected = [vector(model, text) for text in texts]
    context.step([Row(0, 0, pack(TEXT), logits=True)])
    before = context.mark(0, None)

    def embed(number: int) -> bool:
        return np.allclose(vector(model, texts[number]), expected[number], atol=1e-5)

    with ThreadPoolExecutor(6) as pool:
        results = pool.map(embed, list(range(6)) * 5)
        for _ in range(20):
            context.drop(0)
            context.step([Row(0, 0, pack(TEXT), logits=True)])
            assert context.mark(0, None) == before
        assert all(results)


def test_nothing_is_made_before_it_is_needed_nor_kept_after(
    opened: Load, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is made by the first text, is used again, and is freed with the model."""
    made: list[int] = []
    real = llama_cpp.llama_init_from_model

    def counted(model: Any, params: Any) -> Any:
        made.append(params.n_ctx)
        return real(model, params)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", counted)
    model = opened(tiny("llama"))
    model.open_context()
    assert len(made) == 1
    vector(model, TEXT)
    vector(model, TEXT * 2)
    assert made[1:] == [512]
    vector(model, TEXT * 100)
    assert made[1:] == [512, 1024]
    model.close()
    model.close()
    with pytest.raises(EngineClosed):
        model.embed(pack(TEXT))


def test_embedding_does_not_grow(tiny: Tiny) -> None:
    """Sixty models that embedded leave less behind than one context is large."""
    path = tiny("llama")

    def once() -> None:
        options = ContextOptions(n_threads=1, n_ctx=512)
        model = load_model(BackendRequest(model_path=path, options=LlamaOptions(), context=options))
        vector(model, (TEXT * 600)[:512])
        model.close()

    for _ in range(5):
        once()
    before = psutil.Process().memory_info().rss
    for _ in range(60):
        once()
    assert psutil.Process().memory_info().rss - before < 512 * 2060 * 4


def test_closing_waits_for_a_text(
    opened: Load, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is closed while it embeds answers first, and then frees its context."""
    model = opened(tiny("llama"))
    vector(model, TEXT)
    computing, go_on = threading.Event(), threading.Event()
    real = llama_cpp.llama_decode

    def held(context: Any, batch: Any) -> Any:
        computing.set()
        assert go_on.wait(30)
        return real(context, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", held)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(vector, model, TEXT)
        assert computing.wait(30)
        closing = pool.submit(model.close)
        assert not closing.done()
        go_on.set()
        assert abs(np.linalg.norm(answer.result(30)) - 1) < 1e-6
        closing.result(30)


# ------------------------------------------------------- what does not generate


@pytest.fixture
def engine() -> Any:
    with Engine(load_config({}, environ={})) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["encoder", "vocabulary", "asked for"])
def test_a_model_that_generates_nothing(engine: Engine, tiny: Tiny, kind: str) -> None:
    """It loads, tokenises and renders; what it cannot do is refused by the call, with a reason."""
    path = tiny("bert") if kind == "encoder" else tiny("llama", vocab_only=kind == "vocabulary")
    options = {"vocab_only": True} if kind == "asked for" else {}
    model = engine.load_model(model_path=str(path), model_opts=options)
    assert model.detokenize(model.tokenize("the ring")) == "the ring"
    assert model.apply_chat_template([{"role": "user", "content": "hi"}])
    refused: list[Callable[[Model], object]] = [
        lambda m: m.complete("hi"),
        lambda m: m.infer("hi"),
        lambda m: m.prefill_only("hi"),
    ]
    if kind == "encoder":
        assert len(model.embed("the ring")) == 64
    else:
        refused.append(lambda m: m.embed("hi"))
    for call in refused:
        with pytest.raises(NotSupported, match="an encoder" if kind == "encoder" else "vocabulary"):
            call(model)
    assert model.phase() == "idle"
    assert model.pending_len() == 0


def test_an_encoder_that_does_not_say_so(opened: Load, tiny: Tiny) -> None:
    """What has no state cannot generate, whatever its file says of its attention."""
    model = opened(tiny("bert", says_causal=False))
    context = model.open_context()
    with pytest.raises(NotSupported, match="encoder"):
        context.step([Row(0, 0, pack(TEXT), logits=True)])
    with pytest.raises(NotSupported, match="encoder"):
        model.new_sampler(SamplingParams(), b"")
    assert model.identity()["generates"] is False
    assert abs(np.linalg.norm(vector(model, TEXT)) - 1) < 1e-6


def test_pooling_is_checked_when_a_model_is_loaded(engine: Engine, tiny: Tiny) -> None:
    """A word that is none is a mistake in the configuration, with its place."""
    with pytest.raises(ConfigError, match=r"model_opts\.pooling"):
        engine.load_model(model_path=str(tiny("llama")), model_opts={"pooling": "max"})


@pytest.mark.real_model
def test_a_real_model_embeds_sensibly(engine: Engine, demo_model_path: Path) -> None:
    """Sentences that say nearly the same are nearer to one another than to any other."""
    pairs = [
        ("The cat sat on the mat.", "A cat was sitting on a mat."),
        ("Quarterly revenue grew by eight percent.", "Revenue rose eight percent this quarter."),
        ("How do I bake sourdough bread?", "What is the way to bake sourdough bread?"),
    ]
    model = engine.load_model(model_path=str(demo_model_path), context_opts={"n_ctx": 512})
    vectors = np.array([model.embed(text) for pair in pairs for text in pair])
    assert vectors.shape == (6, 576)
    cosines = vectors @ vectors.T
    for at in range(0, 6, 2):
        others = [cosines[at, n] for n in range(6) if n not in {at, at + 1}]
        assert cosines[at, at + 1] > max(others) + 0.05
    # By token ids it is the same, as pattern 7 has it; and the model still generates.
    assert model.embed(model.tokenize(pairs[0][0])) == model.embed(pairs[0][0])
    assert model.complete("The sea is", response_tokens=3).generated

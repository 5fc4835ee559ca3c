"""LoRA adapters of tiny models: what they change, what is refused, what is freed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from erllama_backend_llama.adapter import LlamaAdapter
from erllama_backend_llama.model import LlamaModel
from erllama_core.errors import AdapterLoadError, EngineClosed, ModelLoadError
from erllama_core.interfaces.backend import Adapts
from tiny_gguf import LLAMA_SHAPES, write_tiny_gguf, write_tiny_lora

Bench = Callable[..., Any]
Row = npt.NDArray[np.float32]

TOKENS = list(range(40, 90))
N_VOCAB = 288
K = "blk.0.attn_k.weight"


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., Path]:
    """``lora(**options)``: an adapter for the tiny llama model."""

    def make(**options: Any) -> Path:
        return write_tiny_lora(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", **options)

    return make


def compute(b: Any, *adapters: tuple[LlamaAdapter, float]) -> Row:
    """The logits after some tokens, with these adapters attached."""
    b.drop(0)
    b.model.attach(b.context, adapters)
    row: Row = b.feed(0, TOKENS)
    b.drop(0)
    return row


def test_a_model_adapts(bench: Bench) -> None:
    """The backend has the optional ability."""
    assert isinstance(bench().model, Adapts)


@pytest.mark.parametrize("unified", [True, False])
def test_an_adapter_changes_what_is_computed(
    bench: Bench, lora: Callable[..., Path], unified: bool
) -> None:
    """Its scale decides how much; without it, everything is as it was, to the last bit."""
    b = bench(kv_unified=unified, n_seq_max=2)
    one = b.model.load_adapter(lora())
    other = b.model.load_adapter(lora(seed=1, targets=tuple(LLAMA_SHAPES)))
    bare = compute(b)
    loaded = {
        "one": compute(b, (one, 1.0)),
        "half": compute(b, (one, 0.5)),
        "minus": compute(b, (one, -1.0)),
        "other": compute(b, (other, 1.0)),
        "both": compute(b, (one, 1.0), (other, 1.0)),
    }
    rows = [bare, *loaded.values()]
    for number, row in enumerate(rows):
        for another in rows[:number]:
            assert np.abs(row - another).max() > 0.1
    np.testing.assert_array_equal(compute(b, (one, 0.5)), loaded["half"])
    np.testing.assert_array_equal(compute(b), bare)
    one.close()
    other.close()
    np.testing.assert_array_equal(compute(b), bare)


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2", "qwen35"])
def test_every_kind_of_memory_can_be_adapted(
    bench: Bench, lora: Callable[..., Path], arch: str
) -> None:
    """Recurrent and hybrid models compute with adapters, and without them as before."""
    b = bench(arch)
    width = b.model._tensors["token_embd.weight"].shape[0]
    path = lora(
        layers=0,
        metadata={"general.architecture": arch},
        tensors={
            "token_embd.weight.lora_a": (4, N_VOCAB),
            "token_embd.weight.lora_b": (4, width),
        },
    )
    adapter = b.model.load_adapter(path)
    bare = compute(b)
    assert np.abs(compute(b, (adapter, 1.0)) - bare).max() > 0.1
    np.testing.assert_array_equal(compute(b), bare)


def test_adapters_are_changed_while_sequences_are_empty(
    bench: Bench, lora: Callable[..., Path]
) -> None:
    """State that other weights computed cannot be left in a context."""
    b = bench()
    adapter = b.model.load_adapter(lora())
    b.feed(0, TOKENS)
    with pytest.raises(ValueError, match="empty"):
        b.model.attach(b.context, [(adapter, 1.0)])
    other = bench()
    other.feed(0, TOKENS)
    np.testing.assert_array_equal(b.feed(0, [5]), other.feed(0, [5]))


def test_the_state_of_others_would_be_wrong(bench: Bench, lora: Callable[..., Path]) -> None:
    """llama.cpp takes state that was computed without the adapter, and computes nonsense with it:
    the reason why adapters are part of what state is stored under.
    """
    b = bench()
    b.feed(0, TOKENS)
    blocks = b.export_chain(0, [0, len(TOKENS)])
    b.drop(0)
    b.model.attach(b.context, [(b.model.load_adapter(lora()), 1.0)])
    right = b.feed(0, [*TOKENS, 5])
    b.drop(0)
    b.restore(0, blocks)
    assert np.abs(b.feed(0, [5]) - right).max() > 1.0


GOOD: dict[str, dict[str, Any]] = {
    "as usual": {},
    "every matrix": {"targets": tuple(LLAMA_SHAPES)},
    "no alpha": {"metadata": {"adapter.lora.alpha": None}},
    "a norm, which is ignored": {"tensors": {"blk.0.attn_norm.weight": (64,)}},
    "tokens": {
        "tensors": {
            "token_embd.weight.lora_a": (4, N_VOCAB),
            "token_embd.weight.lora_b": (4, 64),
        }
    },
    "logits": {"tensors": {"output.weight.lora_a": (64, 4), "output.weight.lora_b": (4, N_VOCAB)}},
    "rank 1": {"rank": 1},
}


@pytest.mark.parametrize("options", GOOD.values(), ids=GOOD)
def test_adapters_that_fit(
    bench: Bench, lora: Callable[..., Path], options: dict[str, Any]
) -> None:
    """What the checks let through, llama.cpp computes with."""
    b = bench()
    bare = compute(b)
    row = compute(b, (b.model.load_adapter(lora(**options)), 1.0))
    assert np.isfinite(row).all()
    assert np.abs(row - bare).max() > 0.1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    # The first ones abort the process if llama.cpp sees them, at once or in the next step.
    "alpha is an integer": ({"metadata": {"adapter.lora.alpha": 4}}, "alpha"),
    "alpha is text": ({"metadata": {"adapter.lora.alpha": "4"}}, "alpha"),
    "type is a number": ({"metadata": {"general.type": 4}}, "general.type is of type u32"),
    "kind is a number": ({"metadata": {"adapter.type": 4}}, "adapter.type is of type"),
    "architecture is a number": ({"metadata": {"general.architecture": 4}}, "architecture"),
    "a third dimension": ({"tensors": {K + ".lora_a": (64, 4, 3)}}, "do not fit"),
    "a third dimension in both": (
        {"tensors": {K + ".lora_a": (64, 4, 3), K + ".lora_b": (4, 128, 3)}},
        "do not fit",
    ),
    "ranks of tokens differ": (
        {
            "tensors": {
                "token_embd.weight.lora_a": (4, N_VOCAB),
                "token_embd.weight.lora_b": (8, 64),
            }
        },
        "do not fit",
    ),
    # These it refuses, or computes nonsense with.
    "alpha is no number": ({"metadata": {"adapter.lora.alpha": float("nan")}}, "alpha"),
    "a model": ({"metadata": {"general.type": "model"}}, "is a model, not an adapter"),
    "nothing said": ({"metadata": {"general.type": None}}, "is a model, not an adapter"),
    "another kind": ({"metadata": {"adapter.type": "ia3"}}, "'ia3'"),
    "another architecture": ({"metadata": {"general.architecture": "gemma3"}}, "'gemma3'"),
    "activated": ({"metadata": {"adapter.alora.invocation_tokens": [1, 2]}}, "activated"),
    "empty": ({"layers": 0}, "no tensors"),
    "half a pair": ({"tensors": {K + ".lora_b": ()}}, "only .lora_a"),
    "too wide": ({"tensors": {K + ".lora_a": (32, 4)}}, "do not fit the model's 64 x 128"),
    "too high": ({"tensors": {K + ".lora_b": (4, 64)}}, "do not fit"),
    "ranks differ": ({"tensors": {K + ".lora_a": (64, 8)}}, "do not fit"),
    "rank 0": ({"tensors": {K + ".lora_a": (64, 0), K + ".lora_b": (0, 128)}}, "do not fit"),
    "no such layer": ({"layers": 5}, "no tensor blk.4.attn_k.weight"),
    "not a part": ({"tensors": {"foo.weight": (64, 4)}}, "'foo.weight'"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_adapters_that_are_refused(
    bench: Bench, lora: Callable[..., Path], options: dict[str, Any], words: str
) -> None:
    """A file that llama.cpp would abort on, or that is for another model, is named and refused."""
    b = bench()
    path = lora(**options)
    with pytest.raises(AdapterLoadError, match=words) as error:
        b.model.load_adapter(path)
    assert str(path) in str(error.value)
    assert np.isfinite(b.feed(0, TOKENS)).all()


def test_files_that_are_no_adapters(
    bench: Bench, tiny: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """Missing, of another format, a model, cut short: each says so, and none is a model's error
    alone.
    """
    b = bench()
    path = tmp_path / "x.gguf"
    with pytest.raises(AdapterLoadError, match="no such file"):
        b.model.load_adapter(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(AdapterLoadError, match="not a GGUF file"):
        b.model.load_adapter(path)
    with pytest.raises(AdapterLoadError, match="is a model"):
        b.model.load_adapter(tiny("llama"))
    content = lora().read_bytes()
    for size in (20, 200, 700, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        with pytest.raises(AdapterLoadError) as error:
            b.model.load_adapter(path)
        assert isinstance(error.value, ModelLoadError)


def test_an_embedding_that_also_makes_the_logits(
    load: Callable[..., LlamaModel], tmp_path: Path, lora: Callable[..., Path]
) -> None:
    """llama.cpp aborts on an adapter of it, so it is refused; others of the model work."""
    model = load(write_tiny_gguf(tmp_path / "tied.gguf", tied=True))
    tensors = {"token_embd.weight.lora_a": (4, N_VOCAB), "token_embd.weight.lora_b": (4, 64)}
    with pytest.raises(AdapterLoadError, match="makes this model's logits"):
        model.load_adapter(lora(tensors=tensors))
    model.attach(model.open_context(), [(model.load_adapter(lora()), 1.0)])


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("unified", [True, False])
def test_weights_that_are_no_numbers(
    bench: Bench, lora: Callable[..., Path], fill: float, unified: bool
) -> None:
    """The model is tried with an adapter when it is attached; what it does to cells is undone."""
    b = bench(kv_unified=unified, n_seq_max=2)
    bare = compute(b)
    bad = b.model.load_adapter(lora(fill=fill))
    with pytest.raises(AdapterLoadError, match="cannot compute with"):
        b.model.attach(b.context, [(bad, 1.0)])
    np.testing.assert_array_equal(compute(b), bare)


def test_an_adapter_is_freed_when_no_context_uses_it(
    load: Callable[..., LlamaModel], tiny: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    """A context that was given up may still compute with it, until it is closed."""
    model = load(tiny("llama"))
    first, second = model.open_context(), model.open_context()
    adapter = model.load_adapter(lora())
    model.attach(first, [(adapter, 1.0)])
    model.attach(second, [(adapter, 1.0)])
    adapter.close()
    adapter.close()
    assert adapter.native is not None
    model.attach(second, [])
    assert adapter.native is not None
    with pytest.raises(TypeError):
        model.attach(second, [(object(), 1.0)])  # type: ignore[list-item]
    first.close()
    assert adapter.native is None
    with pytest.raises(TypeError):
        model.attach(second, [(adapter, 1.0)])
    unused = model.load_adapter(lora())
    unused.close()
    assert unused.native is None


def test_closing_the_model_frees_its_adapters(
    load: Callable[..., LlamaModel], tiny: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    """Attached or not, closed before, after or never."""
    model = load(tiny("llama"))
    context = model.open_context()
    attached, loaded = model.load_adapter(lora()), model.load_adapter(lora(seed=2))
    model.attach(context, [(attached, 1.0)])
    model.close()
    assert attached.native is None
    assert loaded.native is None
    attached.close()
    loaded.close()
    with pytest.raises(EngineClosed):
        model.load_adapter(lora())


def test_adapters_are_loaded_while_a_context_computes(
    bench: Bench, lora: Callable[..., Path]
) -> None:
    """On other threads, any number of them at once; what is computed does not change."""
    b = bench(n_seq_max=2)
    expected = compute(b)
    path = lora()
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                b.model.load_adapter(path).close()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            np.testing.assert_array_equal(compute(b), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_loading_and_unloading_does_not_grow(bench: Bench, lora: Callable[..., Path]) -> None:
    """Hundreds of adapters leave neither descriptors nor memory behind, nor do refused ones."""
    b = bench()
    path = lora(rank=64, targets=tuple(LLAMA_SHAPES))
    refused = lora(layers=5)
    size = path.stat().st_size
    assert size > 1_000_000

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        adapter = b.model.load_adapter(path)
        b.model.attach(b.context, [(adapter, 1.0)])
        b.feed(0, [1, 2, 3])
        b.drop(0)
        b.model.attach(b.context, [])
        adapter.close()
        with pytest.raises(AdapterLoadError):
            b.model.load_adapter(refused)

    for _ in range(60):
        once()
    gc.collect()
    process = psutil.Process()
    before, descriptors = process.memory_info().rss, count()
    for _ in range(200):
        once()
    gc.collect()
    assert count() == descriptors
    # A tenth of what these adapters have together. The allocator keeps the size of a compute
    # buffer or so, 22 MB, and thousands of rounds take no more than hundreds.
    assert process.memory_info().rss - before < 200 * size / 10

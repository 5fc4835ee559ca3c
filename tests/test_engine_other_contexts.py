"""State of one context is never restored into another in which it would mean something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erllama_core import Engine, Model
from stub_engine import make_engine
from tiny_gguf import Arch, write_tiny_gguf, write_tiny_lora

PROMPT = "The keeper of the lamp climbed the stairs each evening, and counted them. " * 3
ARCHS: tuple[Arch, ...] = ("llama", "gemma3", "mamba", "lfm2", "qwen35")
# That the file is another one is not what is tested: all claim to be the same.
CLAIMED = {"fingerprint_mode": "fast_unsafe", "fingerprint": "11" * 32}


def load(engine: Engine, path: Path, context_opts: dict[str, Any], **options: Any) -> Model:
    opts = {"n_ctx": 1024, "n_threads": 1, "flash_attn": False, "swa_full": False}
    chosen: dict[str, Any] = {"tier": ["disk"], "policy": {"cost_gate": "off"}} | options
    return engine.load_model(
        backend="llama", model_path=str(path), context_opts=opts | context_opts, **chosen
    )


def reused(engine: Engine, one: Model, other: Model) -> int:
    """Tokens that another model reads of what one has stored."""
    one.complete(PROMPT, response_tokens=2)
    assert engine.flush(20)
    assert one.complete(PROMPT, response_tokens=2).cache_hit_kind == "exact"
    read = other.complete(PROMPT, response_tokens=2).cache_delta.read
    assert engine.cache.counters().state_rejected == 0, "it was not even tried"
    return read


@pytest.mark.parametrize(
    "change",
    [
        {"flash_attn": True},
        {"type_k": "q8_0"},
        {"type_v": "f32"},
        {"kv_unified": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ARCHS)
def test_another_kind_of_context(arch: Arch, change: dict[str, Any], tmp_path: Path) -> None:
    """Other attention, element types or cells, whatever kind of memory the model has."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch)
    with make_engine(tmp_path / "root") as engine:
        one, other = load(engine, path, {}), load(engine, path, change)
        assert reused(engine, one, other) == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2", "qwen35"])
def test_another_rope(arch: Arch, tmp_path: Path) -> None:
    """Positions that are encoded otherwise, which llama.cpp would accept."""
    one_path = write_tiny_gguf(tmp_path / "one.gguf", arch)
    other_path = write_tiny_gguf(tmp_path / "other.gguf", arch, rope_base=20000.0)
    with make_engine(tmp_path / "root") as engine:
        one, other = load(engine, one_path, {}, **CLAIMED), load(engine, other_path, {}, **CLAIMED)
        assert reused(engine, one, other) == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2", "qwen35"])
def test_a_scaled_rope(arch: Arch, tmp_path: Path) -> None:
    """Positions that are scaled down, which llama.cpp would accept too."""
    one_path = write_tiny_gguf(tmp_path / "one.gguf", arch)
    other_path = write_tiny_gguf(tmp_path / "other.gguf", arch, rope_scale=4.0)
    with make_engine(tmp_path / "root") as engine:
        one, other = load(engine, one_path, {}, **CLAIMED), load(engine, other_path, {}, **CLAIMED)
        assert reused(engine, one, other) == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2", "qwen35"])
def test_a_quantised_cache_that_is_not_rotated(
    arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp rotates K and V before it quantises them, unless it is told by the environment."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch)
    quantised = {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True}
    with make_engine(tmp_path / "root") as engine:
        one = load(engine, path, quantised)
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        assert reused(engine, one, load(engine, path, quantised)) == 0


ADAPTED: dict[Arch, tuple[str, int, int]] = {
    "llama": ("blk.1.attn_k.weight", 64, 128),
    "gemma3": ("blk.1.attn_k.weight", 64, 128),
    "mamba": ("blk.1.ssm_in.weight", 64, 256),
    "lfm2": ("blk.1.attn_k.weight", 128, 64),
    "qwen35": ("blk.1.attn_k.weight", 64, 128),
}
"""A matrix of each model with its sizes, in ggml's order."""


@pytest.mark.parametrize("arch", ARCHS)
def test_another_set_of_adapters(arch: Arch, tmp_path: Path) -> None:
    """One more, or the same at another strength, which llama.cpp would accept."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch)
    name, n_in, n_out = ADAPTED[arch]
    lora = write_tiny_lora(
        tmp_path / "lora.gguf",
        targets=(),
        metadata={"general.architecture": arch},
        tensors={f"{name}.lora_a": (n_in, 4), f"{name}.lora_b": (4, n_out)},
    )
    with make_engine(tmp_path / "root") as engine:
        none = load(engine, path, {})
        full, half, again = (
            load(engine, path, {}, adapters=[{"path": str(lora), "scale": scale}])
            for scale in (1.0, 0.5, 1.0)
        )
        assert reused(engine, none, full) == 0
        assert reused(engine, full, half) == 0
        assert reused(engine, full, again) > 150, "the same set shares what it stores"


def test_the_other_side_of_longrope(tmp_path: Path) -> None:
    """A context so long that other RoPE factors apply; a different one on the same side is the
    same file's, but its length is not told apart.
    """
    path = write_tiny_gguf(tmp_path / "model.gguf", "llama", longrope=True)
    with make_engine(tmp_path / "root") as engine:
        short, long = load(engine, path, {}), load(engine, path, {"n_ctx": 4096})
        assert reused(engine, short, long) == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_other_weights(arch: Arch, tmp_path: Path) -> None:
    """Of the same shapes, in a file of the same metadata."""
    paths = [write_tiny_gguf(tmp_path / f"{seed}.gguf", arch, seed=seed) for seed in (0, 1)]
    with make_engine(tmp_path / "root") as engine:
        one, other = (load(engine, path, {}) for path in paths)
        assert reused(engine, one, other) == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_are_no_difference(arch: Arch, tmp_path: Path) -> None:
    """Contexts of other sizes share what they store; else the tests above would show nothing."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch)
    change = {"n_ctx": 2048, "n_seq_max": 3, "n_threads": 2, "n_batch": 256}
    with make_engine(tmp_path / "root") as engine:
        one, other = load(engine, path, {}), load(engine, path, change)
        assert reused(engine, one, other) > 150

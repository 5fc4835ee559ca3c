"""The engine on real llama.cpp contexts, one tiny random model of each memory class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erllama_core import Engine, Model
from erllama_core.errors import ModelLoadError, PromptTooLong
from stub_engine import make_engine
from tiny_gguf import Arch, write_tiny_gguf

PROMPT = "The keeper of the lamp climbed the stairs each evening, and counted them. " * 6
ARCHS: dict[Arch, str] = {
    "llama": "span",
    "gemma3": "span",
    "mamba": "whole",
    "lfm2": "checkpoint",
    "qwen35": "checkpoint",
}
SEPARATE: dict[Arch, str] = ARCHS | {"gemma3": "checkpoint"}
"""With cells of its own for each sequence a window is nothing that can be cut."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[Arch, Path]:
    folder = tmp_path_factory.mktemp("models")
    for arch in ARCHS:
        write_tiny_gguf(folder / f"{arch}.gguf", arch)
    return {arch: folder / f"{arch}.gguf" for arch in ARCHS}


def load(engine: Engine, path: Path, **options: Any) -> Model:
    defaults: dict[str, Any] = {
        "tier": ["ram", "disk"],
        "policy": {"boundary_align_tokens": 64},
    }
    context_opts = {"n_ctx": 1024, "n_threads": 1, "flash_attn": False, "n_seq_max": 2}
    context_opts |= options.pop("context_opts", {})
    return engine.load_model(
        backend="llama", model_path=str(path), context_opts=context_opts, **{**defaults, **options}
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_every_memory_class_restores(arch: Arch, tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """Cold, exact, longer and after a restart: what is reused is what was computed."""
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny[arch])
        assert model.info().kv_class == ARCHS[arch]
        cold = model.complete(PROMPT, response_tokens=12)
        assert cold.cache_hit_kind == "cold"
        exact = model.complete(PROMPT, response_tokens=12)
        assert (exact.cache_hit_kind, exact.generated) == ("exact", cold.generated)
        assert exact.stats.restored_bytes > 0
        longer = model.complete([*cold.context_tokens, 40, 41], response_tokens=12)
        assert longer.cache_hit_kind == "partial"
        assert longer.cache_delta.read >= cold.committed_tokens
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny[arch])
        again = model.complete(PROMPT, response_tokens=12)
        assert (again.cache_hit_kind, again.generated) == ("exact", cold.generated)
        plain = load(engine, tiny[arch], tier=[])
        expected = plain.complete([*cold.context_tokens, 40, 41], response_tokens=12)
        assert longer.generated == expected.generated
        assert engine.cache.counters().state_rejected == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_separate_cells_restore(arch: Arch, tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """With cells of its own for each sequence: the same hits, and to the letter, as nobody
    else's cells change how a sum is rounded.
    """
    separate = {"context_opts": {"kv_unified": False}}
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny[arch], **separate)
        assert model.info().kv_class == SEPARATE[arch]
        cold = model.complete(PROMPT, response_tokens=12)
        branch = [*cold.context_tokens[:100], 50, 51, 52]
        model.complete(branch, response_tokens=4)
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny[arch], **separate)
        again = model.complete(PROMPT, response_tokens=12)
        assert (again.cache_hit_kind, again.generated) == ("exact", cold.generated)
        longer = [*cold.context_tokens, 40, 41]
        streams = [model.infer(tokens, response_tokens=12) for tokens in (longer, branch)]
        done = [stream.result() for stream in streams]
        assert done[0].cache_delta.read >= cold.committed_tokens
        assert done[1].cache_delta.read >= 100
        plain = load(engine, tiny[arch], tier=[], **separate)
        for result, tokens in zip(done, (longer, branch), strict=True):
            assert result.generated == plain.complete(tokens, response_tokens=12).generated
        assert engine.cache.counters().state_rejected == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_branch_inside_a_block(arch: Arch, tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """A span model restores a part of a block, and computes what a cold one would."""
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny[arch])
        first = model.complete(PROMPT, response_tokens=4)
        tokens = list(first.context_tokens[:100])
        branch = model.complete([*tokens, 50, 51, 52], response_tokens=12)
        assert branch.cache_delta.read == 100
        expected = load(engine, tiny[arch], tier=[]).complete(
            [*tokens, 50, 51, 52], response_tokens=12
        )
        assert branch.generated == expected.generated


@pytest.mark.parametrize(
    "change",
    [
        {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
        {"type_k": "f32", "type_v": "f32"},
        {"flash_attn": True},
    ],
    ids=str,
)
def test_a_context_of_another_kind_never_restores(
    change: dict[str, Any], tiny: dict[Arch, Path], tmp_path: Path
) -> None:
    """State of other element types or another attention is not even looked at."""
    with make_engine(tmp_path) as engine:
        load(engine, tiny["llama"]).complete(PROMPT, response_tokens=2)
        other = load(engine, tiny["llama"], context_opts=change)
        assert other.complete(PROMPT, response_tokens=2).cache_hit_kind == "cold"
        assert engine.cache.counters().state_rejected == 0


def test_other_weights_never_restore(tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """Two files that differ in their weights share nothing; a copy of a file shares all."""
    write_tiny_gguf(tmp_path / "other.gguf", "llama", seed=1)
    (tmp_path / "copy.gguf").write_bytes(tiny["llama"].read_bytes())
    with make_engine(tmp_path / "root") as engine:
        load(engine, tiny["llama"]).complete(PROMPT, response_tokens=2)
        engine.flush()
        other = load(engine, tmp_path / "other.gguf").complete(PROMPT, response_tokens=2)
        assert other.cache_hit_kind == "cold"
        copy = load(engine, tmp_path / "copy.gguf").complete(PROMPT, response_tokens=2)
        assert copy.cache_hit_kind == "exact"


def test_requests_run_together(tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """Two streams in one batch and two waiting: each its own reply, sequences given back."""
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny["llama"])
        plain = load(engine, tiny["llama"], tier=[])
        prompts = [PROMPT[:200], PROMPT[3:300], PROMPT[5:90], PROMPT[7:400]]
        streams = [model.infer(prompt, response_tokens=10) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            expected = plain.complete(prompt, response_tokens=10)
            assert stream.result().generated == expected.generated
        engine.flush()
        assert model.info().available_seqs == 2


def test_a_prompt_that_is_too_long_harms_no_other(tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """It is refused by the call, and the next request is served."""
    with make_engine(tmp_path) as engine:
        model = load(engine, tiny["llama"])
        with pytest.raises(PromptTooLong):
            model.complete([40] * 1024)
        assert model.complete("still here", response_tokens=2).finish_reason == "length"


@pytest.mark.parametrize("damage", ["missing", "empty", "not a model", "cut"])
def test_files_that_are_no_models(damage: str, tiny: dict[Arch, Path], tmp_path: Path) -> None:
    """One clear error that names the file; the engine goes on."""
    path = tmp_path / "model.gguf"
    if damage != "missing":
        whole = tiny["llama"].read_bytes()
        contents = {"empty": b"", "not a model": b"hello" * 9999, "cut": whole[: len(whole) // 2]}
        path.write_bytes(contents[damage])
    with make_engine(tmp_path / "root") as engine:
        with pytest.raises(ModelLoadError) as caught:
            load(engine, path)
        assert str(path) in str(caught.value)
        assert load(engine, tiny["llama"]).complete("x", response_tokens=1).generated

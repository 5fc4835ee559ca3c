"""What makes state incompatible is in the identity, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erllama_backend_llama import native

Bench = Callable[..., Any]
Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"flash_attn": True}, {"flash_attn": False}),
        ({"type_k": "f16"}, {"type_k": "q8_0"}),
        ({"type_v": "f16"}, {"type_v": "f32"}),
        ({"kv_unified": True}, {"kv_unified": False}),
    ],
)
def test_incompatible_contexts_differ(
    bench: Bench, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Each property that changes the layout of state changes the identity."""
    assert bench("llama", **one).model.identity() != bench("llama", **other).model.identity()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2", "qwen35"])
def test_flash_attention_is_resolved(bench: Bench, arch: str) -> None:
    """ "auto" has the identity of what it became, not one of its own."""
    automatic = bench(arch, flash_attn="auto").model.identity()
    chosen = [bench(arch, flash_attn=value).model.identity() for value in (True, False)]
    assert chosen.count(automatic) == 1
    assert chosen[0] != chosen[1]


def test_sizes_and_threads_do_not_matter(bench: Bench) -> None:
    """Contexts that exchange state freely have one identity."""
    options = {"n_ctx": 4096, "n_seq_max": 7, "n_batch": 64, "n_ubatch": 32, "n_threads": 2}
    assert bench("llama").model.identity() == bench("llama", **options).model.identity()


def test_the_number_of_separate_pools_matters_where_state_names_them(bench: Bench) -> None:
    """A range and a recurrent state name their own cells alone, a window every pool there is."""
    for arch, matters in (("llama", False), ("lfm2", False), ("gemma3", True)):
        few, many = (bench(arch, kv_unified=False, n_seq_max=n).model.identity() for n in (2, 3))
        assert (few != many) is matters


def test_kept_and_dropped_window_cells_differ(bench: Bench) -> None:
    """A sliding window with and without its old cells has state of two kinds."""
    kept, dropped = bench("gemma3"), bench("gemma3", swa_full=False)
    assert kept.model.identity() != dropped.model.identity()


def test_context_length_matters_for_longrope_only(bench: Bench, tiny: Tiny) -> None:
    """Where the number of cells selects RoPE factors it is part of the identity."""
    path = tiny("llama", longrope=True)
    short, long = bench(path, n_ctx=1024).model.identity(), bench(path, n_ctx=4096).model.identity()
    assert short != long
    assert "n_ctx" not in bench("llama").model.identity()


def test_rotation_matters(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable that switches the rotation of a quantised cache counts."""
    before = bench("llama", type_k="q8_0").model.identity()
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    assert bench("llama", type_k="q8_0").model.identity() != before


def test_the_native_build_is_hashed(bench: Bench) -> None:
    """The identity names the libraries that computed the state, byte for byte."""
    digest = bench("llama").model.identity()["llama_cpp_build"]
    assert digest == native.build_digest()
    assert len(digest) == 64
    files = native._libraries()
    assert any("llama" in path.name for path in files)
    assert any("ggml" in path.name for path in files)
    assert native._digest(files) == digest
    assert native._digest(files[:-1]) != digest


def test_identity_needs_the_context(tiny: Tiny, load: Callable[..., Any]) -> None:
    """Before the context is open the identity is not known, which is the caller's error."""
    with pytest.raises(ValueError, match="context"):
        load(tiny("llama")).identity()

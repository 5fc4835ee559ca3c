"""Files that are no usable models, and what is said about them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erllama_backend_llama.model import load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.errors import ModelLoadError
from erllama_core.interfaces.backend import BackendRequest, ContextOptions

Load = Callable[..., Any]


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, entries)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "truncated within its header"),
        (b"PK\x03\x04" + b"x" * 100, "convert the model to GGUF"),
        (header()[:20], "truncated within its header"),
        (header(version=1) + b"x" * 100, "GGUF version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + b"x" * 100, "big-endian"),
        (header(tensors=10, entries=10) + b"x" * 100, "cannot hold"),
        (header(tensors=2**60), "cannot hold"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, load: Load, content: bytes, words: str) -> None:
    """llama.cpp never sees a file that is not GGUF or ends in its header; the error helps."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=words) as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_file_and_missing_path(tmp_path: Path, load: Load) -> None:
    """A path that leads nowhere, a folder, and no path at all each say so."""
    with pytest.raises(ModelLoadError, match="no such file"):
        load(tmp_path / "absent.gguf")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(ModelLoadError, match="needs model_path"):
        load_model(
            BackendRequest(model_path=None, options=LlamaOptions(), context=ContextOptions())
        )


def test_truncated_tensors_carry_the_native_reason(
    tmp_path: Path, tiny: Callable[..., Path], load: Load
) -> None:
    """A file that ends within its tensors is refused with what llama.cpp said of it."""
    path = tmp_path / "short.gguf"
    content = tiny("llama").read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ModelLoadError) as error:
        load(path)
    assert error.value.reason is not None
    assert "tensor" in error.value.reason


def test_unknown_architecture_carries_the_native_reason(
    tmp_path: Path, tiny: Callable[..., Path], load: Load
) -> None:
    """An architecture that llama.cpp does not know is named."""
    path = tmp_path / "other.gguf"
    path.write_bytes(tiny("llama").read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(ModelLoadError, match="lamma"):
        load(path)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"kv_unified": False, "n_ctx": 2**24, "n_seq_max": 200}, "n_ctx or n_seq_max"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"n_threads": 0}, "n_threads"),
        ({"n_seq_max": 0}, "n_seq_max"),
        ({"n_seq_max": 256}, "n_seq_max"),
        ({"n_seq_max": 32, "n_batch": 32}, "larger than n_seq_max"),
        ({"type_k": "q8"}, "did you mean 'q8_0'"),
        ({"type_v": "int8"}, "type_v"),
        ({"type_v": "q8_0", "flash_attn": False}, "flash attention"),
        ({"flash_attn": "on"}, "flash_attn"),
    ],
)
def test_context_options_are_checked_before_loading(
    load: Load, tiny: Callable[..., Path], context: dict[str, Any], words: str
) -> None:
    """Values that llama.cpp aborts on, refuses or ignores are an error that names the option."""
    with pytest.raises(ModelLoadError, match=words):
        load(tiny("llama"), **context)


def test_context_that_llama_cpp_refuses_carries_the_native_reason(
    load: Load, tiny: Callable[..., Path]
) -> None:
    """A cache type whose blocks do not divide the model's heads is refused with the reason."""
    model = load(tiny("llama", head_dim=48), type_k="q8_0", flash_attn=True)
    with pytest.raises(ModelLoadError, match="block size") as error:
        model.open_context()
    assert error.value.reason


@pytest.mark.parametrize(
    "context",
    [
        {"n_ctx": 1, "n_batch": 2, "n_ubatch": 1},
        {"n_ctx": 1, "n_batch": 2, "n_seq_max": 1},
        {"n_seq_max": 255, "n_batch": 256, "n_ctx": 1},
        {"n_seq_max": 255, "n_batch": 2048, "n_ubatch": 1, "n_ctx": 100},
        {"n_seq_max": 20, "n_batch": 21, "n_ubatch": 4, "n_ctx": 3},
    ],
)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("unified", [True, False])
def test_the_smallest_contexts_open(
    bench: Callable[..., Any], arch: str, context: dict[str, Any], unified: bool
) -> None:
    """What passes the checks does not make llama.cpp abort, and computes."""
    b = bench(arch, kv_unified=unified, **context)
    assert b.context.n_ctx == 256
    assert b.context.n_batch > b.context.n_seq_max or b.context.n_batch == context["n_batch"]
    for seq in range(min(3, b.context.n_seq_max)):
        b.feed(seq, [1, 2, 3, 4, 5])

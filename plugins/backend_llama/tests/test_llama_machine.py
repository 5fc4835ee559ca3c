"""The state machine of contexts on llama.cpp, for every kind of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp

from context_machine import N_CTX, N_SEQ, Setup, run_machine
from erllama_backend_llama.model import LlamaModel
from erllama_core.interfaces.backend import Context, KVClass

Load = Callable[..., LlamaModel]

SEPARATE: dict[str, Any] = {"kv_unified": False, "flash_attn": False}
EXACT = [
    # With cells of their own and without flash attention nothing is rounded differently.
    ("llama", SEPARATE),
    ("mamba", SEPARATE),
    ("mamba", {"flash_attn": True}),
    ("lfm2", SEPARATE),
    ("qwen35", SEPARATE),
]
ROUNDED = [
    ("gemma3", SEPARATE),
    ("gemma3", SEPARATE | {"swa_full": False}),
    ("gemma3", {"swa_full": False, "flash_attn": False}),
    ("gemma3", {"swa_full": False, "flash_attn": True}),
    ("llama", {"flash_attn": True}),
    ("lfm2", {"flash_attn": False}),
    ("lfm2", {"flash_attn": True}),
    ("qwen35", {"flash_attn": False}),
    ("qwen35", {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}),
]


@contextlib.contextmanager
def aborting() -> Iterator[None]:
    """Half of a step is computed, then it is aborted: as llama.cpp leaves it."""
    decode = llama_cpp.llama_decode

    def late(context: Any, batch: Any) -> int:
        half: Any = llama_cpp.llama_batch.from_buffer_copy(batch)
        half.n_tokens //= 2
        half.logits = None
        assert decode(context, half) == 0
        return 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", late)
        yield


def with_nan(snapshot: bytes) -> bytes:
    """The last numbers of a recurrent state are none."""
    return snapshot[:-16] + np.full(4, np.nan, dtype="<f4").tobytes()


def kv_class_of(arch: str, options: dict[str, Any]) -> KVClass:
    if arch == "mamba":
        return KVClass.WHOLE
    return KVClass.SPAN if arch == "llama" else KVClass.CHECKPOINT


def setup_of(path: Path, load: Load, arch: str, options: dict[str, Any], rounding: float) -> Setup:
    opened: list[LlamaModel] = []

    def open_context() -> Context:
        model = load(path, n_ctx=N_CTX, n_seq_max=N_SEQ, n_ubatch=64, **options)
        opened.append(model)
        context = model.open_context()
        assert context.kv_class is kv_class_of(arch, options)
        return context

    recurrent = arch in {"mamba", "qwen35"}
    return Setup(
        open=open_context,
        rounding=rounding,
        failing=aborting,
        poison=with_nan if recurrent else None,
        contains_poison=arch == "mamba" or options.get("kv_unified") is False,
    )


@pytest.mark.parametrize(("arch", "options"), EXACT)
def test_restored_state_is_exact(
    tiny: Callable[..., Path], load: Load, arch: str, options: dict[str, Any]
) -> None:
    """After anything that can happen to them sequences go on bit for bit."""
    run_machine(setup_of(tiny(arch), load, arch, options, 0.0), examples=6, steps=50)


@pytest.mark.parametrize(("arch", "options"), ROUNDED)
def test_restored_state_is_right(
    tiny: Callable[..., Path], load: Load, arch: str, options: dict[str, Any]
) -> None:
    """Where cells may lie elsewhere, the difference is that of rounding and no more."""
    run_machine(setup_of(tiny(arch), load, arch, options, 0.06), examples=4, steps=50)


@pytest.mark.fuzz
@pytest.mark.parametrize(("arch", "options"), [*EXACT, *ROUNDED])
def test_many_ways(
    tiny: Callable[..., Path], load: Load, arch: str, options: dict[str, Any]
) -> None:
    """The same over many thousands of steps."""
    rounding = 0.0 if (arch, options) in EXACT else 0.06
    run_machine(setup_of(tiny(arch), load, arch, options, rounding), examples=60, steps=100)

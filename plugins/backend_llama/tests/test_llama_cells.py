"""llama.cpp keeps the contract of contexts, with one pool of cells and with separate ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from context_contract import N_CTX, N_SEQ, ContextContract
from erllama_core.interfaces.backend import Context, KVClass

Bench = Callable[..., Any]


class TestLlamaContext(ContextContract):
    """Full attention, a hybrid model, and a recurrent one for whole states."""

    # Batches of other shapes are rounded otherwise; another token's logits are off by 1 and more.
    rounding = 0.06
    flash_attn = False
    archs: ClassVar[dict[KVClass, str]] = {
        KVClass.SPAN: "llama",
        KVClass.CHECKPOINT: "lfm2",
        KVClass.WHOLE: "mamba",
    }

    @pytest.fixture(autouse=True)
    def opened_by(self, bench: Bench) -> None:
        self._bench = bench

    def open(self, *, unified: bool, kv_class: KVClass) -> Context:
        arch = self.archs[kv_class]
        context: Context = self._bench(
            arch,
            n_ctx=N_CTX,
            n_seq_max=N_SEQ,
            kv_unified=unified,
            swa_full=False,
            flash_attn=self.flash_attn,
        ).context
        assert context.kv_class is kv_class
        return context


class TestLlamaFlashAttention(TestLlamaContext):
    """The same with the other layout of V, and a hybrid model with positions of several parts."""

    flash_attn = True
    archs = TestLlamaContext.archs | {KVClass.CHECKPOINT: "qwen35"}


class TestLlamaWindow(TestLlamaContext):
    """A sliding window whose old cells are not kept."""

    archs = TestLlamaContext.archs | {KVClass.CHECKPOINT: "gemma3"}

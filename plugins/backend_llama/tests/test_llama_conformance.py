"""llama.cpp, as this backend wraps it, keeps what every backend promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from erllama_core.conformance import BackendConformance, BackendSubject
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import BackendModel, BackendRequest, ContextOptions
from tiny_gguf import write_tiny_lora

HOST = PluginHost()

N_VOCAB = 288
Tiny = Callable[..., Path]


class OfTinyModels(BackendConformance):
    """Models that the tests make themselves; each class one kind of memory."""

    __test__ = False
    arch = "llama"
    flash_attn = False
    swa_full = True
    # Batches of other shapes are rounded otherwise; another token's logits are off by 1 and more.
    rounding = 0.06

    @pytest.fixture
    def subject(self, tiny: Tiny) -> BackendSubject:
        path = tiny(self.arch)
        provider = HOST.get("backend", "llama")
        chosen = ContextOptions(
            n_ctx=512,
            n_seq_max=3,
            n_batch=512,
            n_threads=1,
            flash_attn=self.flash_attn,
            swa_full=self.swa_full,
        )

        def open_model(context: ContextOptions) -> BackendModel:
            return provider.factory(
                BackendRequest(model_path=path, options=provider.config(), context=context)
            )

        def write_adapter(file: Path) -> None:
            width = 128 if self.arch == "lfm2" else 64
            embedding = {
                "token_embd.weight.lora_a": (4, N_VOCAB),
                "token_embd.weight.lora_b": (4, width),
            }
            named = {"general.architecture": self.arch}
            write_tiny_lora(file, layers=0, metadata=named, tensors=embedding)

        return BackendSubject(
            write_adapter=write_adapter,
            load=open_model,
            rounding=self.rounding,
            options=chosen,
            restores_exactly=False,
        )


class TestFullAttention(OfTinyModels):
    __test__ = True


class TestFlashAttention(OfTinyModels):
    __test__ = True
    flash_attn = True


class TestSlidingWindow(OfTinyModels):
    __test__ = True
    arch = "gemma3"


class TestWindowThatIsNotKept(OfTinyModels):
    __test__ = True
    arch = "gemma3"
    swa_full = False


class TestRecurrent(OfTinyModels):
    __test__ = True
    arch = "mamba"


class TestHybrid(OfTinyModels):
    __test__ = True
    arch = "qwen35"


class TestHybridOfConvolutions(OfTinyModels):
    __test__ = True
    arch = "lfm2"
    flash_attn = True

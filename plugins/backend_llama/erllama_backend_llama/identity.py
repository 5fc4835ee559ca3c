"""What, besides the weights, decides whether stored state can be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from erllama_backend_llama import native
from erllama_backend_llama.kv_class import MemoryClass
from erllama_core.interfaces.backend import ContextOptions, Identity, KVClass

_NO_ROTATION: Final = "LLAMA_ATTN_ROT_DISABLE"
"""llama.cpp rotates K and V before it quantises them, unless this variable is set."""


def state_identity(
    options: ContextOptions, memory: MemoryClass, metadata: Mapping[str, str], *, n_ctx: int
) -> Identity:
    """Properties that make state incompatible when they differ.

    llama.cpp notices some of them (element types, the layout of V), but accepts state across
    others and then computes nonsense: RoPE, rotation of a quantised cache, its own build. The
    number of cells is among them only where it selects RoPE factors.
    """
    rope = {key: value for key, value in metadata.items() if ".rope." in key}
    identity: dict[str, str | int | float | bool | bytes] = {
        "backend": "llama",
        "llama_cpp_version": native.version(),
        "llama_cpp_build": native.build_digest(),
        "type_k": options.type_k,
        "type_v": options.type_v,
        "v_layout": _v_layout(options, memory),
        "kv_unified": options.kv_unified,
        "kv_class": memory.kv_class.value,
        "rotation_disabled": os.environ.get(_NO_ROTATION, ""),
        **rope,
    }
    names_pools = memory.kv_class is KVClass.WHOLE or (
        memory.kv_class is KVClass.CHECKPOINT and memory.window > 0
    )
    if names_pools and not options.kv_unified:
        identity["n_seq_max"] = options.n_seq_max  # as such states and windows name every pool
    if memory.window:
        identity["swa_full"] = options.swa_full
    if _has_two_ropes(rope):
        identity["n_ctx"] = n_ctx
    return identity


def _v_layout(options: ContextOptions, memory: MemoryClass) -> str:
    # "auto" is resolved inside llama.cpp; what matters of it shows in exported state.
    if memory.v_transposed is None:
        return f"unknown, flash_attn={options.flash_attn}"
    return "transposed" if memory.v_transposed else "rows"


def _has_two_ropes(rope: Mapping[str, str]) -> bool:
    # LongRoPE has one set of factors below the original context length and one above. Files
    # do not always name it; a length without another type of scaling means the same.
    scaling = next((v for k, v in rope.items() if k.endswith(".rope.scaling.type")), None)
    has_length = any(k.endswith(".rope.scaling.original_context_length") for k in rope)
    return scaling == "longrope" or (has_length and scaling in (None, "none"))

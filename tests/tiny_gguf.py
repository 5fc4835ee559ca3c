"""Tiny random-weight GGUF files, one for each kind of llama.cpp memory.

========  ============================================  ==========================
arch      layers                                        memory it exercises
========  ============================================  ==========================
llama     full attention, GQA, RoPE                     attention cells
gemma3    sliding-window and full attention, in turns   two sets of attention cells
mamba     recurrent (Mamba-1)                           one state per sequence
lfm2      short convolution and attention, in turns     hybrid
qwen35    gated delta net and attention, M-RoPE         hybrid, extra data per cell
bert      attention to both sides, learned positions    none: it encodes, and generates nothing
========  ============================================  ==========================

All share one byte-level BPE vocabulary, so every text survives tokenising. Weights depend on
the seed and the tensor's name alone: equal arguments write equal bytes. :func:`write_tiny_lora`
writes adapters for the llama model. Needs the ``gguf`` package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import numpy as np
from gguf import GGUFWriter, RopeScalingType

Arch = Literal["llama", "gemma3", "mamba", "lfm2", "qwen35", "bert"]
ARCHS: Final[tuple[Arch, ...]] = ("llama", "gemma3", "mamba", "lfm2", "qwen35")
"""Those that generate."""

# Token types of the GGUF field tokenizer.ggml.token_type.
_NORMAL: Final = 1
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_UNUSED: Final = 5

BOS: Final = "<|bos|>"
EOS: Final = "<|eos|>"
PAD: Final = "<|pad|>"
CHAT: Final = ("<|im_start|>", "<|im_end|>")
TAGS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")

# Pairs in order of priority; U+0120 stands for the space byte.
_MERGES: Final = (
    ("\u0120", "t"),
    ("h", "e"),
    ("i", "n"),
    ("\u0120", "a"),
    ("r", "e"),
    ("o", "n"),
    ("\u0120t", "he"),
    ("e", "r"),
    ("\u0120", "s"),
    ("a", "t"),
    ("o", "u"),
    ("e", "n"),
    ("in", "g"),
    ("\u0120", "w"),
    ("o", "r"),
    ("\u0120", "o"),
    ("e", "s"),
    ("i", "s"),
)

CHAT_TEMPLATE: Final = (
    "{%- if tools %}<|im_start|>system\n# Tools\n"
    "{%- for t in tools %}\n{{ t | tojson }}{%- endfor %}\n"
    "Answer calls inside <tool_call></tool_call>.<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    # No dash here: it would take the line end off that every later turn has.
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


@attrs.frozen(kw_only=True)
class _Shape:
    """What the caller asked for."""

    arch: Arch
    seed: int
    layers: int
    window: int
    context_length: int
    longrope: bool
    rope_base: float
    head_dim: int
    n_vocab: int
    says_causal: bool
    width: int
    hybrid_window: int


class _Weights:
    """Adds random tensors; shapes are in ggml's order, fastest dimension first."""

    def __init__(self, writer: GGUFWriter, seed: int, *, there: bool) -> None:
        self.writer = writer
        self.seed = seed
        self.there = there

    def _rng(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint64))

    def _add(self, name: str, values: np.ndarray[Any, Any]) -> None:
        if self.there:
            self.writer.add_tensor(name, values)

    def matrix(
        self,
        name: str,
        ne0: int,
        ne1: int,
        gain: float = 1.0,
        dtype: type[Any] = np.float16,
    ) -> None:
        values = self._rng(name).standard_normal((ne1, ne0)) * (gain / np.sqrt(ne0))
        self._add(name, values.astype(dtype))

    def output(self, d: int, gains: Sequence[float]) -> None:
        """A row for each token. Where it is zero, whatever the state, others are likelier."""
        name = "output.weight"
        values = self._rng(name).standard_normal((len(gains), d)) * (3.0 / np.sqrt(d))
        self._add(name, (values * np.array(gains)[:, None]).astype(np.float16))

    def vector(self, name: str, n: int, mean: float = 1.0, std: float = 0.1) -> None:
        values = mean + std * self._rng(name).standard_normal(n)
        self._add(name, values.astype(np.float32))

    def exact(self, name: str, values: Any) -> None:
        self._add(name, np.ascontiguousarray(values, dtype=np.float32))

    def attention(
        self,
        prefix: str,
        d: int,
        heads: int,
        kv: int,
        head_dim: int,
        *,
        q_mult: int = 1,
        qk_norm: bool = False,
    ) -> None:
        self.matrix(prefix + "attn_q.weight", d, heads * head_dim * q_mult, 1.5)
        self.matrix(prefix + "attn_k.weight", d, kv * head_dim, 1.5)
        self.matrix(prefix + "attn_v.weight", d, kv * head_dim)
        self.matrix(prefix + "attn_output.weight", heads * head_dim, d)
        if qk_norm:
            self.vector(prefix + "attn_q_norm.weight", head_dim, 1.5)
            self.vector(prefix + "attn_k_norm.weight", head_dim, 1.5)

    def biased(self, name: str, ne0: int, ne1: int, gain: float = 1.0) -> None:
        self.matrix(name + ".weight", ne0, ne1, gain)
        self.vector(name + ".bias", ne1, 0.0)

    def layer_norm(self, name: str, n: int) -> None:
        self.vector(name + ".weight", n)
        self.vector(name + ".bias", n, 0.0)

    def swiglu(self, prefix: str, d: int, hidden: int) -> None:
        self.matrix(prefix + "ffn_gate.weight", d, hidden)
        self.matrix(prefix + "ffn_up.weight", d, hidden)
        self.matrix(prefix + "ffn_down.weight", hidden, d)


# ------------------------------------------------------------- vocabulary


def _byte_alphabet() -> list[str]:
    """One printable character per byte, as GPT-2's vocabulary has it."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet: list[str] = []
    spare = 0x100
    for byte in range(256):
        if byte in kept:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet


def _vocabulary(tag_type: int, least: int) -> list[tuple[str, int]]:
    tokens = [(text, _NORMAL) for text in _byte_alphabet()]
    tokens += [(left + right, _NORMAL) for left, right in _MERGES]
    tokens += [(text, _CONTROL) for text in (BOS, EOS, PAD, *CHAT)]
    tokens += [(text, tag_type) for text in TAGS]
    while len(tokens) % 32:
        tokens.append((f"<|unused{len(tokens)}|>", _CONTROL))
    tokens += [(f"<|unused{number}|>", _UNUSED) for number in range(len(tokens), least)]
    return tokens


def _add_tokenizer(w: GGUFWriter, vocabulary: Sequence[tuple[str, int]], *, add_bos: bool) -> None:
    texts = [text for text, _ in vocabulary]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(texts)
    w.add_token_types([kind for _, kind in vocabulary])
    w.add_token_merges([f"{left} {right}" for left, right in _MERGES])
    w.add_bos_token_id(texts.index(BOS))
    w.add_eos_token_id(texts.index(EOS))
    w.add_pad_token_id(texts.index(PAD))
    w.add_add_bos_token(add_bos)
    w.add_chat_template(CHAT_TEMPLATE)


def _gain(token: str, says: str) -> float:
    """How far a token's logits are spread: what spreads is often the largest."""
    if says == "anything":
        return 1.0
    if token in TAGS:
        return 2.0 if says == "tags" else 0.0
    text = token.replace("\u0120", " ")
    return float(text.isascii() and text.isprintable() and not text.startswith("<|"))


# ---------------------------------------------------------- architectures


def _common(w: GGUFWriter, shape: _Shape, d: int, hidden: int) -> None:
    w.add_block_count(shape.layers)
    w.add_context_length(shape.context_length)
    w.add_embedding_length(d)
    w.add_feed_forward_length(hidden)
    w.add_layer_norm_rms_eps(1e-5)


def _heads(w: GGUFWriter, heads: int, kv: int | list[int], head_dim: int) -> None:
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)


def _llama(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    d, heads, kv, head_dim, hidden = 64, 4, 2, shape.head_dim, 128
    _common(w, shape, d, hidden)
    _heads(w, heads, kv, head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(shape.rope_base)
    if shape.longrope:  # the long factors apply from a context of 2,048 tokens on
        w.add_string("llama.rope.scaling.type", "longrope")
        w.add_uint32("llama.rope.scaling.original_context_length", 2048)
        t.exact("rope_factors_short.weight", np.ones(head_dim // 2))
        t.exact("rope_factors_long.weight", np.linspace(1.0, 4.0, head_dim // 2))
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        t.vector(prefix + "attn_norm.weight", d)
        t.attention(prefix, d, heads, kv, head_dim)
        t.vector(prefix + "ffn_norm.weight", d)
        t.swiglu(prefix, d, hidden)
    return d


def _gemma3(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    wide = shape.width
    d, heads, kv, head_dim, hidden = 64 * wide, 4 * wide, 2, 64, 128 * wide
    _common(w, shape, d, hidden)
    _heads(w, heads, kv, head_dim)
    w.add_rope_freq_base(shape.rope_base)
    w.add_sliding_window(shape.window)
    w.add_array(
        "gemma3.attention.sliding_window_pattern",
        [layer % 2 == 0 for layer in range(shape.layers)],
    )
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        t.vector(prefix + "attn_norm.weight", d)
        t.attention(prefix, d, heads, kv, head_dim, qk_norm=True)
        t.vector(prefix + "post_attention_norm.weight", d)
        t.vector(prefix + "ffn_norm.weight", d)
        t.swiglu(prefix, d, hidden)
        t.vector(prefix + "post_ffw_norm.weight", d)
    return d


def _mamba(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    d, conv, state, dt = 64 * shape.width, 4, 16, 8 * shape.width
    inner = 2 * d
    _common(w, shape, d, 0)
    w.add_head_count(0)
    w.add_ssm_conv_kernel(conv)
    w.add_ssm_inner_size(inner)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(dt)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        t.vector(prefix + "attn_norm.weight", d)
        t.matrix(prefix + "ssm_in.weight", d, 2 * inner)
        t.matrix(prefix + "ssm_conv1d.weight", conv, inner, dtype=np.float32)
        t.vector(prefix + "ssm_conv1d.bias", inner, 0.0)
        t.matrix(prefix + "ssm_x.weight", inner, dt + 2 * state)
        t.matrix(prefix + "ssm_dt.weight", dt, inner)
        # A slow decay, so that distant tokens still matter.
        t.vector(prefix + "ssm_dt.bias", inner, -4.0, 1.0)
        t.exact(prefix + "ssm_a", -np.tile(np.arange(1, state + 1), (inner, 1)))
        t.vector(prefix + "ssm_d", inner)
        t.matrix(prefix + "ssm_out.weight", inner, d)
    return d


def _lfm2(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    wide = shape.width
    d, heads, kv, head_dim, hidden, l_cache = 128 * wide, 2 * wide, wide, 64, 256 * wide, 3
    is_attention = [layer % 2 == 1 for layer in range(shape.layers)]
    _common(w, shape, d, hidden)
    _heads(w, heads, [kv if here else 0 for here in is_attention], head_dim)
    w.add_rope_freq_base(shape.rope_base)
    w.add_vocab_size(shape.n_vocab)
    w.add_uint32("lfm2.shortconv.l_cache", l_cache)
    if shape.hybrid_window:
        w.add_sliding_window(shape.hybrid_window)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        t.vector(prefix + "attn_norm.weight", d)
        if is_attention[layer]:
            t.attention(prefix, d, heads, kv, head_dim, qk_norm=True)
        else:
            t.matrix(prefix + "shortconv.conv.weight", l_cache, d, dtype=np.float32)
            t.matrix(prefix + "shortconv.in_proj.weight", d, 3 * d)
            t.matrix(prefix + "shortconv.out_proj.weight", d, d, 2.0)
        t.vector(prefix + "ffn_norm.weight", d)
        t.swiglu(prefix, d, hidden)
    return d


def _qwen35(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    wide = shape.width
    d, heads, kv, head_dim, hidden = 64 * wide, 4 * wide, 2, 64, 128 * wide
    conv, state, k_heads, v_heads = 4, 32, 2, 4
    if wide > 1:  # heads of the size that they have in Qwen's own models
        state, k_heads, v_heads = 128, max(1, wide // 2), wide
    inner, key_dim = state * v_heads, state * k_heads
    _common(w, shape, d, hidden)
    _heads(w, heads, kv, head_dim)
    w.add_rope_dimension_count(32)
    w.add_rope_freq_base(shape.rope_base)
    w.add_array("qwen35.rope.dimension_sections", [6, 5, 5, 0])
    w.add_ssm_conv_kernel(conv)
    w.add_ssm_inner_size(inner)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(v_heads)
    w.add_ssm_group_count(k_heads)
    w.add_uint32("qwen35.full_attention_interval", 2)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        t.vector(prefix + "attn_norm.weight", d)
        t.vector(prefix + "post_attention_norm.weight", d)
        if layer % 2 == 1:
            t.attention(prefix, d, heads, kv, head_dim, q_mult=2, qk_norm=True)
        else:
            t.matrix(prefix + "attn_qkv.weight", d, 2 * key_dim + inner)
            t.matrix(prefix + "attn_gate.weight", d, inner)
            t.matrix(prefix + "ssm_conv1d.weight", conv, 2 * key_dim + inner, dtype=np.float32)
            t.vector(prefix + "ssm_dt.bias", v_heads, -3.0, 0.5)
            t.vector(prefix + "ssm_a", v_heads, -1.0, 0.2)
            t.matrix(prefix + "ssm_beta.weight", d, v_heads)
            t.matrix(prefix + "ssm_alpha.weight", d, v_heads)
            t.vector(prefix + "ssm_norm.weight", state)
            t.matrix(prefix + "ssm_out.weight", inner, d)
        t.swiglu(prefix, d, hidden)
    return d


def _bert(w: GGUFWriter, t: _Weights, shape: _Shape) -> int:
    d, heads, hidden = 64, 4, 128
    w.add_block_count(shape.layers)
    w.add_context_length(shape.context_length)
    w.add_embedding_length(d)
    w.add_feed_forward_length(hidden)
    w.add_head_count(heads)
    w.add_layer_norm_eps(1e-5)
    if shape.says_causal:
        w.add_causal_attention(False)
    w.add_token_type_count(2)
    t.matrix("token_types.weight", d, 2, 1.0, np.float32)
    t.matrix("position_embd.weight", d, shape.context_length, 1.0, np.float32)
    t.layer_norm("token_embd_norm", d)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            t.biased(prefix + name, d, d)
        t.layer_norm(prefix + "attn_output_norm", d)
        t.biased(prefix + "ffn_up", d, hidden)
        t.biased(prefix + "ffn_down", hidden, d)
        t.layer_norm(prefix + "layer_output_norm", d)
    return d


_BUILDERS: Final[dict[Arch, Callable[[GGUFWriter, _Weights, _Shape], int]]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "mamba": _mamba,
    "lfm2": _lfm2,
    "qwen35": _qwen35,
    "bert": _bert,
}


def write_tiny_gguf(
    path: Path,
    arch: Arch = "llama",
    *,
    seed: int = 0,
    layers: int = 4,
    window: int = 64,
    context_length: int = 8192,
    longrope: bool = False,
    rope_base: float = 10000.0,
    head_dim: int = 64,
    tags: Literal["control", "user"] = "control",
    add_bos: bool = False,
    tied: bool = False,
    add_eos: bool = False,
    pooling: int | None = None,
    says: Literal["anything", "text", "tags"] = "anything",
    says_causal: bool = True,
    vocab_only: bool = False,
    width: int = 1,
    vocabulary_least: int = 0,
    hybrid_window: int = 0,
    rope_scale: float = 1.0,
) -> Path:
    """Write a model of ``arch`` (0.4 to 1.4 MB) and return its path.

    ``window``: tokens of gemma3's sliding window. ``context_length``: what the metadata says
    the model was trained with. ``longrope``: llama with two sets of RoPE factors.
    ``rope_base``: frequency base of RoPE. ``head_dim``: width of llama's attention heads.
    ``tags``: whether ``<think>`` and its like are control tokens or user-defined ones.
    ``add_bos``: whether the model asks for a BOS.
    ``tied``: the matrix that reads tokens also makes the logits.
    ``add_eos``: whether the model asks for an EOS behind a text. ``pooling``: how its embeddings
    are pooled, a number of llama.h.
    ``says``: what is drawn greedily or with a ``min_p``: any token; printable ASCII alone, where
    the logits of others are zero, far from the 40 largest; or that and tags. Random weights would
    say bytes that are no text, and none that survives a rendering. ``says_causal``: whether bert's
    metadata says that its attention is not causal. ``vocab_only``: leave all tensors out.
    ``width``: how many times as wide the hybrid, recurrent and sliding-window models' layers are,
    for benchmarks. ``vocabulary_least``: how many tokens there are at least; most of them are then
    never used. ``hybrid_window``: tokens of a sliding window of lfm2's attention; 0: it has none.
    ``rope_scale``: by how much positions are scaled down.
    """
    tag_type = _USER_DEFINED if tags == "user" else _CONTROL
    vocabulary = _vocabulary(tag_type, vocabulary_least)
    shape = _Shape(
        arch=arch,
        seed=seed,
        layers=layers,
        window=window,
        context_length=context_length,
        longrope=longrope,
        rope_base=rope_base,
        head_dim=head_dim,
        n_vocab=len(vocabulary),
        says_causal=says_causal,
        width=width,
        hybrid_window=hybrid_window,
    )
    writer = GGUFWriter(path, arch)
    writer.add_name(f"tiny-{arch}-{seed}")
    _add_tokenizer(writer, vocabulary, add_bos=add_bos)
    if add_eos:
        writer.add_add_eos_token(True)
    if rope_scale != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_scale)
    if pooling is not None:
        writer.add_uint32(f"{arch}.pooling_type", pooling)
    weights = _Weights(writer, seed, there=not vocab_only)
    d = _BUILDERS[arch](writer, weights, shape)
    weights.matrix("token_embd.weight", d, shape.n_vocab, float(np.sqrt(d)))
    if arch != "bert":
        if not tied:
            weights.output(d, [_gain(token, says) for token, _ in vocabulary])
        norm = "token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight"
        weights.vector(norm, d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_SHAPES: Final[Mapping[str, tuple[int, int]]] = {
    "attn_q": (64, 256),
    "attn_k": (64, 128),
    "attn_v": (64, 128),
    "attn_output": (256, 64),
    "ffn_gate": (64, 128),
    "ffn_up": (64, 128),
    "ffn_down": (128, 64),
}
"""Matrices of a layer of the llama model that an adapter can change, in ggml's order."""


def write_tiny_lora(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    rank: int = 4,
    targets: Sequence[str] = ("attn_k", "attn_v"),
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    fill: float | None = None,
) -> Path:
    """Write an adapter for the llama model (26 KB) and return its path.

    ``targets``: the matrices of each layer that it changes. ``metadata``: values (strings,
    floats, integers, lists) that are written in place of the usual ones, or None to leave a key
    out. ``tensors``: shapes, in ggml's order, of tensors that are written instead of the usual
    ones or besides them; an empty shape leaves one out. ``fill``: what every weight is, instead
    of a random number.
    """
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
        **(metadata or {}),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for target in targets:
            name = f"blk.{layer}.{target}.weight"
            ne0, ne1 = LLAMA_SHAPES[target]
            shapes[f"{name}.lora_a"] = (ne0, rank)
            shapes[f"{name}.lora_b"] = (rank, ne1)
    shapes.update(tensors or {})
    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # it writes the architecture by itself
    for key, value in values.items():
        if value is not None:
            _add_value(writer, key, value)
    weights = _Weights(writer, seed, there=True)
    for name, shape in shapes.items():
        if not shape:
            continue
        size = tuple(reversed(shape))
        if fill is None:
            numbers = weights._rng(name).standard_normal(size) / np.sqrt(shape[0])
        else:
            numbers = np.full(size, fill)
        weights.exact(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)

"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_gguf
from erllama_core.errors import EngineClosed, InvalidPrompt

Load = Callable[..., Any]
Tiny = Callable[..., Path]


def tokens_of(packed: bytes) -> list[int]:
    return [int(token) for token in np.frombuffer(packed, "<u4")]


def test_every_text_round_trips(load: Load, tiny: Tiny) -> None:
    """Whatever UTF-8 can hold comes back byte for byte, as does each token's own bytes."""
    vocabulary = load(tiny("llama")).vocabulary

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(codec="utf-8")), st.booleans())
    def check(text: str, parse_special: bool) -> None:
        packed = vocabulary.tokenize(text, add_bos=False, parse_special=parse_special)
        assert vocabulary.detokenize(packed) == text.encode()
        assert vocabulary.detokenize(memoryview(packed)) == text.encode()
        assert b"".join(vocabulary.piece(token) for token in tokens_of(packed)) == text.encode()

    check()


def test_special_text_is_ordinary_unless_asked_for(load: Load, tiny: Tiny) -> None:
    """The text of a control token becomes that token with parse_special, and only then."""
    vocabulary = load(tiny("llama")).vocabulary
    (control,) = (t for t, text in vocabulary.control_tokens.items() if text == "<|im_end|>")
    text = "a<|im_end|>b"
    parsed = tokens_of(vocabulary.tokenize(text, add_bos=False, parse_special=True))
    typed = tokens_of(vocabulary.tokenize(text, add_bos=False, parse_special=False))
    assert control in parsed
    assert not set(typed) & set(vocabulary.control_tokens)
    assert vocabulary.detokenize(vocabulary.tokenize(text, add_bos=False, parse_special=True)) == (
        text.encode()
    )


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_comes_first_once(load: Load, tiny: Tiny, add_bos: bool) -> None:
    """add_bos puts BOS first, unless the text gives it already; what the model wants is told."""
    vocabulary = load(tiny("llama", add_bos=add_bos)).vocabulary
    assert vocabulary.add_bos == add_bos

    def first(text: str, **options: bool) -> list[int]:
        options = {"add_bos": True, "parse_special": True, **options}
        return tokens_of(vocabulary.tokenize(text, **options))

    assert first("x")[0] == vocabulary.bos
    assert first(tiny_gguf.BOS + "x") == first("x")
    assert first("") == [vocabulary.bos]
    assert first(tiny_gguf.BOS, parse_special=False)[0] == vocabulary.bos
    assert len(first(tiny_gguf.BOS, parse_special=False)) > 1
    assert vocabulary.bos not in first("x", add_bos=False)
    assert first("", add_bos=False) == []


def test_vocabulary_facts(load: Load, tiny: Tiny) -> None:
    """Size, end-of-generation and control tokens are those of the file."""
    vocabulary = load(tiny("llama")).vocabulary
    assert vocabulary.n_tokens == 288
    texts = set(vocabulary.control_tokens.values())
    assert {tiny_gguf.BOS, tiny_gguf.EOS, *tiny_gguf.CHAT, *tiny_gguf.TAGS} <= texts
    ends = {vocabulary.piece(token) for token in vocabulary.end_of_generation}
    assert {b"<|eos|>", b"<|im_end|>"} <= ends
    assert b"<|im_start|>" not in ends


def test_user_defined_tokens_are_no_control_tokens(load: Load, tiny: Tiny) -> None:
    """Tags that ordinary text yields are not listed as control tokens."""
    vocabulary = load(tiny("llama", tags="user")).vocabulary
    assert not set(tiny_gguf.TAGS) & set(vocabulary.control_tokens.values())


def test_text_is_the_pieces_for_vocabularies_that_clean_up_spaces(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces before punctuation survive where llama.cpp's own detokenizer drops them."""
    original = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: original(self, "llama-bpe")
    )
    path = tiny_gguf.write_tiny_gguf(tmp_path / "llama3.gguf")
    vocabulary = load(path).vocabulary
    text = "Hello , world . What 's up ? I 'm ok !"
    packed = vocabulary.tokenize(text, add_bos=False, parse_special=False)
    assert vocabulary.detokenize(packed) == text.encode()


def write_spm(path: Path) -> Path:
    """A vocabulary of the SentencePiece kind, in which "</s>" can be merged from pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    pieces = ["\u2581", "a", "b", "<", "/", "s", ">", "</", "s>", "\u2581a"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + pieces)
    writer.add_token_types(kinds + [1] * len(pieces))
    writer.add_token_scores([0.0] * len(tokens) + [float(len(piece)) for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    n_vocab, d = len(tokens) + len(pieces), 32
    for key, value in {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": d,
        "feed_forward_length": d,
        "attention.head_count": 1,
        "rope.dimension_count": d,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in names:
        writer.add_tensor(f"blk.0.{name}.weight", np.eye(d, dtype=np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(d, dtype=np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", np.ones((n_vocab, d), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_text(load: Load, tmp_path: Path) -> None:
    """The space that SentencePiece puts before a text is taken off; a control token that plain
    text would be merged into is refused.
    """
    vocabulary = load(write_spm(tmp_path / "spm.gguf")).vocabulary
    for text in ("ab", " ab", "a b", "\u00e9"):
        packed = vocabulary.tokenize(text, add_bos=False, parse_special=False)
        assert vocabulary.detokenize(packed) == text.encode()
    with pytest.raises(InvalidPrompt, match="</s>"):
        vocabulary.tokenize("a</s>b", add_bos=False, parse_special=False)


def test_bad_text_and_bad_tokens_are_refused(load: Load, tiny: Tiny) -> None:
    """Lone surrogates and ids outside the vocabulary are an InvalidPrompt, not a crash."""
    vocabulary = load(tiny("llama")).vocabulary
    with pytest.raises(InvalidPrompt, match="surrogates"):
        vocabulary.tokenize("a\ud800b", add_bos=False, parse_special=True)
    for token in (288, 2**31, 2**32 - 1):
        with pytest.raises(InvalidPrompt, match="outside the vocabulary"):
            vocabulary.detokenize(token.to_bytes(4, "little"))
    for token in (-1, 288):
        with pytest.raises(IndexError):
            vocabulary.piece(token)
    assert vocabulary.detokenize(b"") == b""


def test_a_closed_models_vocabulary_refuses_to_tokenise(load: Load, tiny: Tiny) -> None:
    """Once the weights are freed tokenising is an error; pieces are still there."""
    model = load(tiny("llama"))
    packed = model.vocabulary.tokenize("abc", add_bos=False, parse_special=False)
    model.close()
    with pytest.raises(EngineClosed):
        model.vocabulary.tokenize("abc", add_bos=False, parse_special=False)
    assert model.vocabulary.detokenize(packed) == b"abc"


@pytest.mark.real_model
def test_demo_vocabulary_round_trips(load: Load, demo_model_path: Path) -> None:
    """A real vocabulary keeps text, and its template and end tokens are read."""
    model = load(demo_model_path)
    vocabulary = model.vocabulary
    text = "Tea \u2615, na\u00efve \U0001f600 text.\n\tdef f(x): return x ** 2  # <|im_end|>\n"
    for parse_special in (False, True):
        packed = vocabulary.tokenize(text, add_bos=False, parse_special=parse_special)
        assert vocabulary.detokenize(packed) == text.encode()
    assert "<|im_end|>" in {vocabulary.piece(t).decode() for t in vocabulary.end_of_generation}
    assert model.chat_template is not None
    assert "<|im_start|>" in model.chat_template
    assert (model.quantisation.type, model.quantisation.bits) == ("q4_1", 4)

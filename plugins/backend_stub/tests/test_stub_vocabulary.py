"""The stub's vocabulary."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_backend_stub import VOCABULARY, StubVocabulary
from erllama_core.errors import InvalidPrompt

CONTROL_TEXTS = sorted(VOCABULARY.control_tokens.values())

texts = st.text()
chats = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(CONTROL_TEXTS))).map("".join)


def ids(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


@given(text=st.one_of(texts, chats), parse_special=st.booleans())
def test_any_text_round_trips(text: str, parse_special: bool) -> None:
    """Detokenising what was tokenised gives the text, with control tokens parsed or not."""
    packed = VOCABULARY.tokenize(text, add_bos=False, parse_special=parse_special)
    assert VOCABULARY.detokenize(packed) == text.encode()
    assert VOCABULARY.detokenize(memoryview(packed)) == text.encode()


@given(tokens=st.lists(st.integers(0, 264)))
def test_pieces_concatenate_to_the_text(tokens: list[int]) -> None:
    """The text of tokens is the concatenation of their pieces."""
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    assert VOCABULARY.detokenize(packed) == b"".join(map(VOCABULARY.piece, tokens))


@given(text=st.one_of(texts, chats))
def test_unparsed_text_never_yields_a_control_token(text: str) -> None:
    """Without parse_special every token is one byte of the text."""
    packed = VOCABULARY.tokenize(text, add_bos=False, parse_special=False)
    assert ids(packed) == list(text.encode())


def test_control_text_becomes_its_token() -> None:
    """Each control token is found, next to any text and to each other."""
    for token, text in VOCABULARY.control_tokens.items():
        packed = VOCABULARY.tokenize(f"é{text}{text}<", add_bos=False, parse_special=True)
        assert ids(packed) == [*"é".encode(), token, token, ord("<")]


def test_bos_is_put_first_once() -> None:
    """add_bos puts it there, unless the parsed text begins with it."""
    tokenize, bos = VOCABULARY.tokenize, VOCABULARY.bos
    assert ids(tokenize("a", add_bos=True, parse_special=True)) == [bos, 97]
    assert ids(tokenize("", add_bos=True, parse_special=True)) == [bos]
    assert ids(tokenize("<|bos|>a", add_bos=True, parse_special=True)) == [bos, 97]
    assert ids(tokenize("<|bos|>a", add_bos=True, parse_special=False))[:2] == [bos, ord("<")]


def test_what_the_vocabulary_says_of_itself_agrees() -> None:
    """Control tokens follow the bytes, and the special ones are among them."""
    assert VOCABULARY.n_tokens == 256 + len(VOCABULARY.control_tokens)
    assert set(VOCABULARY.control_tokens) == set(range(256, VOCABULARY.n_tokens))
    assert VOCABULARY.bos in VOCABULARY.control_tokens
    assert VOCABULARY.end_of_generation <= set(VOCABULARY.control_tokens)
    assert not VOCABULARY.add_bos
    assert StubVocabulary(add_bos=True).add_bos


@pytest.mark.parametrize("token", [265, 0xD800, 0x10FFFF, 0x110000, 0xFFFFFFFF])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    """The error names the id, whatever kind of number it is."""
    with pytest.raises(InvalidPrompt, match=f"token {token} "):
        VOCABULARY.detokenize(struct.pack("<2I", 1, token))


def test_what_is_no_text_or_no_tokens_is_refused() -> None:
    """A lone surrogate and half a token are errors with a reason."""
    with pytest.raises(InvalidPrompt, match="surrogate at index 1"):
        VOCABULARY.tokenize("a\ud800", add_bos=False, parse_special=False)
    with pytest.raises(InvalidPrompt, match="5 bytes"):
        VOCABULARY.detokenize(b"\0\0\0\0\0")

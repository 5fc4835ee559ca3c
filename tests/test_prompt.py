"""Prompts: sequences of token ids that cannot change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_core.prompt import Prompt, pack, unpack

TOKEN_LISTS = st.lists(st.integers(0, 2**32 - 1))


@given(TOKEN_LISTS)
def test_unpack_inverts_pack(tokens: list[int]) -> None:
    """Packing takes four bytes a token, and unpacking gives the same tokens."""
    assert len(pack(tokens)) == 4 * len(tokens)
    assert unpack(pack(tokens)) == tokens
    assert unpack(memoryview(pack(tokens))) == tokens
    assert pack(iter(tokens)) == pack(tokens)


def test_bytes_are_a_sequence_of_small_ids() -> None:
    """Bytes are taken as the ints that they are a sequence of, not as packed tokens."""
    assert Prompt(b"abcd") == [97, 98, 99, 100]


def test_packed_tokens_are_little_endian() -> None:
    """The packed form is little-endian u32 on every machine."""
    assert pack([1, 0x01020304]) == bytes.fromhex("01000000 04030201")


@pytest.mark.parametrize("tokens", [[-1], [2**32], ["1"], [1.0], [None], "abc", 5])
def test_what_is_no_token_id_is_refused(tokens: Any) -> None:
    """Values outside u32, and values that are no integers, raise ValueError."""
    with pytest.raises(ValueError, match="token ids are integers"):
        pack(tokens)
    with pytest.raises(ValueError, match="token ids are integers"):
        Prompt(tokens)


@given(TOKEN_LISTS, st.one_of(st.none(), st.text()))
def test_a_prompt_is_the_sequence_of_its_tokens(tokens: list[int], text: str | None) -> None:
    """Length, items, iteration, membership and equality are those of the list of ids."""
    prompt = Prompt(tokens, text)
    assert len(prompt) == len(tokens)
    assert list(prompt) == tokens
    assert list(reversed(prompt)) == tokens[::-1]
    assert [prompt[i] for i in range(len(tokens))] == tokens
    assert [prompt[i - len(tokens)] for i in range(len(tokens))] == tokens
    assert all(token in prompt for token in tokens)
    assert prompt == tokens
    assert tokens == prompt
    assert prompt == tuple(tokens)
    assert prompt == Prompt(tokens)
    assert prompt != [*tokens, 0]
    assert hash(prompt) == hash(tuple(tokens))
    assert prompt.text == text


@given(TOKEN_LISTS, st.slices(8))
def test_slicing_and_joining_give_plain_lists(tokens: list[int], part: slice) -> None:
    """A slice or a sum is a list, since the text belongs to the whole prompt only."""
    prompt = Prompt(tokens, "text")
    assert type(prompt[part]) is list
    assert prompt[part] == tokens[part]
    other = [7]
    assert prompt + other == tokens + other
    assert other + prompt == other + tokens
    assert prompt + prompt == tokens + tokens
    assert type(prompt + prompt) is list


def test_a_prompt_equals_no_text_and_no_bytes() -> None:
    """A prompt is not equal to its packed bytes, nor to any text."""
    prompt = Prompt([], "")
    assert prompt != ""
    assert prompt != b""
    assert Prompt([97]) != b"a"


@pytest.mark.parametrize("index", [2, -3])
def test_an_index_outside_raises(index: int) -> None:
    """Indexing behaves as a list's does at its ends."""
    with pytest.raises(IndexError):
        Prompt([1, 2])[index]


@pytest.mark.parametrize("name", ["packed", "text", "other"])
def test_a_prompt_cannot_be_changed(name: str) -> None:
    """No attribute can be set or deleted, so prompts can be shared and used as keys."""
    prompt = Prompt([1, 2, 3], "abc")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(prompt, name, b"")
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        delattr(prompt, name)
    assert {prompt: 1}[Prompt([1, 2, 3])] == 1


def test_packed_tokens_are_taken_as_they_are() -> None:
    """from_packed keeps the bytes, copies a view, and refuses what is not whole tokens."""
    packed = pack([5, 6])
    assert Prompt.from_packed(packed).packed is packed
    source = bytearray(packed)
    prompt = Prompt.from_packed(memoryview(source), "x")
    source[0] = 9
    assert prompt == [5, 6]
    assert prompt.text == "x"
    with pytest.raises(ValueError, match="7 bytes"):
        Prompt.from_packed(b"1234567")


def test_a_prompt_of_a_prompt_shares_its_tokens() -> None:
    """A prompt made of a prompt copies nothing, and has the text that it is given."""
    first = Prompt([1, 2], "one")
    second = Prompt(first)
    assert second == first
    assert second.packed is first.packed
    assert second.text is None


def test_prompts_can_be_copied_and_pickled() -> None:
    """Copies keep tokens and text; prompts travel between processes."""
    prompt = Prompt([1, 2], "one")
    for other in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert other == prompt
        assert other.text == "one"


def test_the_representation_shows_no_content() -> None:
    """A prompt that lands in a log shows its size, never its text."""
    assert repr(Prompt([1, 2, 3], "secret")) == "Prompt(3 tokens, with text)"
    assert repr(Prompt([1])) == "Prompt(1 tokens)"

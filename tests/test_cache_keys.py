"""Keys, namespaces and packed comparison, against the plainest way to say the same."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_core.cache.keys import ContextKeys, common_tokens, digest_fields, salted
from erllama_core.prompt import pack

TOKENS = st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=40)
NAMESPACE = bytes(range(32))


@given(TOKENS, st.integers(1, 9), st.data())
def test_a_key_is_the_hash_of_namespace_and_tokens(
    tokens: list[int], align: int, data: st.DataObject
) -> None:
    """key(n) is SHA-256 over the namespace and the first n tokens, asked in any order."""
    keys = ContextKeys(NAMESPACE, pack(tokens), align)
    for n in data.draw(st.permutations(range(len(tokens) + 1))):
        assert keys.key(n) == hashlib.sha256(NAMESPACE + pack(tokens[:n])).digest()


@given(TOKENS, TOKENS, st.integers(1, 9), st.data())
def test_a_key_with_another_tail(
    tokens: list[int], tail: list[int], align: int, data: st.DataObject
) -> None:
    """key_with(n, tail) is the key of a context that leaves this one at n."""
    n = data.draw(st.integers(0, len(tokens)))
    keys = ContextKeys(NAMESPACE, pack(tokens), align)
    expected = hashlib.sha256(NAMESPACE + pack(tokens[:n] + tail)).digest()
    assert keys.key_with(n, pack(tail)) == expected


@given(TOKENS, TOKENS, st.integers(1, 9))
def test_keys_follow_a_growing_context(first: list[int], more: list[int], align: int) -> None:
    """A context may grow behind its keys; earlier keys stay as they were."""
    tokens = bytearray(pack(first))
    keys = ContextKeys(NAMESPACE, tokens, align)
    before = [keys.key(n) for n in range(len(first) + 1)]
    tokens += pack(more)
    assert [keys.key(n) for n in range(len(first) + 1)] == before
    assert keys.key(len(first) + len(more)) == hashlib.sha256(NAMESPACE + bytes(tokens)).digest()


def test_there_is_no_key_beyond_the_context() -> None:
    """A key that no tokens stand behind is an IndexError, not a wrong name."""
    with pytest.raises(IndexError):
        ContextKeys(NAMESPACE, pack([1, 2]), 4).key(3)


@given(TOKENS, TOKENS, TOKENS)
def test_common_tokens_counts_as_a_loop_would(
    shared: list[int], left: list[int], right: list[int]
) -> None:
    """The binary search finds what comparing token by token finds."""
    a, b = shared + left, shared + right
    expected = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        expected += 1
    assert common_tokens(pack(a), pack(b)) == expected


VALUES = st.one_of(
    st.integers(-3, 3),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.text(max_size=3),
    st.binary(max_size=3),
)
FIELDS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


@given(FIELDS, FIELDS)
def test_digests_are_equal_only_for_equal_fields(
    one: dict[str, int | str | float | bytes], other: dict[str, int | str | float | bytes]
) -> None:
    """No two different mappings share a digest: types, lengths and names are all in it."""
    same = {k: (type(v), v) for k, v in one.items()} == {k: (type(v), v) for k, v in other.items()}
    assert (digest_fields("x", one) == digest_fields("x", other)) == same


def test_purpose_and_salt_separate_namespaces() -> None:
    """Another purpose or another salt, the empty one included, is another namespace."""
    base = digest_fields("model", {"a": 1})
    assert (
        len({base, digest_fields("explicit", {"a": 1}), salted(base, ""), salted(base, "x")}) == 4
    )
    assert salted(base, None) == base

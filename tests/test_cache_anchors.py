"""Text anchors: contexts that read alike are found whatever their tokens, and no others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from erllama_core.cache.anchors import (
    DIGEST_BYTES,
    MAX_ANCHORS,
    Rendering,
    TextKeys,
    read_anchors,
    split_anchors,
)
from erllama_core.prompt import pack, unpack

PIECES = [b"a", b"b", b"ab", b"\xff", b"\x01", b"\xff\x01", b"", b"<c>", b"<c>", b"<d>", b"<"]
"""Tokens 8 and 9 are control tokens; 7 is the same characters as 8, and 6 has none."""
CONTROL = frozenset({8, 9})
RENDERING = Rendering.of(PIECES, CONTROL)

contexts = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


def read(tokens: list[int]) -> list[bytes | int]:
    """What a person sees: runs of text, and control tokens by their number."""
    seen: list[bytes | int] = [b""]
    for token in tokens:
        if token in CONTROL or not PIECES[token]:
            seen += [token, b""]
        else:
            seen[-1] = bytes(seen[-1]) + PIECES[token]
    return seen


@given(contexts, contexts)
def test_two_contexts_render_alike_exactly_when_they_read_alike(a: list[int], b: list[int]) -> None:
    """Only how ordinary text is cut into tokens may differ."""
    assert (RENDERING.text(pack(a)) == RENDERING.text(pack(b))) == (read(a) == read(b))


def test_the_text_of_a_control_token_is_not_the_control_token() -> None:
    """The same characters in a user's message render as something else."""
    assert RENDERING.text(pack([7])) == b"<c>"
    assert RENDERING.text(pack([8])) != b"<c>"


@given(contexts, st.integers(0, 40))
def test_a_prefix_is_cut_where_its_text_ends(tokens: list[int], at: int) -> None:
    """The tokens that read like a text are found by it, or none if a token straddles its end."""
    cut = tokens[:at]
    text = RENDERING.text(pack(cut))
    found = RENDERING.prefix(pack(tokens), text)
    if text:
        assert found is not None
        assert unpack(found) == cut
    straddled = RENDERING.prefix(pack([2, *tokens]), b"a")
    assert straddled is None


@given(contexts, st.lists(st.integers(1, 10), max_size=8), st.integers(0, 40))
def test_digests_do_not_depend_on_how_a_context_grew(
    tokens: list[int], steps: list[int], beyond: int
) -> None:
    """Read in parts or at once, a context has the same names."""
    at_once = TextKeys(b"space", RENDERING, pack(tokens))
    growing = bytearray()
    in_parts = TextKeys(b"space", RENDERING, growing)
    rest = list(tokens)
    for step in steps:
        growing += pack(rest[:step])
        rest = rest[step:]
        in_parts.catch_up()
    growing += pack(rest)
    assert in_parts.probes(beyond) == at_once.probes(beyond)
    end = len(tokens)
    half = end // 2
    for start in (0, half):
        assert in_parts.anchors(start, end, ends_there=True) == at_once.anchors(
            start, end, ends_there=True
        )


@given(contexts)
def test_probes_stand_around_control_tokens_and_at_the_end(tokens: list[int]) -> None:
    """Last first; nothing is asked for where there is no control token."""
    positions = [position for position, _ in TextKeys(b"", RENDERING, pack(tokens)).probes(0)]
    around = {at for i, token in enumerate(tokens) if token in CONTROL for at in (i, i + 1)}
    expected = (around | {len(tokens)}) - {0} if around else set()
    assert positions == sorted(expected, reverse=True)


@given(contexts, contexts)
def test_a_stored_end_is_probed_by_the_next_turn(stored: list[int], said: list[int]) -> None:
    """What is stored up to any place before a control token is found from a longer prompt."""
    first = TextKeys(b"n", RENDERING, pack(stored))
    anchors = split_anchors(first.anchors(0, len(stored), ends_there=True))
    probes = TextKeys(b"n", RENDERING, pack([*stored, 8, *said])).probes(0)
    if stored:
        assert (len(stored), anchors[-1]) in probes
    elsewhere = TextKeys(b"m", RENDERING, pack([*stored, 8, *said])).probes(0)
    assert not {digest for _, digest in elsewhere} & set(anchors)


def test_an_object_names_a_bounded_number_of_places() -> None:
    """The last ones are kept: they are worth most."""
    keys = TextKeys(b"", RENDERING, pack([8, 0] * 1000))
    anchors = keys.anchors(0, 2000, ends_there=False)
    assert len(anchors) == MAX_ANCHORS * DIGEST_BYTES
    assert split_anchors(anchors)[-1] == dict(keys.probes(0))[1999]


def test_what_a_header_says_of_anchors_is_not_trusted() -> None:
    """Anything but whole digests in hexadecimal is no anchor."""
    good = bytes(range(32))
    assert read_anchors(good.hex()) == good
    for bad in (None, 7, [good.hex()], "zz", "ab", good.hex()[:-2], "é" * 32):
        assert read_anchors(bad) == b""
    assert len(read_anchors("ab" * DIGEST_BYTES * 1000)) == MAX_ANCHORS * DIGEST_BYTES

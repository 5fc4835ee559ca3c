"""Text anchors: contexts found by what they read like, where their tokens differ.

A reply is stored in the tokens that were sampled. When the next turn is rendered and tokenised
anew, the same text may come out as other tokens, and a walk along tokens ends there. So an
object carries a second name for each of a few positions in it: a digest of the text up to
there, in which a control token is written out of band, as no text can write it. A look-up that
ends too early asks for the digests of the prompt's own text, before and after each of its
control tokens.

A digest only says where to look. What it leads to is compared with the prompt's text byte by
byte, and found again by its tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable, Sequence
from itertools import accumulate, compress
from typing import Final

import attrs
import xxhash

from erllama_core.interfaces.block import TOKEN_BYTES, Bytes

DIGEST_BYTES: Final = 16
"""XXH3-128: a wrong match is found by comparing, so strength is not asked for."""
MAX_ANCHORS: Final = 256
"""Of one object; what is more than that is left out from the front."""

_ESCAPE: Final = b"\xff"
_ESCAPED: Final = b"\xff\x00"
_OUT_OF_BAND: Final = b"\xff\x01"


@attrs.frozen(eq=False)
class Rendering:
    """What each token of a vocabulary reads like, for comparing contexts by their text.

    Injective but for how ordinary tokens cut the text up: a byte 0xFF is followed by 0x00 in
    text, and by 0x01 and the token's id, four bytes, where a control token stands, or a token
    that has no text.
    """

    pieces: Sequence[bytes]
    """By token."""
    is_control: bytes
    """By token, 0 or 1."""

    @classmethod
    def of(cls, pieces: Iterable[bytes], control: Container[int]) -> Rendering:
        """From the text of every token, and the ids of the control tokens."""
        written = []
        flags = bytearray()
        for token, piece in enumerate(pieces):
            out_of_band = token in control
            flags.append(out_of_band)
            if out_of_band or not piece:
                written.append(_OUT_OF_BAND + token.to_bytes(TOKEN_BYTES, "little"))
            else:
                written.append(piece.replace(_ESCAPE, _ESCAPED) if _ESCAPE in piece else piece)
        return cls(written, bytes(flags))

    def each(self, packed: Bytes) -> list[bytes]:
        """What the tokens read like, one by one."""
        with memoryview(packed) as view, view.cast("I") as tokens:
            return list(map(self.pieces.__getitem__, tokens))

    def text(self, packed: Bytes) -> bytes:
        """What the tokens read like together."""
        return b"".join(self.each(packed))

    def controls(self, packed: Bytes) -> list[int]:
        """Where the control tokens stand."""
        with memoryview(packed) as view, view.cast("I") as tokens:
            return list(compress(range(len(tokens)), map(self.is_control.__getitem__, tokens)))

    def prefix(self, packed: Bytes, text: bytes) -> bytes | None:
        """The leading tokens that read exactly like ``text``; None when none do."""
        pieces = self.each(packed)
        ends = list(accumulate(map(len, pieces)))
        count = bisect.bisect_left(ends, len(text)) + 1
        if count > len(pieces) or b"".join(pieces[:count]) != text:
            return None
        return bytes(packed[: count * TOKEN_BYTES])


class TextKeys:
    """The digests of one growing context. One thread at a time.

    ``tokens`` (packed) is shared with its owner, who only appends to it. The cost is a step
    in C for each token, and a hash for each control token, once.
    """

    __slots__ = ("_done", "_points", "_rendering", "_state", "tokens")

    def __init__(self, namespace: bytes, rendering: Rendering, tokens: bytes | bytearray) -> None:
        self.tokens: Final = tokens
        self._rendering: Final = rendering
        self._state: Final = xxhash.xxh3_128(namespace)
        self._done = 0
        self._points: list[tuple[int, bytes]] = []
        """Positions before and after control tokens, and the digests of the text up to there."""

    def anchors(self, start: int, end: int, *, ends_there: bool) -> bytes:
        """The digests at positions (start, end], one after another.

        ``ends_there``: ``end`` is the end of the context, and has one in any case.
        """
        self.catch_up()
        low = bisect.bisect_right(self._points, start, key=_position)
        high = bisect.bisect_right(self._points, end, key=_position)
        digests = [digest for _, digest in self._points[low:high]]
        if ends_there and end == self._done and (not digests or self._points[high - 1][0] < end):
            digests.append(self._state.digest())
        return b"".join(digests[-MAX_ANCHORS:])

    def points(self) -> list[int]:
        """Positions before and after control tokens, ascending."""
        self.catch_up()
        return [position for position, _ in self._points]

    def probes(self, beyond: int) -> list[tuple[int, bytes]]:
        """Positions after ``beyond``, and their digests, last first; none without control tokens.

        The end of the context is one of them.
        """
        self.catch_up()
        if not self._points:
            return []
        low = bisect.bisect_right(self._points, beyond, key=_position)
        found = self._points[low:]
        if self._done > max(beyond, self._points[-1][0]):
            found.append((self._done, self._state.digest()))
        return found[::-1]

    def catch_up(self) -> None:
        """Read the tokens that were appended; what needs them does it by itself."""
        start = self._done
        packed = bytes(self.tokens[start * TOKEN_BYTES :])
        if not packed:
            return
        pieces = self._rendering.each(packed)
        text = b"".join(pieces)
        state, at = self._state, 0
        # To look for a mark in the text is twice as fast as to look at each token.
        controls = self._rendering.controls(packed) if _OUT_OF_BAND in text else ()
        for control in controls:
            state.update(b"".join(pieces[at:control]))
            self._note(start + control)
            state.update(pieces[control])
            at = control + 1
            self._note(start + at)
        state.update(b"".join(pieces[at:]) if at else text)
        self._done = start + len(pieces)

    def _note(self, position: int) -> None:
        if position and (not self._points or self._points[-1][0] < position):
            self._points.append((position, self._state.digest()))


def split_anchors(anchors: bytes) -> list[bytes]:
    """The digests in an object's anchors."""
    return [anchors[at : at + DIGEST_BYTES] for at in range(0, len(anchors), DIGEST_BYTES)]


def read_anchors(value: object) -> bytes:
    """Anchors as a header has them, in hexadecimal; empty for anything else."""
    if not isinstance(value, str):
        return b""
    try:
        anchors = bytes.fromhex(value)
    except ValueError:
        return b""
    return b"" if len(anchors) % DIGEST_BYTES else anchors[: MAX_ANCHORS * DIGEST_BYTES]


def _position(point: tuple[int, bytes]) -> int:
    return point[0]

"""A prompt: token ids, packed, with the text that they were made from when it is known."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Self, overload

import attrs

_TOKEN: Final = "I"
"""The array type code of a u32."""

TOKEN_BYTES: Final = 4
"""Of a packed token."""

assert array(_TOKEN).itemsize == TOKEN_BYTES


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32. Raises ValueError for what is no such integer."""
    try:
        # An iterator, as array() takes bytes for packed tokens in this machine's byte order.
        packed = array(_TOKEN, iter(tokens))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token ids are integers from 0 to 4294967295: {error}") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes | memoryview) -> list[int]:
    """The inverse of :func:`pack`."""
    tokens = array(_TOKEN)
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


@attrs.frozen(init=False, eq=False, repr=False)
class Prompt(Sequence[int]):
    """An immutable sequence of token ids; thread-safe.

    Equal to any sequence of the same ints, a list included; hashes like a tuple of them.
    Slicing or joining gives a plain list: a part of a prompt no longer has the prompt's text.
    Raises ValueError for ids that are not integers from 0 to 4294967295.
    """

    packed: bytes
    """The ids as little-endian u32."""
    text: str | None
    """What was tokenised, or None when the prompt was given as ids."""
    opening_tokens: int = 0
    """How many tokens at its end open the reply, as a chat's template does; 0: not known."""

    def __init__(self, tokens: Iterable[int], text: str | None = None) -> None:
        packed = tokens.packed if isinstance(tokens, Prompt) else pack(tokens)
        self.__attrs_init__(packed, text)

    @classmethod
    def from_packed(
        cls, packed: bytes | memoryview, text: str | None = None, *, opening_tokens: int = 0
    ) -> Self:
        """A prompt of tokens that are packed already, little-endian u32.

        Raises ValueError when the length is no multiple of four bytes.
        """
        # bytes() copies a view, whose owner may change it, and returns bytes as they are.
        packed = bytes(packed)
        if len(packed) % TOKEN_BYTES:
            raise ValueError(f"{len(packed)} bytes are not packed u32 tokens")
        prompt = cls.__new__(cls)
        prompt.__attrs_init__(packed, text, opening_tokens)
        return prompt

    def __len__(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return unpack(self.packed)[index]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError("token index out of range")
        start = TOKEN_BYTES * position
        return int.from_bytes(self.packed[start : start + TOKEN_BYTES], "little")

    def __iter__(self) -> Iterator[int]:
        return iter(unpack(self.packed))

    def __add__(self, other: Iterable[int]) -> list[int]:
        return [*self, *other]

    def __radd__(self, other: Iterable[int]) -> list[int]:
        return [*other, *self]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Prompt):
            return self.packed == other.packed
        if isinstance(other, Sequence) and not isinstance(other, str | bytes | bytearray):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        # Equal to a tuple of the same ints, so it must hash like one.
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Prompt({len(self)} tokens{', with text' if self.text is not None else ''})"

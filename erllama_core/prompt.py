"""A prompt: token ids, packed, with the text that they were made from when it is known."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, overload

_TOKEN: Final = "I"
assert array(_TOKEN).itemsize == 4


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32. Raises ValueError for what is no such integer."""
    try:
        packed = array(_TOKEN, tokens)
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


class Prompt(Sequence[int]):
    """An immutable sequence of token ids; thread-safe.

    Equal to any sequence of the same ints, a list included. Slicing or joining gives a plain
    list: a part of a prompt no longer has the prompt's text.
    """

    __slots__ = ("_hash", "packed", "text")

    packed: Final[bytes]
    """The ids as little-endian u32."""
    text: Final[str | None]
    """What was tokenised, or None when the prompt was given as ids."""

    def __init__(self, tokens: Iterable[int], text: str | None = None) -> None:
        self.packed = tokens.packed if isinstance(tokens, Prompt) else pack(tokens)
        self.text = text
        self._hash: int | None = None

    @classmethod
    def from_packed(cls, packed: bytes, text: str | None = None) -> Prompt:
        """A prompt of tokens that are packed already."""
        if len(packed) % 4:
            raise ValueError(f"{len(packed)} bytes are not packed u32 tokens")
        prompt = cls((), text)
        object.__setattr__(prompt, "packed", packed)
        return prompt

    def __len__(self) -> int:
        return len(self.packed) // 4

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
        return int.from_bytes(self.packed[4 * position : 4 * position + 4], "little")

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
        if self._hash is None:
            self._hash = hash(tuple(self))
        return self._hash

    def __repr__(self) -> str:
        return f"Prompt({len(self)} tokens{', with text' if self.text is not None else ''})"

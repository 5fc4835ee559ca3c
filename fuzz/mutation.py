"""Other inputs made of good ones: a few changes of the kinds that readers fall over."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

from mutation_json import mutated_json
from target import MOST_BYTES

_BORDERS: Final = sorted(
    {0, 1, 2, 3, 10, 63, 64, 65, 127, 128, 255, 256, 1000, 4095, 4096, 32767, 32768, 65535, 65536}
    | {(1 << bits) + more for bits in (20, 24, 31, 32, 48, 62, 63, 64) for more in (-1, 0, 1)}
)
_DECIMAL: Final = re.compile(rb"[0-9]+")
_ODD_NUMBERS: Final = (b"-1", b"-0", b"1e999", b"-1e999", b"0.1", b"1e-999", b"9" * 5000, b"nan")
_ODD_BYTES: Final = (
    *(b"\0", b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\n", b"\r"),
    *(b"\x1b[2J", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\\ud800", b"\\u0000", b"NaN", b"1e400"),
)
_DEPTHS: Final = (2, 10, 100, 1000, 5000)


def mutated(
    rng: random.Random,
    data: bytes,
    others: Sequence[bytes],
    words: Sequence[bytes],
    *,
    is_json: bool = False,
) -> bytes:
    """``data`` with one to five changes; ``others`` are inputs to take pieces from."""
    if is_json and rng.random() < 0.8:
        return mutated_json(rng, data, others)[:MOST_BYTES]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        rng.choice(_CHANGES)(rng, changed, others, words)
    return bytes(changed[:MOST_BYTES])


def _place(rng: random.Random, data: bytearray) -> int:
    return rng.randint(0, len(data))


def _span(rng: random.Random, data: bytearray) -> slice:
    start = _place(rng, data)
    return slice(start, start + rng.choice((1, 2, 4, 8, 16, rng.randint(1, len(data) + 1))))


def _flip(rng: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(rng: random.Random, data: bytearray, *_: object) -> None:
    del data[_place(rng, data) :]


def _remove(rng: random.Random, data: bytearray, *_: object) -> None:
    del data[_span(rng, data)]


def _repeat(rng: random.Random, data: bytearray, *_: object) -> None:
    span = _span(rng, data)
    piece = bytes(data[span])
    times = min(rng.choice(_DEPTHS), MOST_BYTES // max(1, len(piece)))
    data[span] = piece * max(1, times)


def _swap(rng: random.Random, data: bytearray, *_: object) -> None:
    one, other = sorted((_place(rng, data), _place(rng, data)))
    length = min(other - one, 1 << rng.randrange(8))
    first, second = bytes(data[one : one + length]), bytes(data[other : other + length])
    if len(first) == len(second):
        data[one : one + length], data[other : other + length] = second, first


def _border(rng: random.Random, data: bytearray, *_: object) -> None:
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(_BORDERS) % (1 << 8 * width)
    if len(data) >= width:
        at = rng.randrange(len(data) - width + 1)
        at -= at % width if rng.random() < 0.7 else 0
        data[at : at + width] = number.to_bytes(width, "little")


def _decimal(rng: random.Random, data: bytearray, *_: object) -> None:
    numbers = list(_DECIMAL.finditer(data))
    if numbers:
        start, end = rng.choice(numbers).span()
        odd = rng.random() < 0.4
        data[start:end] = rng.choice(_ODD_NUMBERS) if odd else b"%d" % rng.choice(_BORDERS)


def _odd(rng: random.Random, data: bytearray, *_: object) -> None:
    at = _place(rng, data)
    data[at : at + rng.choice((0, 1))] = rng.choice(_ODD_BYTES)


def _random(rng: random.Random, data: bytearray, *_: object) -> None:
    data[_span(rng, data)] = rng.randbytes(1 << rng.randrange(5))


def _word(
    rng: random.Random, data: bytearray, _others: Sequence[bytes], words: Sequence[bytes]
) -> None:
    if words:
        times = rng.choice((1, 1, 1, 1, 1, *_DEPTHS))
        at = _place(rng, data)
        data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(words) * times
        del data[2 * MOST_BYTES :]


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes], *_: object) -> None:
    if others:
        other = bytearray(rng.choice(others))
        data[_span(rng, data)] = other[_span(rng, other)]


def _cross(rng: random.Random, data: bytearray, others: Sequence[bytes], *_: object) -> None:
    if others:
        other = rng.choice(others)
        data[_place(rng, data) :] = other[rng.randint(0, len(other)) :]


_Change = Callable[[random.Random, bytearray, Sequence[bytes], Sequence[bytes]], None]
_CHANGES: Final[tuple[_Change, ...]] = (
    *(_flip, _set, _cut, _remove, _repeat, _swap, _border, _border, _decimal, _odd, _random),
    *(_word, _word, _word, _splice, _cross),
)

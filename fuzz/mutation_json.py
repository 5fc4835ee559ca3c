"""Other JSON made of good JSON: values in other places, odd ones, and more or fewer of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any, Final

_ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 1e-308, float("inf"), float("nan")),
    *(1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, -(1 << 63), 10**40, "", "a", "0", "\0", "\ud800"),
    *("\U0001f600", "\x1b[2J", "x" * 5000, [], {}, [[]], {"": 0}, [None] * 300, "#", "#/$defs/a"),
    *("^a*$", "(a|a)*", "[", "\\d{1,1000}", "é", "<|im_start|>", "true"),
)
_Place = tuple[Any, Any]
"""A list or a dict, and an index or a key in it."""


def mutated_json(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes of a tree; the bytes themselves where they are no JSON."""
    prefix, tree = _parsed(data)
    if tree is None:
        return data
    _, other = _parsed(rng.choice(others)) if others else (b"", None)
    holder = [tree]
    try:
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            _change(rng, holder, other)
        return prefix + json.dumps(holder[0]).encode()
    except (ValueError, RecursionError):  # deeper than Python can copy
        return data


def _parsed(data: bytes) -> tuple[bytes, Any]:
    """What comes before the tree (a letter that says what it is), and the tree."""
    prefix = data[:1] if data[:1].isalpha() and data[1:2] in {b"{", b"["} else b""
    try:
        return prefix, json.loads(data[len(prefix) :].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return prefix, None


def _places(tree: Any) -> list[_Place]:
    found: list[_Place] = []
    todo = [tree]
    while todo and len(found) < 5000:
        item = todo.pop()
        inner = item.items() if isinstance(item, dict) else enumerate(item)
        for key, value in inner:
            found.append((item, key))
            if isinstance(value, dict | list):
                todo.append(value)
    return found


def _change(rng: random.Random, holder: list[Any], other: Any) -> None:
    places = _places(holder)
    where, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0 and where is not holder:
        del where[key]
    elif kind == 1:
        where[key] = copy.deepcopy(rng.choice(_ODD))
    elif kind == 2:
        source, from_key = rng.choice(places)
        where[key] = copy.deepcopy(source[from_key])
    elif kind == 3 and other is not None:
        source, from_key = rng.choice(_places([other]))
        where[key] = copy.deepcopy(source[from_key])
    elif kind == 4:
        inner = where[key]
        for _ in range(rng.choice((1, 2, 20, 200))):
            inner = [inner] if isinstance(key, int) else {key: inner}
        where[key] = inner
    elif kind == 5 and isinstance(where, list) and where is not holder:
        where[key:key] = [copy.deepcopy(where[key]) for _ in range(rng.choice((1, 2, 50)))]
    elif isinstance(where, dict):
        names = [name for place, name in places if isinstance(place, dict)]
        name = rng.choice(names) if rng.random() < 0.7 else str(rng.choice(_ODD))
        where[name] = where.pop(key) if rng.random() < 0.5 else copy.deepcopy(where[key])

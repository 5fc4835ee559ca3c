"""What a Redis server answers when others have written into its keys."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from target import Run, Target

from erllama_core.errors import CacheError
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_tier_redis import scripts

_ID = ObjectId(ObjectKind.KV, 0, b"\xab" * 32)


class _Said:
    """A server whose keys hold what the input says; only types are those that Redis keeps to."""

    place = "redis"

    def __init__(self, data: bytes) -> None:
        self._left = data

    def _bytes(self) -> bytes:
        """The next string: a length of one byte, and so many."""
        if not self._left:
            return b""
        length = self._left[0]
        found, self._left = self._left[1 : 1 + length], self._left[1 + length :]
        return found

    def _number(self) -> int:
        found, self._left = self._left[:8], self._left[8:]
        return int.from_bytes(found, "little", signed=True)

    def _score(self) -> float | None:
        (found,) = struct.unpack("<d", self._number().to_bytes(8, "little", signed=True))
        return None if found != found else found  # noqa: PLR0124 - no score is NaN

    def run(self, _what: str, commands: Callable[[Any], Any]) -> Any:
        return commands(self)

    def script(self, code: str) -> Callable[..., Any]:
        if code in {scripts.PUT, scripts.DELETE}:
            return lambda **_: [self._number(), self._number()]
        return lambda **_: self._number()

    def close(self) -> None:
        """Nothing to close."""

    # ------------------------------------------------------------------ commands

    def pipeline(self, **_: object) -> _Pipeline:
        return _Pipeline(self)

    def get(self, _name: str) -> bytes | None:
        return self._bytes() or None

    def getrange(self, _name: str, _start: int, end: int) -> bytes:
        return self._bytes()[: end + 1]

    def strlen(self, _name: str) -> int:
        return abs(self._number())

    def zscore(self, _name: str, _member: str) -> float | None:
        return self._score()

    def zadd(self, *_: object, **__: object) -> int:
        return 0

    def pexpire(self, *_: object) -> bool:
        return True

    def exists(self, _name: str) -> int:
        return self._number() & 1

    def hscan(self, *_: object, **__: object) -> tuple[int, dict[bytes, bytes]]:
        return 0, {self._bytes(): self._bytes() for _ in range(self._number() % 4)}

    def _entries(self, most: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        found = []
        for _ in range(min(most, self._number() % 4)):
            entry_id = b"%d-%d" % (abs(self._number()), abs(self._number()))
            fields = {self._bytes(): self._bytes() for _ in range(self._number() % 3)}
            found.append((entry_id, fields))
        return found

    def xrevrange(self, *_: object, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self._entries(count)

    def xrange(
        self, *_: object, count: int, **__: object
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self._entries(count)

    def smembers(self, _name: str) -> set[bytes]:
        return {self._bytes() for _ in range(self._number() % 4)}


class _Pipeline:
    """Commands that are answered together."""

    def __init__(self, said: _Said) -> None:
        self._said = said
        self._answers: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        command = getattr(self._said, name)
        return lambda *args, **kwargs: self._answers.append(command(*args, **kwargs))

    def execute(self) -> list[Any]:
        return self._answers


@contextmanager
def _redis() -> Iterator[Run]:
    from erllama_tier_redis.store import RedisTier

    def run(data: bytes) -> None:
        said: Any = _Said(data)
        tier = RedisTier(said, expire_s=60.0)
        steps: tuple[Callable[[], object], ...] = (
            lambda: list(tier.scan()),
            lambda: list(tier.pins()),
            lambda: tier.find(_ID),
            lambda: tier.read(_ID, lambda size: memoryview(bytearray(size))),
            lambda: tier.delete(_ID),
            lambda: list(tier.rescan()),
            lambda: tier.put(_ID, [b"x"]),
            tier.lead,
        )
        order = data[:1] or b"\0"
        for step in steps[order[0] % len(steps) :] + steps[: order[0] % len(steps)]:
            with suppress(CacheError):
                step()
        assert tier.usage().used_bytes is not None
        assert all(len(key) == 32 for key in _quietly(tier.pins))
        tier.close()

    yield run


def _quietly(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except CacheError:
        return ()


def numbers(*values: int) -> bytes:
    """Numbers as the server above takes them."""
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)


TARGETS = (
    Target(
        name="redis",
        open=_redis,
        words=(
            *(b"\x03put", b"\x03del", struct.pack("<d", float("inf")), struct.pack("<d", -1e300)),
            *(bytes([len(str(_ID))]) + str(_ID).encode(), numbers(1), numbers(2), numbers(-1)),
            *(b"\x01x", b"\x03abc", numbers((1 << 63) - 1), b"\x14" + b"9" * 20),
        ),
        needs=("redis",),
    ),
)

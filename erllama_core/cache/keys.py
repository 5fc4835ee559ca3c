"""Names by content: namespaces, and the key of every prefix of a context."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from erllama_core.cache.anchors import TextKeys
from erllama_core.interfaces.block import FORMAT_VERSION, TOKEN_BYTES, Bytes

_LENGTH: Final = struct.Struct("<Q")
_SCALE: Final = struct.Struct("<f")

FieldValue = str | int | float | bool | bytes


def digest_fields(purpose: str, fields: Mapping[str, FieldValue]) -> bytes:
    """SHA-256 over named values, each with its type and length, in the order of their names.

    Equal mappings and only those give equal digests: 1, 1.0, True and "1" all differ.
    """
    digest = hashlib.sha256()
    for part in (f"erllama/{FORMAT_VERSION}/{purpose}", *sorted(fields)):
        encoded = part.encode()
        digest.update(_LENGTH.pack(len(encoded)) + encoded)
        if part in fields:
            value = fields[part]
            encoded = value if isinstance(value, bytes) else repr(value).encode()
            kind = type(value).__name__.encode().ljust(8, b"\0")
            digest.update(kind + _LENGTH.pack(len(encoded)) + encoded)
    return digest.digest()


def adapted(namespace: bytes, adapters: Iterable[tuple[bytes, float]]) -> bytes:
    """The namespace of a model with adapters; without any, that of the model itself.

    Each adapter is its fingerprint, 32 bytes, and its scale, which counts as the 32-bit float
    that backends compute with. Their order does not matter.
    """
    parts = sorted(fingerprint + _SCALE.pack(scale) for fingerprint, scale in adapters)
    if not parts:
        return namespace
    return digest_fields("adapters", {"namespace": namespace, "adapters": b"".join(parts)})


def salted(namespace: bytes, salt: str | None) -> bytes:
    """The namespace of one caller's salt; without a salt the namespace itself."""
    if salt is None:
        return namespace
    return digest_fields("salt", {"namespace": namespace, "salt": salt})


class ContextKeys:
    """``key(n)`` for one growing context: SHA-256(namespace ‖ tokens[:n]).

    The hash states at aligned positions are kept, so a key costs at most ``align_tokens``
    tokens of hashing. ``tokens`` (packed) is shared with its owner, who only appends to it.
    One thread at a time.
    """

    __slots__ = ("_digests", "_states", "_step", "align_tokens", "namespace", "text", "tokens")

    def __init__(
        self,
        namespace: bytes,
        tokens: bytes | bytearray,
        align_tokens: int,
        text: TextKeys | None = None,
    ) -> None:
        self.namespace: Final = namespace
        self.tokens = tokens
        self.text: Final = text
        """The same context's names by text, where tokens have one."""
        self.align_tokens: Final = align_tokens
        self._step: Final = align_tokens * TOKEN_BYTES
        self._states = [hashlib.sha256(namespace)]
        self._digests: list[bytes | None] = [None]
        """Of the states, once asked for: a look-up asks twice, where a block ends and another
        begins, and a save once more."""

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def key(self, n: int) -> bytes:
        """The key of the first ``n`` tokens. IndexError beyond the context."""
        if not 0 <= n <= len(self):
            raise IndexError(f"no key({n}) in a context of {len(self)} tokens")
        whole, rest = divmod(n, self.align_tokens)
        states = self._states
        while len(states) <= whole:
            at = (len(states) - 1) * self._step
            state = states[-1].copy()
            state.update(self.tokens[at : at + self._step])
            states.append(state)
            self._digests.append(None)
        if not rest:
            digest = self._digests[whole]
            if digest is None:
                digest = self._digests[whole] = states[whole].digest()
            return digest
        state = states[whole].copy()
        state.update(self.tokens[whole * self._step : n * TOKEN_BYTES])
        return state.digest()

    def key_with(self, n: int, tail: Bytes) -> bytes:
        """The key of the first ``n`` tokens followed by ``tail``."""
        whole = n // self.align_tokens
        self.key(whole * self.align_tokens)
        state = self._states[whole].copy()
        state.update(self.tokens[whole * self._step : n * TOKEN_BYTES])
        state.update(tail)
        return state.digest()

    def segment_start(self, n: int) -> int:
        """The last aligned position before the n-th token's end: where its segment starts."""
        return max(0, (n - 1) // self.align_tokens * self.align_tokens)

    def slice(self, start: int, end: int) -> bytes:
        """The packed tokens [start, end)."""
        return bytes(self.tokens[start * TOKEN_BYTES : end * TOKEN_BYTES])


def common_tokens(a: Bytes, b: Bytes) -> int:
    """How many leading tokens two packed runs share.

    Binary search over slices: ten comparisons in C for a block, none of them per token.
    """
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if (
            a[low * TOKEN_BYTES : middle * TOKEN_BYTES]
            == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]
        ):
            low = middle
        else:
            high = middle
    return low

"""Signatures of thinking: that this engine's model thought it, and that nobody changed it."""

from __future__ import annotations

import hmac
from typing import Final

import attrs

MIN_KEY_BYTES: Final = 32


@attrs.frozen(repr=False)
class SigningKey:
    """A secret key. It shows itself nowhere. Raises ValueError for one that is too short."""

    _secret: bytes = attrs.field(validator=attrs.validators.instance_of(bytes))

    def __attrs_post_init__(self) -> None:
        if len(self._secret) < MIN_KEY_BYTES:
            raise ValueError(
                f"a signing key has {MIN_KEY_BYTES} bytes at least; this one has "
                f"{len(self._secret)}"
            )

    def __repr__(self) -> str:
        return "SigningKey(...)"

    def begin(self) -> hmac.HMAC:
        """A signature of what it will be updated with: HMAC-SHA-256, 32 bytes."""
        return hmac.new(self._secret, digestmod="sha256")

    def verify(self, thinking: str | bytes, signature: bytes) -> bool:
        """Whether the signature is that of this thinking. An empty one never is."""
        data = thinking.encode("utf-8", "surrogatepass") if isinstance(thinking, str) else thinking
        return hmac.compare_digest(hmac.digest(self._secret, data, "sha256"), signature)


def verify_thinking(thinking: str | bytes, signature: bytes, key: bytes) -> bool:
    """Whether an engine with this key signed this thinking.

    ``thinking``: the deltas' ``data``, or their text where it was valid UTF-8; ``key``: the
    bytes of the key, 32 at least, else ValueError.
    """
    return SigningKey(key).verify(thinking, signature)


class NoSignature:
    """The signature of an engine without a key: empty."""

    def update(self, data: bytes) -> None:
        """Nothing to do."""

    def digest(self) -> bytes:
        return b""

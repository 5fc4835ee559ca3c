"""Explicit saves: what a caller says of a payload, and how it is named."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

import attrs

from erllama_core.cache.counters import SaveReason
from erllama_core.cache.keys import ContextKeys, digest_fields
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.prompt import pack
from erllama_core.results import CacheKey

SAVE_REASONS: Final[tuple[str, ...]] = get_args(SaveReason)


@attrs.frozen(kw_only=True)
class BlockMeta:
    """What a payload of :meth:`Cache.save` is the state of."""

    save_reason: SaveReason
    fingerprint: bytes
    """Identity of the weights: 32 bytes."""
    fingerprint_mode: str = "safe"
    quant_type: str
    quant_bits: int
    ctx_params_hash: bytes
    tokens: Sequence[int]
    """All tokens from ``start`` on."""
    context_size: int
    start: int = 0
    parent_key: CacheKey | None = None
    """key(start); needed when ``start`` is not 0."""
    prompt_text: str | None = None
    hostname: str | None = None
    version: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.save_reason not in SAVE_REASONS:
            raise ValueError(f"save_reason {self.save_reason!r}: one of {', '.join(SAVE_REASONS)}")
        if len(self.fingerprint) != 32:
            raise ValueError(f"fingerprint has {len(self.fingerprint)} bytes; 32 are needed")
        if self.start < 0 or bool(self.start) != (self.parent_key is not None):
            raise ValueError("a start beyond 0 needs a parent_key, and only it")

    @property
    def namespace(self) -> bytes:
        """A namespace that no model reads: its name differs from theirs before anything else."""
        return digest_fields(
            "explicit",
            {
                "fingerprint": self.fingerprint,
                "quant_type": self.quant_type,
                "quant_bits": self.quant_bits,
                "ctx_params_hash": self.ctx_params_hash,
                "context_size": self.context_size,
                "start": self.start,
                "parent_key": self.parent_key or b"",
            },
        )

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def object_id(self) -> ObjectId:
        """The object's name: its key covers the tokens and, through the namespace, the rest."""
        keys = ContextKeys(self.namespace, pack(self.tokens), max(1, len(self.tokens)))
        return ObjectId(ObjectKind.KV, self.start, keys.key(len(self.tokens)))

    def info(self) -> Mapping[str, Any]:
        """What is written beside the payload, and given back by :meth:`Cache.load`."""
        return {
            "save_reason": self.save_reason,
            "fingerprint": self.fingerprint.hex(),
            "fingerprint_mode": self.fingerprint_mode,
            "quant_type": self.quant_type,
            "quant_bits": self.quant_bits,
            "ctx_params_hash": self.ctx_params_hash.hex(),
            "context_size": self.context_size,
            "parent_key": self.parent_key.hex() if self.parent_key else None,
            "prompt_text": self.prompt_text,
            "hostname": platform.node() if self.hostname is None else self.hostname,
            "version": self.version,
        }

"""What a ``[[tiers]]`` table of this plugin may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
from attrs import validators

from erllama_core.providers import ByteSize

_SCHEMES = ("redis", "rediss", "unix")


def _url(_owner: Any, _attribute: attrs.Attribute[str], value: str) -> None:
    if urlsplit(value).scheme not in _SCHEMES:
        raise ValueError(
            "a URL such as redis://host:6379/0, rediss:// for TLS, or unix:///path is needed"
        )
    if urlsplit(value).password:
        raise ValueError("a password does not belong into the URL; name a password_file")


@attrs.frozen(kw_only=True)
class RedisOptions:
    """Options of the kind ``redis``."""

    url: str = attrs.field(default="redis://localhost:6379/0", validator=_url)
    """The server and its database; ``unix:///path?db=0`` for a socket."""
    username: str | None = None
    password_file: Path | None = None
    """A file whose first line is the password."""
    prefix: str = attrs.field(default="erllama:", validator=validators.min_len(1))
    """What the names of all keys begin with: another prefix, another store."""
    quota_bytes: ByteSize | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(ByteSize(0)))
    )
    """Bytes of all objects together, at most. None: bounded by the server's ``maxmemory``."""
    expire_s: float | None = attrs.field(
        default=None, validator=validators.optional(validators.ge(1))
    )
    """Seconds after its last use at which the server drops an object. None: never."""
    timeout_s: float = attrs.field(default=2.0, validator=validators.gt(0))
    """How long the server may take to answer one command."""
    retry_s: float = attrs.field(default=5.0, validator=validators.ge(0))
    """After the server could not be reached: how long it is left alone."""
    rescan_interval_s: float = attrs.field(default=30.0, validator=validators.ge(0))
    """Seconds between two looks at what other processes stored and removed; 0: never."""

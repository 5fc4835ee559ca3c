"""What a ``[[tiers]]`` table of this plugin may hold."""

from __future__ import annotations

from pathlib import Path

import attrs
from attrs import validators

from erllama_core.providers import ByteSize


@attrs.frozen(kw_only=True)
class DiskOptions:
    """Options of the kind ``disk``."""

    root: Path
    """The store's folder; created when it is missing, ``~`` stands for the home folder."""
    quota_bytes: ByteSize | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(ByteSize(0)))
    )
    """Bytes of all files together, at most. None: bounded by the device alone."""
    rescan_interval_s: float = attrs.field(default=30.0, validator=validators.ge(0))
    """Seconds between two looks at what other processes stored and removed; 0: never."""
    read_only: bool = False
    """Serve what is there and change nothing."""


@attrs.frozen(kw_only=True)
class RamFileOptions:
    """Options of the kind ``ram_file``."""

    root: Path | None = None
    """A folder on a tmpfs. None: a folder of this user's own on ``/dev/shm``, where it exists."""
    quota_bytes: ByteSize | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(ByteSize(0)))
    )
    """Bytes of all files together, at most. None: bounded by the tmpfs alone."""
    rescan_interval_s: float = attrs.field(default=30.0, validator=validators.ge(0))
    """Seconds between two looks at what other processes stored and removed; 0: never."""
    read_only: bool = False
    """Serve what is there and change nothing."""

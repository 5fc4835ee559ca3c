"""The entry point: one kind of tier, and the options that its table takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
from attrs import validators

from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.tier import Tier
from erllama_core.providers import ByteSize, TierProvider


@attrs.frozen(kw_only=True)
class SqliteOptions:
    """The keys of a ``[[tiers]]`` table beside ``name`` and ``kind``.

    erllama reads the table into this class, and tells mistakes with their path: wrong types,
    unknown keys, and what the validators raise.
    """

    path: Path
    """The database file; made, with its folder, when it is missing."""
    quota_bytes: ByteSize | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(ByteSize(0)))
    )
    """Bytes of all objects, at most. ``ByteSize``: a string with a unit will do."""


def open_sqlite(options: SqliteOptions) -> Tier:
    """What an engine calls to open the tier. Raises TierError."""
    # Imported here: `erllama plugins` lists the plugin without loading what it needs.
    from erllama_tier_sqlite.store import SqliteTier

    return SqliteTier(options.path.expanduser(), quota_bytes=options.quota_bytes)


@hookimpl
def erllama_tiers() -> Sequence[TierProvider]:
    """``sqlite``."""
    return [
        TierProvider(
            name="sqlite",
            summary="An SQLite database; kept across restarts.",
            factory=open_sqlite,
            config=SqliteOptions,
        )
    ]

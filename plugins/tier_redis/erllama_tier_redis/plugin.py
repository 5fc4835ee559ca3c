"""The plugin's entry point: one kind of tier."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.tier import Tier
from erllama_core.providers import TierProvider
from erllama_tier_redis.options import RedisOptions


def open_redis(options: RedisOptions) -> Tier:
    """The tier that ``options`` describes; the server is asked for at first use.

    Raises TierError for a password file that cannot be read.
    """
    from erllama_tier_redis.server import Server
    from erllama_tier_redis.store import RedisTier

    return RedisTier(
        Server(options),
        prefix=options.prefix,
        quota_bytes=options.quota_bytes,
        expire_s=options.expire_s,
        rescan_interval_s=options.rescan_interval_s,
    )


@hookimpl
def erllama_tiers() -> Sequence[TierProvider]:
    """``redis``."""
    return (
        TierProvider(
            name="redis",
            summary="A Redis or Valkey server; shared between processes and hosts.",
            factory=open_redis,
            config=RedisOptions,
        ),
    )

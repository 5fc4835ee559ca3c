"""The plugin's entry point: two kinds of tier."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.tier import Tier
from erllama_core.providers import TierProvider
from erllama_tier_disk.options import DiskOptions, RamFileOptions


def open_disk(options: DiskOptions) -> Tier:
    """Open the store that ``options`` describes. Raises TierError."""
    from erllama_tier_disk.store import FileTier

    return FileTier(
        options.root,
        quota_bytes=options.quota_bytes,
        read_only=options.read_only,
        rescan_interval_s=options.rescan_interval_s,
    )


def open_ram_file(options: RamFileOptions) -> Tier:
    """Open the store that ``options`` describes. Raises TierError."""
    from erllama_tier_disk.shm import private_folder
    from erllama_tier_disk.store import FileTier

    root = options.root
    if root is None:
        root = private_folder(create=not options.read_only)
    return FileTier(
        root,
        quota_bytes=options.quota_bytes,
        read_only=options.read_only,
        outlives_power=False,
        rescan_interval_s=options.rescan_interval_s,
    )


@hookimpl
def erllama_tiers() -> Sequence[TierProvider]:
    """``disk`` and ``ram_file``."""
    return (
        TierProvider(
            name="disk",
            summary="Files below a folder; shared between processes, kept across restarts.",
            factory=open_disk,
            config=DiskOptions,
        ),
        TierProvider(
            name="ram_file",
            summary="Files on a tmpfs; shared between processes, lost at reboot.",
            factory=open_ram_file,
            config=RamFileOptions,
        ),
    )

"""The plugin's entry point: two kinds of tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

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


def check_disk(options: DiskOptions) -> Iterator[tuple[str, str]]:
    """Why the root cannot be used."""
    return _check_root(options.root, read_only=options.read_only)


def check_ram_file(options: RamFileOptions) -> Iterator[tuple[str, str]]:
    """Why the root cannot be used."""
    from erllama_tier_disk.shm import SHARED_MEMORY

    root = SHARED_MEMORY if options.root is None else options.root
    return _check_root(root, read_only=options.read_only)


def _check_root(root: Path, *, read_only: bool) -> Iterator[tuple[str, str]]:
    from erllama_tier_disk.folders import why_unusable

    reason = why_unusable(root, read_only=read_only)
    if reason is not None:
        yield "root", reason


@hookimpl
def erllama_tiers() -> Sequence[TierProvider]:
    """``disk`` and ``ram_file``."""
    return (
        TierProvider(
            name="disk",
            summary="Files below a folder; shared between processes, kept across restarts.",
            factory=open_disk,
            config=DiskOptions,
            check=check_disk,
        ),
        TierProvider(
            name="ram_file",
            summary="Files on a tmpfs; shared between processes, lost at reboot.",
            factory=open_ram_file,
            config=RamFileOptions,
            check=check_ram_file,
        ),
    )

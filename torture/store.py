"""What lies in a root, seen from outside, and whether it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from erllama_core import NamedTier
from erllama_core.cli.cache_verify import Verification
from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.block import Header, ObjectKind, decode_header
from erllama_tier_disk.store import FileTier
from erllama_tier_disk.walk import NotAFile, open_regular, read_head
from torture.tally import Tally


def headers(root: Path) -> dict[Path, Header]:
    """The header of every published file; one that is just removed, or damaged, is left out."""
    found = {}
    for path in root.glob("objects/??/*.kvc"):
        try:
            fd, _ = open_regular(path)
        except (OSError, NotAFile):
            continue
        try:
            found[path] = decode_header(read_head(fd))
        except CorruptBlock:
            continue
        finally:
            os.close(fd)
    return found


def is_kept(header: Header, others: Iterable[Header]) -> bool:
    """Whether one of the others holds the whole of a block: a short one's tokens move there."""
    path = header.lead_tokens + header.tokens
    return header.kind is ObjectKind.KV and any(
        other.kind is ObjectKind.KV
        and other.segment_key == header.segment_key
        and other.start <= header.start
        and (other.lead_tokens + other.tokens).startswith(path)
        for other in others
    )


def temporaries(root: Path) -> list[Path]:
    """Files that are being written, or were when their writer was killed."""
    return list(root.glob("objects/*/.*.tmp"))


def verify(root: Path) -> Verification:
    """Read every object as ``erllama cache verify`` does; nothing is changed."""
    tier = FileTier(root, read_only=True, rescan_interval_s=0)
    try:
        named = NamedTier("disk", "disk", tier)
        verification = Verification()
        for object_id, size in verification.collect(named):
            verification.check(named, object_id, size)
        return verification
    finally:
        tier.close()


def troubles(verification: Verification) -> list[tuple[str, str]]:
    """What is no whole object: where it is, and why."""
    findings = (*verification.damaged, *verification.unreadable, *verification.unknown_format)
    failures = verification.scan_failures
    return [
        *((found.location, found.reason) for found in findings),
        *((found.location, found.reason) for found in failures),
    ]


def sweep(root: Path) -> None:
    """Open the root as its janitor, who removes what killed writers left behind."""
    tier = FileTier(root, rescan_interval_s=0)
    try:
        for _ in tier.scan():
            pass
    finally:
        tier.close()


def check_whole(root: Path, tally: Tally) -> None:
    """Every object of a root that nobody damaged is whole, and nothing else is there."""
    sweep(root)
    verification = verify(root)
    tally.survive("objects verified", verification.intact)
    for location, reason in troubles(verification):
        tally.accuse(f"{location}: {reason}")
    left = temporaries(root)
    tally.check(f"left behind by writers: {left}", holds=not left)

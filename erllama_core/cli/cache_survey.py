"""What a tier holds, by its objects' headers alone; nothing is changed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Literal

import attrs

from erllama_core.cache.tiers import NamedTier
from erllama_core.errors import CacheError, CorruptBlock, TierError, UnknownFormat
from erllama_core.interfaces.block import Header, ObjectId, decode_header
from erllama_core.interfaces.tier import ScanFailure, ScannedObject

State = Literal["ok", "damaged", "unknown_format"]


@attrs.frozen
class Stored:
    """An object in a tier, as far as its header tells."""

    object_id: ObjectId
    size_bytes: int
    last_used_ns: int
    state: State
    """``ok`` says nothing about the payload."""
    header: Header | None
    """None unless the state is ``ok``."""
    problem: str | None = None
    """Why the state is not ``ok``."""


def survey(named: NamedTier) -> Iterator[Stored | ScanFailure]:
    """Everything in the tier, in any order. Raises TierError."""
    try:
        for found in named.tier.scan():
            yield found if isinstance(found, ScanFailure) else _examine(found)
    except CacheError:
        raise
    except Exception as error:
        # A tier of somebody else's; the cache takes whatever it raises for trouble, too.
        raise TierError(f"tier {named.name!r} could not list what it holds: {error}") from error


def _examine(found: ScannedObject) -> Stored:
    state: State = "ok"
    header = problem = None
    try:
        header = decode_header(found.head)
        if header.object_id != found.object_id:
            raise CorruptBlock(f"its header says that it is {header.object_id}")
        if header.size_bytes != found.size_bytes:
            raise CorruptBlock(f"{found.size_bytes} bytes where {header.size_bytes} belong")
    except UnknownFormat as error:
        state, header, problem = "unknown_format", None, error.reason
    except CorruptBlock as error:
        state, header, problem = "damaged", None, error.reason
    return Stored(found.object_id, found.size_bytes, found.last_used_ns, state, header, problem)


@attrs.frozen(kw_only=True)
class Listed:
    """One row of ``erllama cache ls``, and with these keys of its JSON."""

    kind: str
    key: str
    tier: str
    start: int
    end: int | None
    """None, as ``tokens`` and ``save_reason``, when the header cannot be used."""
    tokens: int | None
    size_bytes: int
    last_used_ns: int
    save_reason: str | None
    pinned: bool
    location: str
    problem: str | None


def list_objects(named: NamedTier, pinned: Container[ObjectId]) -> Iterator[Listed]:
    """A row for each object, in any order. Raises TierError."""
    for found in survey(named):
        if isinstance(found, Stored):
            header = found.header
            reason = None if header is None else header.info.get("save_reason")
            yield Listed(
                kind=found.object_id.kind.value,
                key=found.object_id.key.hex(),
                tier=named.name,
                start=found.object_id.start,
                end=None if header is None else header.end,
                tokens=None if header is None else header.end - header.start,
                size_bytes=found.size_bytes,
                last_used_ns=found.last_used_ns,
                save_reason=None if reason is None else str(reason),
                pinned=found.object_id in pinned,
                location=named.tier.location(found.object_id),
                problem=found.problem,
            )

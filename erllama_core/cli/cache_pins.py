"""Pins from the command line: whose key it is, and what recorded pins protect."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import attrs

from erllama_core.cache.cache import Cache
from erllama_core.cache.catalog import Catalog
from erllama_core.cache.pages import PagePool
from erllama_core.cache.pinning import Pinning
from erllama_core.cache.pins import Pinned
from erllama_core.cache.scan import entry_of
from erllama_core.cache.tiers import NamedTier
from erllama_core.cli.cache_source import Source
from erllama_core.cli.cache_survey import Stored, survey
from erllama_core.errors import BlockNotFound, TierError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import RecordsPins
from erllama_core.results import CacheKey

_KEY_DIGITS: Final = 64


@attrs.frozen(kw_only=True)
class PinState:
    """What ``erllama cache pin`` did, and with these keys its JSON."""

    key: str
    pinned: tuple[Pinned, ...]
    """Where it is pinned now, and what that protects."""


@attrs.frozen
class ProtectedObjects:
    """What the recorded pins of a tier protect."""

    pins: int
    objects: frozenset[ObjectId]


def protected_objects(named: NamedTier) -> ProtectedObjects:
    """Find it as a running engine does; a pass over the tier, unless nothing is pinned.

    Raises TierError.
    """
    catalog = Catalog([named], PagePool(0))
    (store,) = catalog.stores.values()
    Pinning(catalog).learn(store)
    pins = catalog.pins[store]
    count = len(list(pins))
    if count:
        for found in survey(named):
            if isinstance(found, Stored) and found.header is not None:
                entry = entry_of(found.header)
                catalog.add_copy(store, entry, found.size_bytes, found.last_used_ns, "")
    objects = (entry.object_id for entry in catalog.index if pins.protects(entry))
    return ProtectedObjects(count, frozenset(objects))


def change_pin(source: Source, beginning: str, *, unpin: bool) -> PinState:
    """Pin the context whose key begins so, or unpin it.

    Raises BlockNotFound when there is none, or more than one, and TierError.
    """
    with source.opened() as tiers:
        source.require_writable()
        names = [named.name for named in tiers if isinstance(named.tier, RecordsPins)]
        if not names:
            raise TierError(
                f"no tier here keeps a record of pins ({', '.join(t.name for t in tiers)}), so a "
                f"pin would be gone with this command"
            )
        key = _key(beginning, [named for named in tiers if named.name in names])
    with source.opened_to_change(names) as tiers, Cache(tiers) as cache:
        cache.wait_scanned()
        if unpin:
            cache.unpin(key)
        else:
            cache.pin(key)
        return PinState(key=key.hex(), pinned=cache.pins().get(key, ()))


def _key(beginning: str, tiers: Iterable[NamedTier]) -> CacheKey:
    """The one key that begins with these digits; a whole one need not be stored."""
    digits = beginning.lower()
    if not re.fullmatch(rf"[0-9a-f]{{1,{_KEY_DIGITS}}}", digits):
        raise BlockNotFound(f"{beginning!r} is no key: {_KEY_DIGITS} hexadecimal digits, or fewer")
    if len(digits) == _KEY_DIGITS:
        return CacheKey(bytes.fromhex(digits))
    keys: set[str] = set()
    for named in tiers:
        keys.update(f.object_id.key.hex() for f in survey(named) if isinstance(f, Stored))
        if isinstance(named.tier, RecordsPins):
            keys.update(key.hex() for key in named.tier.pins())
    found = [key for key in keys if key.startswith(digits)]
    if len(found) != 1:
        number = len(found) or "no"
        raise BlockNotFound(f"{number} keys begin with {digits}; ls --json shows whole ones")
    return CacheKey(bytes.fromhex(found[0]))

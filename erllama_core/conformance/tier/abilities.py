"""What a tier promises of its abilities: tests of the kit."""

from __future__ import annotations

from typing import Final

from erllama_core.conformance.tier.subject import TierKit
from erllama_core.interfaces.tier import (
    ChangesQuota,
    KeepsPages,
    MakesDurable,
    RecordsPins,
    Shared,
    Tier,
)

_ABILITIES: Final[dict[type, tuple[str, ...]]] = {
    ChangesQuota: ("set_quota",),
    KeepsPages: ("keep", "borrow"),
    RecordsPins: ("record_pin", "erase_pin", "pins"),
    MakesDurable: ("outlives_power", "make_durable"),
    Shared: ("rescan_interval_s", "lead", "find", "rescan"),
}


class AbilityPromises(TierKit):
    """What a tier promises of its abilities."""

    def test_abilities_are_whole(self, tier: Tier) -> None:
        """An optional ability is there with all of its methods, or with none.

        If this fails: a misspelt method makes the core believe that the ability is missing.
        """
        for ability, names in _ABILITIES.items():
            present = [name for name in names if hasattr(tier, name)]
            assert present in ([], list(names)), f"{ability.__name__} lacks some of {names}"
            assert isinstance(tier, ability) == bool(present)

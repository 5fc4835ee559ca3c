"""Single measurements, kept in a file between the commands that add to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Sample:
    """One answer."""

    scenario: str
    size: int
    """Tokens of the prompt; of a conversation, the number of the step."""
    round: int
    who: str
    first_token_s: float
    computed_tokens: int
    new_tokens: int
    """Those that no earlier request of the scenario had at their place."""


@attrs.define(kw_only=True)
class Samples:
    """What was measured, and who could not be."""

    samples: list[Sample] = attrs.field(factory=list)
    absent: dict[str, str] = attrs.field(factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Samples:
        """What an earlier command left; nothing when there is none."""
        if path is None or not path.exists():
            return cls()
        plain: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return cls(
            samples=[Sample(**one) for one in plain["samples"]], absent=dict(plain["absent"])
        )

    def write(self, path: Path) -> None:
        """Leave it for the next command."""
        path.write_text(json.dumps(attrs.asdict(self)) + "\n", "utf-8")

    def add(self, samples: Iterable[Sample], absent: dict[str, str]) -> None:
        """Take up what a round brought."""
        self.samples += samples
        self.absent = absent

    @property
    def rounds(self) -> int:
        """How many there have been."""
        return 1 + max((one.round for one in self.samples), default=-1)

    def runs(self, scenario: str, size: int, who: str) -> dict[int, Sample]:
        """What one of them did in each round."""
        return {
            one.round: one
            for one in self.samples
            if (one.scenario, one.size, one.who) == (scenario, size, who)
        }

    def sizes(self, scenario: str) -> Sequence[int]:
        """At which it was measured, in order."""
        return sorted({one.size for one in self.samples if one.scenario == scenario})


def seconds(runs: dict[int, Sample]) -> list[float]:
    """Until the first token, in the order of the rounds."""
    return [runs[number].first_token_s for number in sorted(runs)]


def ratios(above: dict[int, Sample], below: dict[int, Sample]) -> list[float]:
    """Of the times, for every round in which both took their turn."""
    both = sorted(above.keys() & below.keys())
    return [above[number].first_token_s / below[number].first_token_s for number in both]

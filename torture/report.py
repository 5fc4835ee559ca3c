"""The table at the end, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from torture.curves import curves
from torture.fault import Known
from torture.record import Record, Round
from torture.tally import Tally

_MOST_NOTES = 7
_WORDS = {
    "length": "whole replies",
    "cancelled": "cancelled requests",
    "TimeoutExceeded": "requests out of time",
    "StickyBusy": "turns refused while their session was busy",
    "EngineReset": "sessions reset",
}
"""Of how requests ended, for people."""


@attrs.frozen
class Line:
    """A fault's row."""

    known: Known
    rounds: int
    seconds: float
    tally: Tally

    @classmethod
    def of(cls, known: Known, rounds: Sequence[Round]) -> Line:
        """Of all rounds of a fault."""
        total = Tally()
        for one in rounds:
            total.add(one.tally)
        return cls(known, len(rounds), sum(one.seconds for one in rounds), total)


def lines_of(record: Record, faults: Iterable[Known]) -> list[Line]:
    """The rows of those faults that were tried."""
    found = [Line.of(known, record.rounds(known.name)) for known in faults]
    return [line for line in found if line.rounds]


def curves_json(record: Record, faults: Iterable[Known]) -> dict[str, Any]:
    """What was measured over time, for ``bench/report.py``."""
    found = [curves(one.name, one.summary, record.rounds(one.name)) for one in faults]
    return {"sections": [section for section in found if section is not None]}


def as_markdown(lines: Sequence[Line]) -> str:
    """A table for people."""
    rows = [
        "| fault | rounds | tried | survived | lost | wrong | of these, and besides |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        tally = line.tally
        most = tally.notes.most_common(_MOST_NOTES)
        notes = ", ".join(f"{count:,} {_WORDS.get(name, name)}" for name, count in most)
        rows.append(
            f"| {line.known.summary} (`{line.known.name}`) | {line.rounds:,} | {tally.tried:,} | "
            f"{tally.survived:,} | {tally.lost:,} | {len(tally.wrong)} | {notes} |"
        )
    return "\n".join(rows) + "\n"


def as_json(seed: int, lines: Sequence[Line]) -> dict[str, Any]:
    """For programs."""
    return {
        "seed": seed,
        "faults": {
            line.known.name: {
                "rounds": line.rounds,
                "seconds": round(line.seconds, 3),
                "tried": line.tally.tried,
                "survived": line.tally.survived,
                "lost": line.tally.lost,
                "wrong": line.tally.wrong,
                "notes": dict(line.tally.notes),
            }
            for line in lines
        },
    }

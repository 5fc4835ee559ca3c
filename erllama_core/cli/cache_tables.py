"""How the ``cache`` commands show what they found to a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from erllama_core.cache.budget import in_words
from erllama_core.cli.cache_stats import TierStats
from erllama_core.cli.cache_survey import Listed
from erllama_core.cli.cache_verify import Verification
from erllama_core.cli.console import PICTURES

_SHORT_KEY: Final = 12
_PICTURES: Final = {**PICTURES, ord("\n"): "\u240a", ord("\t"): "\u2409"}
"""A cell is one line, and what a file's name or a header says steers no terminal."""
_COLUMNS: Final = 4096
"""Wider than any table. A table that is wider than the terminal is better wrapped by that than
robbed of a column, and a pipe has a line for each object."""


def human_time(time_ns: int) -> str:
    """A time since the epoch as local date and time; ``?`` for one that no calendar has."""
    try:
        when = datetime.fromtimestamp(time_ns // 1_000_000_000, tz=UTC).astimezone()
    except (OverflowError, ValueError, OSError):
        return "?"
    return f"{when:%Y-%m-%d %H:%M:%S}"


def count(number: int, noun: str = "object") -> str:
    """``1 object``, ``2 objects``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def show(table: Table) -> None:
    """Print a table on standard output."""
    Console(width=_COLUMNS).print(table)


def listing_table(rows: Iterable[Listed]) -> Table:
    """One row per object; ``-`` for what a damaged header does not tell."""
    table = _table(
        *("kind", "key", "tier", "start>", "end>", "tokens>", "size>"),
        *("last used", "save reason", "pinned", "location"),
    )
    for row in rows:
        _add(
            table,
            row.kind,
            row.key[:_SHORT_KEY],
            row.tier,
            str(row.start),
            _or_dash(row.end),
            _or_dash(row.tokens),
            in_words(row.size_bytes),
            human_time(row.last_used_ns),
            _or_dash(row.save_reason),
            "yes" if row.pinned else "-",
            row.location,
        )
    return table


def stats_table(tiers: Sequence[TierStats]) -> Table:
    """One column per tier."""
    table = _table("", *(f"{stats.tier}>" for stats in tiers))

    def line(title: str, cells: Iterable[str]) -> None:
        _add(table, title, *cells)

    line("tier kind", (stats.kind for stats in tiers))
    line("objects", (f"{stats.objects}, {in_words(stats.size_bytes)}" for stats in tiers))
    for kind in tiers[0].by_kind:
        amounts = [stats.by_kind[kind] for stats in tiers]
        if any(amount.objects for amount in amounts):
            line(f"  {kind}", (f"{a.objects}, {in_words(a.size_bytes)}" for a in amounts))
    line("used", (in_words(stats.used_bytes) for stats in tiers))
    line(
        "quota",
        ("none" if s.quota_bytes is None else in_words(s.quota_bytes) for s in tiers),
    )
    line("pinned", (f"{s.pins}, {in_words(s.pinned_bytes)}" for s in tiers))
    line("context ends", (str(stats.context_ends) for stats in tiers))
    line("damaged", (str(stats.damaged) for stats in tiers))
    line("unknown format", (str(stats.unknown_format) for stats in tiers))
    line("scan failures", (str(len(stats.scan_failures)) for stats in tiers))
    return table


def findings_table(verification: Verification) -> Table | None:
    """What is not whole, or not to be checked; None when there is nothing."""
    table = _table("finding", "tier", "location", "reason")
    for found in verification.damaged:
        state = "damaged, deleted" if found.deleted else "damaged"
        _add(table, state, found.tier, found.location, found.reason)
    for found in verification.unreadable:
        _add(table, "unreadable", found.tier, found.location, found.reason)
    for found in verification.unknown_format:
        _add(table, "unknown format", found.tier, found.location, found.reason)
    for failure in verification.scan_failures:
        _add(table, "no object", failure.tier, failure.location, failure.reason)
    return table if table.row_count else None


def _table(*titles: str) -> Table:
    """Columns of these titles; one that ends in ``>`` is for numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        number = title.endswith(">")
        table.add_column(
            Text(title.removesuffix(">")),
            justify="right" if number else "left",
            no_wrap=True,
        )
    return table


def _add(table: Table, *cells: str) -> None:
    # As Text: paths may hold what rich takes for markup.
    table.add_row(*(Text(cell.translate(_PICTURES)) for cell in cells))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)

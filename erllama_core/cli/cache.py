"""``erllama cache``: what is stored, whether it is whole, and removing it."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from erllama_core.cache.budget import in_words
from erllama_core.cache.tiers import NamedTier
from erllama_core.cli.cache_pins import change_pin, protected_objects
from erllama_core.cli.cache_removal import Held, Removal, held, remove
from erllama_core.cli.cache_source import Source, find_source, source_options
from erllama_core.cli.cache_stats import tier_stats
from erllama_core.cli.cache_survey import list_objects
from erllama_core.cli.cache_tables import (
    count,
    findings_table,
    listing_table,
    show,
    stats_table,
)
from erllama_core.cli.cache_verify import Delete, Verification
from erllama_core.config import structure_options
from erllama_core.errors import CacheError, ConfigError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger
from erllama_core.providers import ByteSize

log = get_logger(__name__)


@attrs.frozen
class _Amount:
    size: ByteSize = attrs.field(validator=attrs.validators.gt(ByteSize(0)))


def _bytes_argument(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    """A number of bytes, in the words of a configuration: ``256MiB``."""
    try:
        return structure_options(_Amount, {"size": value}).size
    except ConfigError as error:
        raise click.BadParameter(error.problems[0].message) from None


_json_option: Final = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, nothing else."
)


@click.group()
def cache() -> None:
    """Look into a cache, check it, make room in it.

    Every command is safe while engines use the same cache: what it removes is a miss for them.
    """


@cache.command()
@source_options
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="The N used last.")
@_json_option
def ls(
    config_file: Path | None, root: Path | None, tier: str | None, limit: int | None, as_json: bool
) -> None:
    """List the objects, those used last first."""
    with find_source(config_file, root, tier).opened() as tiers:
        found = (
            row for named in tiers for row in list_objects(named, protected_objects(named).objects)
        )
        if limit is None:
            rows = sorted(found, key=lambda row: row.last_used_ns, reverse=True)
        else:
            rows = heapq.nlargest(limit, found, key=lambda row: row.last_used_ns)
    if as_json:
        _print_json([attrs.asdict(row) for row in rows])
        return
    show(listing_table(rows))
    if any(row.problem is not None for row in rows):
        click.echo("Some cannot be used; erllama cache verify tells why.", err=True)


@cache.command()
@source_options
@_json_option
def stats(config_file: Path | None, root: Path | None, tier: str | None, as_json: bool) -> None:
    """Sum up each tier: objects by kind, bytes, quota, contexts, damage."""
    with find_source(config_file, root, tier).opened() as tiers:
        sums = [tier_stats(named) for named in tiers]
    if as_json:
        _print_json([attrs.asdict(entry) for entry in sums])
    else:
        show(stats_table(sums))


@cache.command()
@source_options
@click.option("--delete", is_flag=True, help="Remove what is damaged.")
@_json_option
@click.pass_context
def verify(
    ctx: click.Context,
    config_file: Path | None,
    root: Path | None,
    tier: str | None,
    delete: bool,
    as_json: bool,
) -> None:
    """Read every object whole and check it.

    Exit code 0 when all are whole, 1 when one is damaged or cannot be read.
    """
    source = find_source(config_file, root, tier)
    with contextlib.ExitStack() as stack:
        tiers = stack.enter_context(source.opened())
        if delete:
            source.require_writable()
        verification = Verification(_deletion(source, stack) if delete else None)
        _verify(tiers, verification)
    if as_json:
        _print_json(_verification_json(verification))
    else:
        table = findings_table(verification)
        if table is not None:
            show(table)
        whole = f"{count(verification.intact)} whole, {in_words(verification.intact_bytes)}"
        gone = f"; {verification.vanished} removed meanwhile" if verification.vanished else ""
        click.echo(f"{whole}; {len(verification.damaged)} damaged{gone}")
    ctx.exit(0 if verification.ok else 1)


@cache.command()
@source_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json_option
@click.pass_context
def gc(
    ctx: click.Context,
    config_file: Path | None,
    root: Path | None,
    tier: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove all objects that are not pinned, after asking.

    Exit code 1 when something could not be removed.
    """
    source = find_source(config_file, root, tier)
    holdings = _holdings(source)
    if holdings and not yes:
        listed = ", ".join(
            f"{count(amount.objects)} ({in_words(amount.size_bytes)}) from {name}"
            for name, amount in holdings.items()
        )
        # On standard error, which is where questions do not disturb the JSON.
        click.confirm(f"Remove {listed}?", abort=True, err=True)
    _report(ctx, remove(source, list(holdings), None), as_json)


@cache.command()
@click.argument("n_bytes", metavar="BYTES", callback=_bytes_argument)
@source_options
@_json_option
@click.pass_context
def evict(
    ctx: click.Context,
    n_bytes: int,
    config_file: Path | None,
    root: Path | None,
    tier: str | None,
    as_json: bool,
) -> None:
    """Free at least BYTES, such as 256MiB; what is worth least goes first.

    Exit code 1 when there was not as much to free.
    """
    source = find_source(config_file, root, tier)
    _report(ctx, remove(source, list(_holdings(source)), n_bytes), as_json)


@cache.command()
@click.argument("key", metavar="KEY")
@source_options
@click.option("--unpin", is_flag=True, help="Let it be removed like any other again.")
@_json_option
def pin(
    key: str,
    config_file: Path | None,
    root: Path | None,
    tier: str | None,
    unpin: bool,
    as_json: bool,
) -> None:
    """Keep the context that ends at KEY, from its start, whatever else is removed.

    KEY is a finish_key, or as much of its beginning as no other key has. It is pinned in the
    first tier that has all of it.
    """
    state = change_pin(find_source(config_file, root, tier), key, unpin=unpin)
    if as_json:
        _print_json(attrs.asdict(state))
    elif not state.pinned:
        click.echo(f"{state.key} is not pinned")
    for pinned in () if as_json else state.pinned:
        click.echo(
            f"{state.key} is pinned in {pinned.tier}: {count(pinned.rows)}, "
            f"{in_words(pinned.bytes)}"
        )


def _holdings(source: Source) -> dict[str, Held]:
    """What there is to remove, by tier; tiers that are empty are not among them."""
    with source.opened() as tiers:
        source.require_writable()
        amounts = {named.name: held(named) for named in tiers}
    return {name: amount for name, amount in amounts.items() if amount.objects}


def _deletion(source: Source, stack: contextlib.ExitStack) -> Delete:
    """Deletes through tiers that are opened for writing when the first object has to go."""
    opened: dict[str, NamedTier] = {}

    def delete(named: NamedTier, object_id: ObjectId) -> bool:
        if named.name not in opened:
            opened[named.name], *_ = stack.enter_context(source.opened_to_change([named.name]))
        try:
            opened[named.name].tier.delete(object_id)
        except (CacheError, OSError) as error:
            log.warning("object.not_deleted", tier=named.name, error=str(error))
            return False
        return True

    return delete


def _verify(tiers: list[NamedTier], verification: Verification) -> None:
    to_read = {named.name: verification.collect(named) for named in tiers}
    total = sum(size for objects in to_read.values() for _, size in objects)
    with _progress() as progress:
        task = progress.add_task("reading", total=total)
        for named in tiers:
            for object_id, size in to_read[named.name]:
                verification.check(named, object_id, size)
                progress.advance(task, size)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield progress


def _verification_json(verification: Verification) -> dict[str, object]:
    return {
        "ok": verification.ok,
        "intact": verification.intact,
        "intact_bytes": verification.intact_bytes,
        "vanished": verification.vanished,
        "damaged": [attrs.asdict(finding) for finding in verification.damaged],
        "unreadable": [attrs.asdict(finding) for finding in verification.unreadable],
        "unknown_format": [attrs.asdict(finding) for finding in verification.unknown_format],
        "scan_failures": [attrs.asdict(failure) for failure in verification.scan_failures],
    }


def _report(ctx: click.Context, removal: Removal, as_json: bool) -> None:
    if as_json:
        _print_json(attrs.asdict(removal))
    else:
        damaged = f", and {removal.damaged} damaged" if removal.damaged else ""
        size = in_words(removal.removed_bytes)
        pinned = f", {removal.pinned} of them pinned" if removal.pinned else ""
        click.echo(
            f"removed {count(removal.removed)}, {size}{damaged}; {removal.left} left{pinned}"
        )
    ctx.exit(0 if removal.ok else 1)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))

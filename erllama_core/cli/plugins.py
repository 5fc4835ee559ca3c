"""``erllama plugins``: what is installed, and whether it works here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from erllama_core.config import PluginsConfig, read_config
from erllama_core.host import PluginHost, PluginListing

_STYLES = {"ok": "green", "unavailable": "yellow", "failed": "red", "blocked": "dim"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Apply the [plugins] section of this configuration.",
)
def plugins(as_json: bool, config_file: Path | None) -> None:
    """List providers, and the plugins that failed or are blocked, with the reason."""
    chosen = PluginsConfig() if config_file is None else read_config(config_file).config.plugins
    rows = PluginHost(allow=chosen.allow, block=chosen.block).listing()
    if as_json:
        click.echo(json.dumps([attrs.asdict(row) for row in rows], indent=2))
    else:
        # A pipe has no width, and the 80 columns taken for it would fold every line.
        width = None if Console().is_terminal else 120
        Console(width=width).print(_table(rows))


def _table(rows: Sequence[PluginListing]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "kind", "distribution", "state", "about"):
        table.add_column(title, overflow="fold", no_wrap=title != "about")
    for row in rows:
        origin = " ".join(part for part in (row.distribution, row.version) if part)
        about = row.reason if row.reason is not None else row.summary
        table.add_row(
            Text(row.name),
            Text(row.kind or "plugin"),
            Text(origin or "-"),
            Text(row.state, style=_STYLES[row.state]),
            Text(about),
        )
    return table

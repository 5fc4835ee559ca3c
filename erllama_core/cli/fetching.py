"""Fetching the demo model, with a bar that says how far it is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from erllama_core.cli.demo_model import DEMO_MODEL, fetch_demo_model


def fetch_visibly(console: Console) -> Path:
    """See :func:`fetch_demo_model`. The bar is gone afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"fetching {DEMO_MODEL.name}", total=None)

        def show(fetched: int, total: int) -> None:
            progress.update(task, completed=fetched, total=total)

        return fetch_demo_model(show)

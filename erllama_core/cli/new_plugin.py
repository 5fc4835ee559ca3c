"""``erllama new-plugin``: the skeleton of a plugin, with tests that pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import click

KINDS: Final = ("backend", "tier", "pressure", "processor")
"""What a skeleton can be of."""

_STAND_IN: Final = "acme"
"""The name in the skeletons' files that a plugin's own takes the place of."""
_SUFFIX: Final = ".txt"
"""Of every file of a skeleton, so that no tool takes them for a part of this program."""


@click.command("new-plugin")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The project's own folder, new or empty. Default: ./erllama-KIND-NAME.",
)
def new_plugin(kind: str, name: str, directory: Path | None) -> None:
    """Write the skeleton of a plugin of KIND called NAME; its tests pass as written."""
    own = name.lower().replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", own):
        raise click.BadParameter(
            f"{name!r}: a name has letters, digits and underscores, and begins with a letter",
            param_hint="NAME",
        )
    folder = directory or Path(f"erllama-{kind}-{own.replace('_', '-')}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise click.ClickException(f"{folder} is not empty; name a new folder with --directory")
        for path, text in skeleton(kind, own):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
    except OSError as error:
        raise click.ClickException(f"{folder} cannot be written: {error}") from error
    click.echo(f"{folder}: a plugin of kind {kind} called {own!r}. Its tests pass as they are:")
    click.echo(f"    cd {folder} && PYTHONPATH=. python -m pytest tests")
    click.echo("They need the conformance kit: pip install 'erllama-core[conformance]'")


def skeleton(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """The files of a plugin: paths in its folder, and what is in them."""
    names = {
        f"erllama-{kind}-{_STAND_IN}": f"erllama-{kind}-{name.replace('_', '-')}",
        _STAND_IN.capitalize(): "".join(part.capitalize() for part in name.split("_")),
        _STAND_IN: name,
    }
    for path, source in _files(files("erllama_core.cli") / "skeletons" / kind):
        text = source.read_text("utf-8")
        for stand_in, own in names.items():
            text = text.replace(stand_in, own)
        yield path.removesuffix(_SUFFIX).replace(_STAND_IN, name), text


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield f"{prefix}{entry.name}", entry

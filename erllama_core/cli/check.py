"""``erllama check``: every mistake of a configuration at once."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import click

from erllama_core.config import examine_config
from erllama_core.errors import ConfigError, ConfigProblem


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of lines.")
@click.pass_context
def check(ctx: click.Context, file: Path, as_json: bool) -> None:
    """Check the configuration FILE on this machine: values, plugins, options, files.

    Exit code 0 when nothing is wrong, 1 otherwise. What can be used, and is probably not what was
    meant, is a warning.
    """
    problems: tuple[ConfigProblem, ...]
    warnings: tuple[ConfigProblem, ...] = ()
    try:
        found = examine_config(file)
        problems, warnings = found.problems, found.warnings
    except ConfigError as error:
        problems = error.problems
    if as_json:
        report = {
            "file": str(file),
            "ok": not problems,
            "problems": [attrs.asdict(problem) for problem in problems],
            "warnings": [attrs.asdict(warning) for warning in warnings],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        for problem in problems:
            click.echo(f"{file}: {problem}")
        for warning in warnings:
            click.echo(f"{file}: warning: {warning}")
        count = len(problems)
        verdict = "ok" if not count else f"{count} problem{'s' if count != 1 else ''}"
        click.echo(f"{file}: {verdict}")
    ctx.exit(1 if problems else 0)

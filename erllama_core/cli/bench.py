"""``erllama bench``: what the cache is worth on this machine, with this model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.table import Table

from erllama_core.cli.bench_steps import Measured, Plan, run_bench
from erllama_core.cli.fetching import fetch_visibly


def _lengths(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in value.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 64:
        raise click.BadParameter(f"{value!r}: numbers of 64 or more, with commas between")
    return lengths


@click.command()
@click.argument("size", required=False, type=click.Choice(["tiny"]))
@click.option(
    "--model",
    "model_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A GGUF file of your own; without one, and with SIZE tiny, the demo model.",
)
@click.option(
    "--tokens",
    "prompt_tokens",
    metavar="N,N",
    default="512,2048",
    show_default=True,
    callback=_lengths,
    help="Lengths of the prompts.",
)
@click.option("--agents", default=4, show_default=True, type=click.IntRange(2, 64))
@click.option(
    "--repeat",
    "repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Runs of each; the median is shown.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, nothing else.")
def bench(
    size: str | None,
    model_path: Path | None,
    prompt_tokens: tuple[int, ...],
    agents: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Time prompts cold and warm, and agents that share what they begin with.

    The cache is a temporary folder; nothing is kept.
    """
    if size is not None and model_path is not None:
        raise click.UsageError("name a SIZE, or a --model, not both")
    console = Console(stderr=as_json)
    path = fetch_visibly(console) if model_path is None else model_path
    found: list[Measured] = []

    def done(measured: Measured) -> None:
        found.append(measured)
        console.print(
            f"{measured.scenario}, {measured.prompt_tokens} tokens: "
            f"{measured.seconds * 1e3:,.1f} ms",
            highlight=False,
        )

    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
        plan = Plan(
            model_path=path,
            root=Path(root),
            prompt_tokens=prompt_tokens,
            agents=agents,
            repeats=repeats,
        )
        description = run_bench(plan, done)
    if as_json:
        figures = {"model": description, "figures": [attrs.asdict(one) for one in found]}
        click.echo(json.dumps(figures, indent=2))
    else:
        console.print()
        console.print(_table(description, repeats, found))


def _table(description: str, repeats: int, found: list[Measured]) -> Table:
    table = Table(title=f"{description}, medians of {repeats}")
    table.add_column("scenario")
    for heading in ("tokens reused", "time", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        least, most = (f"{seconds * 1e3:,.1f}" for seconds in (one.least_s, one.most_s))
        table.add_row(
            one.scenario,
            f"{one.reused_tokens} of {one.prompt_tokens}",
            f"{one.seconds * 1e3:,.1f} ms\n{least} to {most}",
            f"{one.speed_up:,.1f} x\n{one.speed_up_least:,.1f} to {one.speed_up_most:,.1f}",
        )
    return table

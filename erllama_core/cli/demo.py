"""``erllama demo``: a real model answers from restored state, in a new process too."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from erllama_core.cli.demo_steps import STEPS, Outcome, Setup, run_steps
from erllama_core.cli.fetching import fetch_visibly

_EXPLAINED = {
    "cold": "the prompt, for the first time",
    "exact": "the same prompt again",
    "longer": "the conversation goes on",
    "restart": "the first prompt, in a new process, from disk",
    "branch": "another question about the same text",
}


@click.command()
@click.option(
    "--model",
    "model_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A GGUF file of your own, instead of the demo model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, nothing else.")
def demo(model_path: Path | None, as_json: bool) -> None:
    """Answer five prompts of about 2,000 tokens and show what was not computed again.

    The cache is a temporary folder; nothing but the model file is kept.
    """
    console = Console(stderr=as_json)
    path = fetch_visibly(console) if model_path is None else model_path
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="erllama-demo-") as root:
        live: AbstractContextManager[Live | None] = (
            nullcontext() if as_json else Live(_table(outcomes), console=console, transient=True)
        )
        with live as shown:

            def done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                if shown is not None:
                    shown.update(_table(outcomes), refresh=True)

            description = run_steps(Setup(str(path), root), done)
    if as_json:
        click.echo(json.dumps(_figures(description, outcomes), indent=2))
        return
    console.print(_table(outcomes))  # what stood there before is gone, also where a step failed
    console.print(f"\n{description}")
    for outcome in outcomes:
        console.print(
            f"[bold]{outcome.name}[/bold], {_EXPLAINED[outcome.name]}: {outcome.reply.strip()!r}",
            highlight=False,
        )


def _figures(description: str, outcomes: list[Outcome]) -> dict[str, object]:
    hidden = {"prompt_tokens"}
    return {
        "model": description,
        "prompt_tokens": outcomes[0].prompt_tokens,
        "steps": [
            {key: value for key, value in attrs.asdict(outcome).items() if key not in hidden}
            for outcome in outcomes
        ],
    }


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="time to the first token")
    for heading in ("step", "hit"):
        table.add_column(heading)
    for heading in ("tokens reused", "restored", "first token", "speed-up"):
        table.add_column(heading, justify="right")
    for number, name in enumerate(STEPS):
        if number >= len(outcomes):
            waiting = "running …" if number == len(outcomes) else ""
            table.add_row(name, waiting, "", "", "", "")
            continue
        outcome = outcomes[number]
        table.add_row(
            name,
            outcome.hit,
            f"{outcome.reused_tokens} of {outcome.prompt_tokens}",
            f"{outcome.restored_bytes / 1e6:.1f} MB",
            f"{outcome.first_token_s * 1e3:,.1f} ms",
            f"{outcomes[0].first_token_s / outcome.first_token_s:,.0f} x",
        )
    return table

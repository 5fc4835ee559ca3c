"""``erllama why``: what a prompt would reuse, and why not more."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import click

from erllama_core.cache.keys import common_tokens
from erllama_core.cli.explained import explanation_lines
from erllama_core.config import load_config
from erllama_core.engine import Engine
from erllama_core.errors import ModelNotFound, unknown_name
from erllama_core.model.model import Model
from erllama_core.prompt import Prompt
from erllama_core.results import Explanation

_AROUND = 12


@click.command()
@click.option(
    "--config",
    "config_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The configuration of the service.",
)
@click.option("--model", "model_id", required=True, help="One of its models.")
@click.option(
    "--prompt-file",
    "prompt_files",
    required=True,
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The prompt, as text. Give a second one to see where the two part.",
)
@click.option("--cache-salt", help="The cache_salt of the requests.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")
def why(
    config_path: Path,
    model_id: str,
    prompt_files: tuple[Path, ...],
    cache_salt: str | None,
    as_json: bool,
) -> None:
    """Say what a prompt would reuse of the cache now, and why not more.

    The model is loaded, nothing is computed, and nothing in the cache is changed.
    """
    if len(prompt_files) > 2:
        raise click.UsageError("at most two prompt files can be compared")
    texts = [_text(path) for path in prompt_files]
    config = load_config(config_path)
    if model_id not in config.models:
        raise ModelNotFound(f"{config_path}: {unknown_name('model', model_id, config.models)}")
    with Engine(config) as engine:
        model = engine.load_model(model_id, config.models[model_id])
        engine.cache.wait_scanned()
        prompts = [model.tokenize(text) for text in texts]
        explanations = [model.why(prompt, cache_salt=cache_salt) for prompt in prompts]
        parting = _parting(model, prompts) if len(prompts) == 2 else None
    if as_json:
        answer = {
            "prompts": [
                {"file": str(path), "tokens": len(prompt), **attrs.asdict(explanation)}
                for path, prompt, explanation in zip(
                    prompt_files, prompts, explanations, strict=True
                )
            ],
            "parting": parting,
        }
        click.echo(json.dumps(answer, indent=2))
        return
    for path, prompt, explanation in zip(prompt_files, prompts, explanations, strict=True):
        click.echo(_in_words(path, prompt, explanation))
    if parting is not None:
        click.echo(_parting_in_words(parting))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; a prompt is text"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    raise click.BadParameter(f"{path}: {reason}", param_hint="--prompt-file")


def _in_words(path: Path, prompt: Prompt, explanation: Explanation) -> str:
    head = f"{path}: {explanation.kind}, {explanation.reused_tokens} of {len(prompt)} tokens"
    lines = [head, *(f"  {line}" for line in explanation_lines(explanation))]
    return "\n".join(lines)


def _parting(model: Model, prompts: list[Prompt]) -> dict[str, object]:
    """Where two prompts part: the index of the first token that differs, and the texts."""
    first, second = prompts
    at = common_tokens(first.packed, second.packed)
    return {
        "at": at,
        "same_before": model.detokenize(first[max(0, at - _AROUND) : at]),
        "first_goes_on": model.detokenize(first[at : at + _AROUND]),
        "second_goes_on": model.detokenize(second[at : at + _AROUND]),
    }


def _parting_in_words(parting: dict[str, object]) -> str:
    return (
        f"the two prompts share {parting['at']} tokens, up to {parting['same_before']!r}\n"
        f"  the first goes on with:  {parting['first_goes_on']!r}\n"
        f"  the second goes on with: {parting['second_goes_on']!r}"
    )

"""What the demo runs: five requests, one of them in a process of its own.

Run as a module it is that process: it reads a :class:`Setup` as JSON from standard input and
writes the restart step's outcome as JSON to standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import attrs

from erllama_core.cli.logs import configure_logs
from erllama_core.config import load_config
from erllama_core.engine import Engine
from erllama_core.errors import ErllamaError
from erllama_core.model.model import Model
from erllama_core.prompt import Prompt

QUESTION: Final = "Who built the lighthouse, and when was it lit for the first time?"
FOLLOW_UP: Final = "And what happened to it in the great storm?"
OTHER_QUESTION: Final = "How do most people in the town make their living today?"
REPLY_TOKENS: Final = 24
CONTEXT_TOKENS: Final = 4096

STEPS: Final = ("cold", "exact", "longer", "restart", "branch")


@attrs.frozen
class Setup:
    """Where the demo's model and its disk tier are."""

    model_path: str
    root: str


@attrs.frozen
class Outcome:
    """One step, as ``erllama demo --json`` prints it."""

    name: str
    hit: str
    reused_tokens: int
    restored_bytes: int
    first_token_s: float
    restore_s: float
    reply: str
    prompt_tokens: int


def run_steps(setup: Setup, done: Callable[[Outcome], None]) -> str:
    """Run the five steps, each told to ``done``; the model's description.

    Raises ErllamaError.
    """
    with _engine(setup) as (engine, model):

        def step(name: str, *turns: str) -> Outcome:
            outcome = _ask(model, name, *turns)
            # The next step is not to wait for this one's state to be saved.
            engine.flush()
            done(outcome)
            return outcome

        first = step("cold", QUESTION)
        step("exact", QUESTION)
        step("longer", QUESTION, first.reply, FOLLOW_UP)
        done(ask_after_restart(setup))
        step("branch", OTHER_QUESTION)
        return model.info().description


@contextmanager
def _engine(setup: Setup) -> Iterator[tuple[Engine, Model]]:
    config = {"tiers": [{"name": "disk", "kind": "disk", "root": setup.root}]}
    with Engine(load_config(config, environ={})) as engine:
        model = engine.load_model(
            "demo",
            backend="llama",
            model_path=setup.model_path,
            tier=["ram", "disk"],
            # No residents: every step is to show what the tiers have.
            context_opts={"n_ctx": CONTEXT_TOKENS, "resident_cells_max": 0},
        )
        engine.cache.wait_scanned()
        yield engine, model


def demo_prompt(model: Model, question: str = QUESTION, *later: str) -> Prompt:
    """The text, a question about it, and the turns that followed."""
    text = (files("erllama_core.cli") / "demo_text.txt").read_text(encoding="utf-8")
    turns = (f"{text.strip()}\n\n{question}", *later)
    roles = ("user", "assistant")
    return model.apply_chat_template(
        [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    )


def _ask(model: Model, name: str, *turns: str) -> Outcome:
    completion = model.complete(demo_prompt(model, *turns), response_tokens=REPLY_TOKENS)
    stats = completion.stats
    return Outcome(
        name=name,
        hit=stats.cache_hit_kind,
        reused_tokens=stats.cache_delta.read,
        restored_bytes=stats.restored_bytes,
        first_token_s=stats.first_token_s or 0.0,
        restore_s=stats.restore_s,
        reply=completion.reply,
        prompt_tokens=stats.prompt_tokens,
    )


def ask_after_restart(setup: Setup) -> Outcome:
    """The first question again, in a new process that knows nothing but the disk."""
    result = subprocess.run(
        [sys.executable, "-m", "erllama_core.cli.demo_steps"],
        input=json.dumps(attrs.asdict(setup)),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ErllamaError(f"the demo's second process failed: {result.stderr.strip()[-2000:]}")
    return Outcome(**json.loads(result.stdout))


def main() -> None:
    """The second process."""
    configure_logs()
    values: dict[str, Any] = json.load(sys.stdin)
    setup = Setup(**values)
    if not Path(setup.root).is_dir():
        raise ErllamaError(f"there is no cache at {setup.root}")
    with _engine(setup) as (_, model):
        outcome = _ask(model, "restart", QUESTION)
    print(json.dumps(attrs.asdict(outcome)))


if __name__ == "__main__":
    main()

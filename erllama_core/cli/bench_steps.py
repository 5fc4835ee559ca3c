"""What ``erllama bench`` measures: prompts cold and warm, and agents that share a beginning."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import attrs

from erllama_core.config import load_config
from erllama_core.engine import Engine
from erllama_core.model.model import Model
from erllama_core.results import Completion

REPLY_TOKENS: Final = 8
TAIL_TOKENS: Final = 12
"""Of an agent's prompt, behind what all of them begin with."""


@attrs.frozen(kw_only=True)
class Measured:
    """The median of some runs, in seconds, and how far they lie apart."""

    scenario: str
    prompt_tokens: int
    reused_tokens: int
    seconds: float
    least_s: float
    most_s: float
    speed_up: float
    """How many times sooner than the cold run of the same tokens, the median of all pairs of runs;
    1.0 for that itself."""
    speed_up_least: float
    speed_up_most: float


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be measured."""

    model_path: Path
    root: Path
    """An empty folder for the disk tier."""
    prompt_tokens: Sequence[int]
    agents: int
    repeats: int
    backend: str = "llama"


def run_bench(plan: Plan, done: Callable[[Measured], None]) -> str:
    """Measure everything, each figure told to ``done``; the model's description.

    Raises ErllamaError.
    """
    longest = max(plan.prompt_tokens)
    for n_tokens in plan.prompt_tokens:
        _warm(plan, n_tokens, done)
    _agents(plan, longest, done)
    with _model(plan, n_ctx=256, n_seq_max=1, tier=[]) as (_, model):
        return model.info().description


def _warm(plan: Plan, n_tokens: int, done: Callable[[Measured], None]) -> None:
    """The same prompt for the first time, again, longer, and from disk alone."""
    salts = [f"{n_tokens} {number}" for number in range(plan.repeats)]
    size: dict[str, Any] = {"n_ctx": n_tokens + 256, "n_seq_max": 1}
    runs: dict[str, list[Completion]] = {"cold": [], "exact": [], "longer": [], "from disk": []}
    with _model(plan, tier=["ram", "disk"], **size) as (engine, model):
        prompt = _tokens(model, n_tokens)
        longer = [*prompt, *_tokens(model, TAIL_TOKENS)]
        for salt in salts:
            for name, tokens in (("cold", prompt), ("exact", prompt), ("longer", longer)):
                runs[name].append(_ask(model, tokens, salt))
                engine.flush()
    with _model(plan, tier=["disk"], **size) as (engine, model):
        engine.cache.wait_scanned()
        for salt in salts:
            runs["from disk"].append(_ask(model, prompt, salt))
    cold = [_first_token(one) for one in runs["cold"]]
    for name, completions in runs.items():
        seconds = [_first_token(one) for one in completions]
        done(_measured(name, seconds, cold, completions[0]))


def _agents(plan: Plan, n_tokens: int, done: Callable[[Measured], None]) -> None:
    """Agents that arrive together with one beginning, and the same ones computed one by one."""
    alone: list[float] = []
    together: list[float] = []
    size = plan.agents * (n_tokens + TAIL_TOKENS + 64)
    one = None
    for number in range(plan.repeats):
        salt = f"agents {number}"
        with _model(plan, tier=[], n_ctx=size, n_seq_max=1) as (_, model):
            prompts = _prompts_of_agents(model, plan.agents, n_tokens)
            began = time.perf_counter()
            for prompt in prompts:
                _ask(model, prompt, salt)
            alone.append(time.perf_counter() - began)
        options: dict[str, Any] = {"n_ctx": size, "n_seq_max": plan.agents}
        with (
            _model(plan, tier=["ram"], **options) as (_, model),
            ThreadPoolExecutor(plan.agents) as threads,
        ):
            began = time.perf_counter()
            asked = [threads.submit(_ask, model, prompt, salt) for prompt in prompts]
            replies = [future.result() for future in asked]
            together.append(time.perf_counter() - began)
            one = max(replies, key=lambda reply: reply.cache_delta.read)
    assert one is not None
    cold = attrs.evolve(one, cache_delta=attrs.evolve(one.cache_delta, read=0))
    done(_measured(f"{plan.agents} agents, one by one, no cache", alone, alone, cold))
    done(_measured(f"{plan.agents} agents together", together, alone, one))


def _measured(
    name: str, seconds: Sequence[float], cold: Sequence[float], one: Completion
) -> Measured:
    """``cold`` has the run to compare with for each of ``seconds``, in the same order."""
    ratios = [before / after for before, after in zip(cold, seconds, strict=True)]
    return Measured(
        scenario=name,
        prompt_tokens=one.stats.prompt_tokens,
        reused_tokens=one.cache_delta.read,
        seconds=statistics.median(seconds),
        least_s=min(seconds),
        most_s=max(seconds),
        speed_up=statistics.median(ratios),
        speed_up_least=min(ratios),
        speed_up_most=max(ratios),
    )


@contextmanager
def _model(plan: Plan, *, tier: list[str], **context: Any) -> Iterator[tuple[Engine, Model]]:
    config = {"tiers": [{"name": "disk", "kind": "disk", "root": str(plan.root)}]}
    with Engine(load_config(config, environ={})) as engine:
        yield (
            engine,
            engine.load_model(
                "bench",
                backend=plan.backend,
                model_path=str(plan.model_path),
                tier=tier,
                context_opts={"resident_cells_max": 0, **context},
            ),
        )


def _tokens(model: Model, n_tokens: int) -> list[int]:
    """So many tokens of the demo's text, over and over."""
    text = (files("erllama_core.cli") / "demo_text.txt").read_text(encoding="utf-8")
    return list(itertools.islice(itertools.cycle(model.tokenize(text)), n_tokens))


def _prompts_of_agents(model: Model, agents: int, n_tokens: int) -> list[list[int]]:
    shared = _tokens(model, n_tokens)
    return [
        [*shared, *model.tokenize(f" Agent {number} asks.", add_bos=False)]
        for number in range(agents)
    ]


def _ask(model: Model, tokens: Sequence[int], salt: str) -> Completion:
    return model.complete(tokens, cache_salt=salt, response_tokens=REPLY_TOKENS)


def _first_token(completion: Completion) -> float:
    return completion.stats.first_token_s or 0.0

"""What saving costs a stream that is being decoded meanwhile, on a real model."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from cache_sizes import Sizes
from figure import Figure

from erllama_core import Engine, Model, load_config

PROMPT = "The keeper counted the ships: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"
"""Goes on for ever, so that every reply has the length that was asked for."""

BLOCK_TOKENS = 64
"""A quarter of the default: four times as many saves."""


def measure(sizes: Sizes, path: Path) -> list[Figure]:
    """Pairs of the same greedy reply, in turn with and without tiers to save to.

    Half of the pairs with the models loaded in the other order: where their memory lies makes
    one of two equal models some percent faster.
    """
    slower: list[float] = []
    saved = 0
    both: list[list[str]] = [["ram", "disk"], []]
    for tiers in (both, both[::-1]):
        with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
            tier = {"name": "disk", "kind": "disk", "root": root}
            with Engine(load_config({"tiers": [tier]}, environ={})) as engine:
                models = [_load(engine, path, "saving" if t else "bare", t) for t in tiers]
                slower += _pairs(engine, models, sizes)
                saved += engine.cache.counters().saves_continued
    return [
        Figure(
            name=f"decoding {sizes.decoded_tokens} tokens, saving by {BLOCK_TOKENS}: slower by",
            measured=statistics.median(slower),
            unit="%",
            target=5.0,
            digits=2,
        ),
        Figure(name="    least of the pairs", measured=min(slower), unit="%", digits=2),
        Figure(name="    most of the pairs", measured=max(slower), unit="%", digits=2),
        Figure(name="    objects saved while decoding", measured=saved, digits=0),
    ]


def _pairs(engine: Engine, models: list[Model], sizes: Sizes) -> list[float]:
    """By how many percent saving was slower, in each pair."""
    slower = []
    for number in range(sizes.runs + 1):
        models.reverse()
        seconds = {
            model.id: _decode(engine, model, sizes.decoded_tokens, f"pair {number}")
            for model in models
        }
        if number:  # the first pair is a warm-up
            slower.append(100 * (seconds["saving"] / seconds["bare"] - 1))
    return slower


def _load(engine: Engine, path: Path, name: str, tiers: list[str]) -> Model:
    return engine.load_model(
        name,
        backend="llama",
        model_path=str(path),
        tier=tiers,
        context_opts={"n_ctx": 2048},
        policy={
            "min_tokens": 8,
            "cold_min_tokens": 8,
            "boundary_align_tokens": BLOCK_TOKENS,
            "continued_interval": BLOCK_TOKENS,
        },
    )


def _decode(engine: Engine, model: Model, n_tokens: int, salt: str) -> float:
    """Seconds from the first token to the last."""
    completion = model.complete(PROMPT, response_tokens=n_tokens, cache_salt=salt)
    engine.flush()
    assert completion.stats.completion_tokens == n_tokens
    return completion.stats.decode_s

"""Time to the first token: a cold prompt against a bare loop, a restored one against both.

    python bench/first_token.py [--model FILE] [--pairs 7] [--json]

Every cold run of the engine is paired with a bare loop of ``llama_decode`` over the same
tokens in the same slices, in turn and in one process, so that the ratio holds when the
machine's speed drifts. The engine saves to RAM and to disk meanwhile, as it does by default.
After each pair the prompt is asked again in the same process, and once at the end in a new
process, from disk, with a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bare_loop import BareLoop

from erllama_core import Engine, Model, Prompt, load_config
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.demo_steps import CONTEXT_TOKENS, Setup, ask_after_restart, demo_prompt
from erllama_core.cli.logs import configure_logs


def measure(path: Path, pairs: int) -> dict[str, Any]:
    """All figures; times in seconds."""
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
        setup = Setup(str(path), root)
        tier = {"name": "disk", "kind": "disk", "root": root}
        with Engine(load_config({"tiers": [tier]}, environ={})) as engine:
            model = engine.load_model(
                "bench",
                backend="llama",
                model_path=str(path),
                tier=["ram", "disk"],
                context_opts={"n_ctx": CONTEXT_TOKENS, "resident_cells_max": 0},
            )
            prompt = demo_prompt(model)
            # Two sequences and one pool of cells, as the engine's model has them.
            with BareLoop(path, unified=True, n_ctx=CONTEXT_TOKENS // 2, n_seq=2) as bare:
                figures = _pairs(engine, model, prompt, bare, pairs)
            # Without a salt, for the new process to find.
            model.complete(prompt, response_tokens=1)
            engine.flush()
        restarts = [ask_after_restart(setup) for _ in range(pairs)]
    restart = statistics.median(outcome.first_token_s for outcome in restarts)
    return {
        **figures,
        "prompt_tokens": len(prompt),
        "restored_bytes": restarts[0].restored_bytes,
        "restart_first_token_s": restart,
        "restart_speed_up": figures["cold_first_token_s"] / restart,
        "exact_speed_up": figures["cold_first_token_s"] / figures["exact_first_token_s"],
        "restart_hits": sorted({outcome.hit for outcome in restarts}),
    }


def _pairs(
    engine: Engine, model: Model, prompt: Prompt, bare: BareLoop, pairs: int
) -> dict[str, Any]:
    cold, loop, exact = [], [], []
    tokens = list(prompt)
    bare.prefill(tokens)
    for number in range(pairs + 1):
        salt = f"pair {number}"
        began = time.perf_counter()
        first = model.complete(prompt, response_tokens=1, cache_salt=salt).stats
        assert first.cache_hit_kind == "cold", time.perf_counter() - began
        engine.flush()
        again = model.complete(prompt, response_tokens=1, cache_salt=salt).stats
        assert again.cache_hit_kind == "exact"
        assert again.prefill_s == 0.0, "an exact hit computes nothing before its first token"
        engine.flush()
        # As in a service whose tiers are full: what is saved next finds pages that are mapped.
        engine.cache.evict_bytes(1 << 62)
        seconds = bare.prefill(tokens)
        if number:  # the first pair is a warm-up
            cold.append(first.first_token_s or 0.0)
            exact.append(again.first_token_s or 0.0)
            loop.append(seconds)
    ratios = sorted(b / c for b, c in zip(loop, cold, strict=True))
    return {
        "pairs": pairs,
        "cold_first_token_s": statistics.median(cold),
        "bare_loop_s": statistics.median(loop),
        "speed_of_bare_loop": statistics.median(ratios),
        "speed_of_bare_loop_min_max": (ratios[0], ratios[-1]),
        "exact_first_token_s": statistics.median(exact),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    configure_logs()
    path = arguments.model or fetch_demo_model()
    figures = measure(path, arguments.pairs)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    low, high = figures["speed_of_bare_loop_min_max"]
    print(
        f"{figures['prompt_tokens']} tokens, medians of {figures['pairs']}\n"
        f"cold     {figures['cold_first_token_s'] * 1e3:9.1f} ms\n"
        f"bare     {figures['bare_loop_s'] * 1e3:9.1f} ms   cold runs at "
        f"{figures['speed_of_bare_loop']:.3f} of its speed ({low:.3f} to {high:.3f}); "
        f"target 0.97\n"
        f"exact    {figures['exact_first_token_s'] * 1e3:9.1f} ms   "
        f"{figures['exact_speed_up']:.0f} times sooner than cold\n"
        f"restart  {figures['restart_first_token_s'] * 1e3:9.1f} ms   "
        f"{figures['restart_speed_up']:.0f} times sooner than cold; target 200 "
        f"({figures['restored_bytes'] / 1e6:.1f} MB, {', '.join(figures['restart_hits'])})"
    )


if __name__ == "__main__":
    main()

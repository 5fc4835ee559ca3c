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
import ctypes
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from erllama_core import Engine, Model, Prompt, load_config
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.demo_steps import CONTEXT_TOKENS, Setup, ask_after_restart, demo_prompt
from erllama_core.cli.logs import configure_logs

SLICE_TOKENS = 512
"""What the engine computes at a time by default: a quarter of n_batch."""


class BareLoop:
    """``llama_decode`` and nothing else, with the context parameters of the engine's model."""

    def __init__(self, path: Path, n_threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_TOKENS, 2048, 512
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = n_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(SLICE_TOKENS, 0, 1)

    def run(self, prompt: Prompt) -> float:
        """Seconds to compute the prompt and to read its last logits."""
        tokens = np.frombuffer(prompt.packed, dtype="<i4")
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        seconds = 0.0
        for start in range(0, len(tokens), SLICE_TOKENS):
            part = tokens[start : start + SLICE_TOKENS]
            batch, n = self._batch, len(part)
            batch.n_tokens = n
            ctypes.memmove(batch.token, part.ctypes.data, 4 * n)
            for i in range(n):
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
                batch.logits[i] = start + i == len(tokens) - 1
            began = time.perf_counter()
            if llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            if start + n == len(tokens):
                llama_cpp.llama_get_logits_ith(self._context, -1)
            seconds += time.perf_counter() - began
        return seconds

    def close(self) -> None:
        """Free the context and the weights."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


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
            figures = _pairs(engine, model, prompt, BareLoop(path, _threads()), pairs)
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
    bare.run(prompt)
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
        seconds = bare.run(prompt)
        if number:  # the first pair is a warm-up
            cold.append(first.first_token_s or 0.0)
            exact.append(again.first_token_s or 0.0)
            loop.append(seconds)
    bare.close()
    ratios = sorted(b / c for b, c in zip(loop, cold, strict=True))
    return {
        "pairs": pairs,
        "cold_first_token_s": statistics.median(cold),
        "bare_loop_s": statistics.median(loop),
        "speed_of_bare_loop": statistics.median(ratios),
        "speed_of_bare_loop_min_max": (ratios[0], ratios[-1]),
        "exact_first_token_s": statistics.median(exact),
    }


def _threads() -> int:
    """As many as the backend takes by default."""
    from erllama_backend_llama.context_params import default_threads

    return default_threads()


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

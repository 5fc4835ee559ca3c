"""What snapshots cost a cold prefill, for models whose state cannot be cut.

    python bench/snapshots.py [--model FILE] [--pairs 9] [--json]

The same prompt is computed in turn as it is by default, and by a model of its own that saves its
blocks and takes no snapshots: the difference is copying them, and slices that end earlier. Without
a file, on tiny models that the tests generate, one for each kind of memory. They compute a token
in some ten microseconds, so that whatever is done beside computing weighs a hundred times as much
as with a model of a size that is of use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
from figure import Figure

from erllama_core import Engine, Model, Prompt, load_config
from erllama_core.cli.logs import configure_logs
from erllama_core.model.saver import Saver

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_gguf import Arch, write_tiny_gguf

MOST_PERCENT: Final = 5.0
N_CTX: Final = 16_384
PROMPT_TOKENS: Final = 8_000
KINDS: Final[tuple[tuple[Arch, dict[str, Any]], ...]] = (
    ("qwen35", {}),
    ("lfm2", {}),
    ("mamba", {}),
    ("gemma3", {"swa_full": False}),
    ("qwen35", {"kv_unified": False}),
)
_TEXT: Final = "The keeper of the lamp climbed the stairs each evening, and counted them. "


class WithoutSnapshots(Saver):
    """Saves blocks alone."""

    @property
    def _takes_snapshots(self) -> bool:
        return False


@attrs.frozen
class Runs:
    """Seconds of prefills, pair by pair."""

    usual: list[float]
    without: list[float]

    @property
    def percent_slower(self) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(self.usual, self.without, strict=True)]


def prompts(model: Model) -> Iterator[tuple[str, Prompt]]:
    """A long text, and a long chat."""
    per_piece = len(model.tokenize(_TEXT, add_bos=False))
    yield "text", model.tokenize(_TEXT * (PROMPT_TOKENS // per_piece))
    turns = PROMPT_TOKENS // (6 * per_piece)
    messages = [{"role": "system", "content": _TEXT * 4}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn}: {_TEXT}"})
        messages.append({"role": "assistant", "content": _TEXT * 4})
    messages.append({"role": "user", "content": "And then?"})
    yield "chat", model.apply_chat_template(messages)


def measure(path: Path, context_opts: dict[str, Any], pairs: int) -> list[Figure]:
    """Of one model."""
    figures = []
    with (
        tempfile.TemporaryDirectory(prefix="erllama-bench-") as root,
        Engine(
            load_config(
                {
                    "tiers": [
                        {"name": "near", "kind": "ram", "quota_bytes": "2GiB"},
                        {"name": "disk", "kind": "disk", "root": root},
                    ]
                },
                environ={},
            )
        ) as engine,
    ):
        opts = {"n_ctx": N_CTX, "resident_cells_max": 0} | context_opts
        usual, without = (
            engine.load_model(
                name, backend="llama", model_path=str(path), tier=["near"], context_opts=opts
            )
            for name in ("usual", "without")
        )
        without._worker._runner.saver.__class__ = WithoutSnapshots  # noqa: SLF001 - on purpose
        for what, prompt in prompts(usual):
            runs = _pairs(engine, usual, without, prompt, pairs)
            counted = _stored(engine, usual, prompt)
            figures.append(
                Figure.of_runs(
                    f"{usual.info().kv_class}, {what} of {len(prompt):,} tokens: slower by",
                    runs.percent_slower,
                    unit="%",
                    target=MOST_PERCENT,
                    digits=2,
                )
            )
            seconds = statistics.median(runs.usual)
            figures.append(
                Figure(
                    name=f"    {counted[0]} snapshots of {counted[1] / 1e6:.3f} MB; us/token",
                    measured=1e6 * seconds / len(prompt),
                    digits=1,
                )
            )
    return figures


def _pairs(engine: Engine, usual: Model, without: Model, prompt: Prompt, pairs: int) -> Runs:
    runs = Runs([], [])
    order = [(usual, runs.usual), (without, runs.without)]
    for number in range(pairs + 1):
        order.reverse()
        for model, seconds in order:
            seconds.append(_prefill(engine, model, prompt, f"pair {number}"))
    del runs.usual[0], runs.without[0]  # the first pair is a warm-up
    return runs


def _prefill(engine: Engine, model: Model, prompt: Prompt, salt: str) -> float:
    """Seconds to compute a prompt that is nowhere stored."""
    engine.cache.gc()
    started = time.perf_counter()
    done = model.prefill_only(prompt, cache_salt=salt)
    seconds = time.perf_counter() - started
    assert done.cache_hit_kind == "cold"
    engine.flush()
    return seconds


def _stored(engine: Engine, model: Model, prompt: Prompt) -> tuple[int, int]:
    """Snapshots that a prefill leaves behind, and their bytes."""
    _prefill(engine, model, prompt, "count")
    sizes = [row.size_bytes for row in engine.cache.dump() if row.kind == "snapshot"]
    return len(sizes), sum(sizes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the tiny ones")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    configure_logs()
    figures: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        if args.model is not None:
            figures[args.model.name] = measure(args.model, {}, args.pairs)
        else:
            for arch, context_opts in KINDS:
                path = write_tiny_gguf(Path(folder) / f"{arch}.gguf", arch, context_length=N_CTX)
                words = ", ".join(f"{key}={value}" for key, value in context_opts.items())
                figures[f"{arch} {words}".strip()] = measure(path, context_opts, args.pairs)
    if args.json:
        print(json.dumps({name: [attrs.asdict(f) for f in of] for name, of in figures.items()}))
        return
    for name, of in figures.items():
        print(name)
        for figure in of:
            print(figure)


if __name__ == "__main__":
    main()

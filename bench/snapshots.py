"""What snapshots cost a cold prefill, for models whose state cannot be cut.

    python bench/snapshots.py [--only KIND] [--model FILE] [--pairs 7] [--json]

One model computes the same prompt in turn as it does by default, and while it saves its blocks and
takes no snapshots: the difference is copying them, and slices that end earlier. Which of the two
comes first changes from pair to pair. (Two models would differ by themselves, by where their
weights and threads lie.)

Without a file, on models that are generated: random weights in the proportions of small ones that
people use, one for each kind of memory. What counts is the state's size for each millisecond of
computing. Qwen3.5-0.8B has some 19 MB of recurrent state, and takes about 15 ms a token on a
machine like the one on which this was written; here it is 2.2 MB and 1.5 ms.
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
from erllama_core.cache.policy import SavePolicy
from erllama_core.cli.logs import configure_logs
from erllama_core.model.request import Request
from erllama_core.model.saver import Saver

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_gguf import Arch, write_tiny_gguf

MOST_PERCENT: Final = 5.0
N_CTX: Final = 4096
PROMPT_TOKENS: Final = 2500
VOCABULARY: Final = 65_536
"""As large as LFM2's: all logits are kept where a prompt may end."""
_TEXT: Final = "The keeper of the lamp climbed the stairs each evening, and counted them. "


@attrs.frozen
class Kind:
    """A generated model and how its context is opened."""

    arch: Arch
    width: int
    layers: int
    window: int = 512
    context_opts: dict[str, Any] = attrs.field(factory=dict)


KINDS: Final = {
    "qwen35": Kind("qwen35", width=8, layers=8),
    "lfm2": Kind("lfm2", width=6, layers=8),
    "mamba": Kind("mamba", width=8, layers=16),
    "gemma3": Kind("gemma3", width=8, layers=10, context_opts={"swa_full": False}),
    "qwen35-separate": Kind("qwen35", width=8, layers=8, context_opts={"kv_unified": False}),
}


class WithoutSnapshots(Saver):
    """Saves blocks alone."""

    @property
    def _takes_snapshots(self) -> bool:
        return False


class TimedSaver(Saver):
    """Saves as by default, and adds up the time that taking snapshots and logits takes."""

    seconds: float

    def _take_snapshot(self, request: Request, row: int | None) -> None:
        started = time.perf_counter()
        super()._take_snapshot(request, row)
        self.seconds += time.perf_counter() - started

    def _save_end(self, request: Request, row: int | None, reason: Any) -> None:
        started = time.perf_counter()
        super()._save_end(request, row, reason)
        self.seconds += time.perf_counter() - started

    def _thin(self, request: Request) -> None:
        started = time.perf_counter()
        super()._thin(request)
        self.seconds += time.perf_counter() - started


@attrs.frozen
class Runs:
    """Seconds of prefills, pair by pair."""

    usual: list[float]
    without: list[float]
    taking: list[float]
    """Of the first, what was spent in taking snapshots."""

    @property
    def percent_slower(self) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(self.usual, self.without, strict=True)]

    @property
    def percent_taking(self) -> list[float]:
        return [100 * a / b for a, b in zip(self.taking, self.usual, strict=True)]


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
    figures: list[Figure] = []
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
        model = engine.load_model(
            backend="llama", model_path=str(path), tier=["near"], context_opts=opts
        )
        for what, prompt in prompts(model):
            runs = _pairs(engine, model, prompt, pairs)
            figures += _figures(f"{model.info().kv_class}, {what}", prompt, runs)
            figures += _stored(engine, model, prompt)
    return figures


def _figures(name: str, prompt: Prompt, runs: Runs) -> list[Figure]:
    ms_per_token = 1e3 * statistics.median(runs.usual) / len(prompt)
    return [
        Figure.of_runs(
            f"{name} of {len(prompt):,} tokens: slower by",
            runs.percent_slower,
            unit="%",
            target=MOST_PERCENT,
            digits=2,
        ),
        Figure.of_runs(
            "    of its time in taking snapshots and logits",
            runs.percent_taking,
            unit="%",
            target=MOST_PERCENT,
            digits=2,
        ),
        Figure(name="    a token", measured=ms_per_token, unit="ms"),
    ]


def _pairs(engine: Engine, model: Model, prompt: Prompt, pairs: int) -> Runs:
    saver: Any = model._worker._runner.saver  # noqa: SLF001 - on purpose
    runs = Runs([], [], [])
    order = [(TimedSaver, runs.usual), (WithoutSnapshots, runs.without)]
    for number in range(pairs + 1):
        order.reverse()
        for kind, seconds in order:
            saver.__class__, saver.seconds = kind, 0.0
            seconds.append(_prefill(engine, model, prompt, f"pair {number}"))
            if kind is TimedSaver:
                runs.taking.append(saver.seconds)
    saver.__class__ = Saver
    for of in (runs.usual, runs.without, runs.taking):
        del of[0]  # the first pair is a warm-up
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


def _stored(engine: Engine, model: Model, prompt: Prompt) -> list[Figure]:
    """What snapshots, and the logits beside them, take of a context, and what they may."""
    _prefill(engine, model, prompt, "count")
    rows = engine.cache.dump()
    sizes = [row.size_bytes for row in rows if row.kind == "snapshot"]
    beside = sum(row.size_bytes for row in rows if row.kind == "logits")
    bound = SavePolicy().snapshot_bytes_max
    return [
        Figure(name="    a snapshot", measured=max(sizes) / 1e6, unit="MB", digits=2),
        Figure(
            name=f"    the {len(sizes)} of this context, with logits",
            measured=(sum(sizes) + beside) / 1e6,
            unit="MB",
            target=bound / 1e6,
            digits=2,
        ),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=KINDS, nargs="+", help="some of the generated models")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of them")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    configure_logs()
    figures: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        if args.model is not None:
            figures[args.model.name] = measure(args.model, {}, args.pairs)
        else:
            for name in args.only or KINDS:
                kind = KINDS[name]
                path = write_tiny_gguf(
                    Path(folder) / "model.gguf",
                    kind.arch,
                    width=kind.width,
                    layers=kind.layers,
                    window=kind.window,
                    vocabulary_least=VOCABULARY,
                )
                figures[name] = measure(path, kind.context_opts, args.pairs)
    if args.json:
        print(json.dumps({name: [attrs.asdict(f) for f in of] for name, of in figures.items()}))
        return
    for name, of in figures.items():
        print(name)
        for figure in of:
            print(figure)


if __name__ == "__main__":
    main()

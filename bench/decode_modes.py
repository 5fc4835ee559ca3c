"""Decode throughput with unified and with separate KV cells, at 1, 4 and 8 streams.

    python bench/decode_modes.py [--model FILE] [--tokens 1500] [--steps 32] [--rounds 5] [--json]

Every stream has a context of so many tokens: cells of its own, or all but the last few of them
shared. Contexts are computed once and imported, so that what is timed is one ``step`` per
token, of all streams together, and nothing else. The cases take turns, so that they stay
comparable when the machine's speed drifts; what is printed is tokens per second over all
streams, medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np

from erllama_backend_llama.model import load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.interfaces.backend import (
    BackendRequest,
    Context,
    ContextOptions,
    RangeExport,
    RangeImport,
    Row,
)

STREAMS = (1, 4, 8)
OWN_TOKENS = 12
"""Tokens that streams with a shared prefix do not share."""


@attrs.frozen
class Case:
    """How the streams' contexts lie in the cells."""

    name: str
    unified: bool
    shared: bool = False
    stride: int = 1
    """Sequences used: every, or every second one, as when others have ended."""


CASES = (
    Case("unified, own contexts", unified=True),
    Case("separate, own contexts", unified=False),
    Case("unified, shared prefix", unified=True, shared=True),
    Case("separate, shared prefix", unified=False, shared=True),
    Case("separate, own contexts, every second sequence", unified=False, stride=2),
)


class Bench:
    """One context of either kind, big enough for every case."""

    def __init__(self, path: Path, *, unified: bool, tokens: int, steps: int) -> None:
        self._tokens = tokens
        self._steps = steps
        self._n_seq = max(STREAMS) * 2
        n_ctx = tokens + steps + 1
        model = load_model(
            BackendRequest(
                model_path=path,
                options=LlamaOptions(),
                context=ContextOptions(
                    n_ctx=n_ctx * max(STREAMS) if unified else n_ctx,
                    n_seq_max=self._n_seq,
                    kv_unified=unified,
                ),
            )
        )
        self._model = model
        self._context: Context = model.open_context()
        rng = np.random.default_rng(1)
        n_vocab = model.vocabulary.n_tokens
        self._text = rng.integers(n_vocab // 2, n_vocab, tokens + steps).astype("<u4")
        self._blocks = self._compute()

    def _compute(self) -> list[RangeImport]:
        self._feed(0, 0, self._tokens)
        bounds = [*range(0, self._tokens, 256), self._tokens]
        blocks = [
            (a, b, memoryview(bytearray(self._context.range_bytes(0, a, b))))
            for a, b in itertools.pairwise(bounds)
        ]
        self._context.export_ranges(0, [RangeExport(*block) for block in blocks])
        self._context.drop(0)
        return [RangeImport(a, b, b, data) for a, b, data in blocks]

    def _feed(self, seq: int, start: int, end: int) -> None:
        for at in range(start, end, 512):
            part = self._text[at : min(at + 512, end)].tobytes()
            self._context.step([Row(seq, at, part, logits=False)])

    def run(self, case: Case, streams: int) -> float:
        """Tokens per second of all streams."""
        sequences = [case.stride * number for number in range(streams)]
        for seq in sequences:
            if case.shared and seq:
                prefix = self._tokens - OWN_TOKENS
                if not self._context.share(0, seq, prefix):
                    raise RuntimeError("the prefix could not be shared")
                self._feed(seq, prefix, self._tokens)
            else:
                self._context.import_ranges(seq, self._blocks)
        self._step(sequences, self._tokens)
        began = time.perf_counter()
        for position in range(self._tokens + 1, self._tokens + self._steps):
            self._step(sequences, position)
        seconds = time.perf_counter() - began
        for seq in sequences:
            self._context.drop(seq)
        return (self._steps - 1) * streams / seconds

    def _step(self, sequences: Sequence[int], position: int) -> None:
        token = self._text[position : position + 1].tobytes()
        self._context.step([Row(seq, position, token, logits=True) for seq in sequences])

    def close(self) -> None:
        """Free the context and the weights."""
        self._model.close()


def measure(path: Path, *, tokens: int, steps: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median tokens per second, by case and number of streams."""
    rates: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        benches = {}
        for unified in (True, False):
            bench = benches[unified] = Bench(path, unified=unified, tokens=tokens, steps=steps)
            stack.callback(bench.close)
        for _ in range(rounds):
            for streams in STREAMS:
                for case in CASES:
                    rate = benches[case.unified].run(case, streams)
                    rates.setdefault((case.name, streams), []).append(rate)
    return {
        case.name: {n: statistics.median(rates[case.name, n]) for n in STREAMS} for case in CASES
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a GGUF file; the demo model without it")
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream's context")
    parser.add_argument("--steps", type=int, default=32, help="decoded in each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(
        options.model or fetch_demo_model(),
        tokens=options.tokens,
        steps=options.steps,
        rounds=options.rounds,
    )
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    width = max(map(len, figures))
    print(f"{'tokens/s at streams':<{width}}", *(f"{n:>7}" for n in STREAMS))
    for name, row in figures.items():
        print(f"{name:<{width}}", *(f"{row[n]:7.1f}" for n in STREAMS))


if __name__ == "__main__":
    main()

"""An engine with the demo model, as callers use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from serving_load import Ask, Enough, Prompts, Reply, run_at_once

from erllama_core import Engine, Model, TextDelta, load_config


class ErllamaServer:
    """One engine and one model, with everything at its default but sizes.

    ``n_ctx``: tokens of one sequence; unified cells are as many for all of them together as
    separate ones are.
    """

    def __init__(self, path: Path, *, unified: bool, n_ctx: int, n_seq: int) -> None:
        self._engine = Engine(load_config({}, environ={}))
        self.model: Model = self._engine.load_model(
            "bench",
            backend="llama",
            model_path=str(path),
            context_opts={
                "n_ctx": n_ctx * n_seq if unified else n_ctx,
                "n_seq_max": n_seq,
                "kv_unified": unified,
            },
        )
        self.prompts = Prompts(self.model.tokenize)

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        replies = run_at_once(asks, self._answer)
        self._engine.flush()  # what a reply leaves behind is not to slow the next measurement
        return replies

    def _answer(self, ask: Ask, enough: Enough) -> list[float]:
        times = []
        with self.model.infer(ask.tokens, response_tokens=ask.reply_tokens) as stream:
            for event in stream:
                if isinstance(event, TextDelta):
                    times.append(time.monotonic())
                    if enough():
                        break
        return times

    def close(self) -> None:
        """End it, and free what it has."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

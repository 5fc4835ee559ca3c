"""erllama in a process of its own: everything at its default, with a disk tier behind the RAM."""

from __future__ import annotations

import time
from typing import Any

from child_loop import Commands, serve

from compare.words import Answer, Question, Setup
from erllama_core import Completion, Engine, Model, Prompt, TextDelta, load_config
from erllama_core.cli.logs import configure_logs
from erllama_core.prompt import pack


class Erllama:
    """An engine with one model."""

    def __init__(self, setup: Setup) -> None:
        disk = {"name": "disk", "kind": "disk", "root": setup.root}
        self._engine = Engine(load_config({"tiers": [disk]}, environ={}))
        self._model: Model = self._engine.load_model(
            "compared",
            backend="llama",
            model_path=setup.model,
            tier=["ram", "disk"],
            context_opts={"n_ctx": setup.n_ctx, "n_threads": setup.threads},
        )
        self._engine.cache.wait_scanned()

    def answer(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Answer a question."""
        question = Question.of(plain)
        prompt = Prompt.from_packed(
            pack(question.tokens), question.text, opening_tokens=question.opening_tokens
        )
        asked_at = time.monotonic()
        stream = self._model.infer(prompt, response_tokens=question.reply_tokens)
        times = [time.monotonic() for event in stream if isinstance(event, TextDelta)]
        done: Completion = stream.result()
        # What a reply leaves behind is not to slow the next contestant.
        self._engine.flush()
        return Answer(
            asked_at=asked_at,
            token_times=tuple(times),
            reply=done.reply,
            computed_tokens=done.stats.prompt_tokens - done.cache_delta.read,
        ).plain()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    configure_logs()
    erllama = Erllama(Setup(**setup))
    return {}, {
        "answer": erllama.answer,
        "keep": lambda _: None,  # flushed already
        "recall": lambda _: None,  # found by itself
        "close": lambda _: erllama.close(),
    }


if __name__ == "__main__":
    serve(_start)

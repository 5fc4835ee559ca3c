"""llama-cpp-python's ``Llama`` with one of its caches, in a process of its own."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from child_loop import Commands, serve

from compare.words import Answer, Question, Setup


class Llama:
    """The high-level API, as its users call it, with the cache that they would set.

    Everything at its default but the file, threads, context, and flash attention, which all
    other contestants have by default.
    """

    def __init__(self, setup: Setup, cache: str) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        self.version: str = llama_cpp.__version__
        self._llama = llama_cpp.Llama(
            setup.model,
            n_ctx=setup.n_ctx,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            flash_attn=True,
            verbose=False,
        )
        if cache == "ram":
            self._cache = llama_cpp.LlamaRAMCache()
        else:
            self._cache = llama_cpp.LlamaDiskCache(str(Path(setup.root) / "diskcache"))
        self._llama.set_cache(self._cache)
        self._evaluated = 0
        evaluate = self._llama.eval

        def counted(tokens: list[int]) -> None:
            self._evaluated += len(tokens)
            evaluate(tokens)

        self._llama.eval = counted

    def answer(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Answer a question."""
        question = Question.of(plain)
        tokens = list(question.tokens)
        times: list[float] = []
        pieces: list[str] = []
        computed = self._evaluated = 0
        asked_at = time.monotonic()
        for chunk in self._llama.create_completion(
            tokens, max_tokens=question.reply_tokens, temperature=0.0, stream=True
        ):
            choice = chunk["choices"][0]
            if choice["finish_reason"] is None:
                times.append(time.monotonic())
                computed = computed or self._evaluated
                pieces.append(choice["text"])
        return Answer(
            asked_at=asked_at,
            token_times=tuple(times),
            reply="".join(pieces),
            computed_tokens=computed,
        ).plain()

    def stored(self, _: Any) -> dict[str, int]:
        """Bytes in the RAM cache: as it counts them, and with the logits that it also keeps."""
        states = self._cache.cache_state.values()
        return {
            "counted": self._cache.cache_size,
            "held": sum(s.llama_state_size + s.scores.nbytes + s.input_ids.nbytes for s in states),
        }


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    cache = setup.pop("cache")
    llama = Llama(Setup(**setup), cache)
    return {"version": llama.version}, {
        "answer": llama.answer,
        "keep": lambda _: None,  # stored when a reply ends
        "recall": lambda _: None,  # found by itself
        "stored": llama.stored,
    }


if __name__ == "__main__":
    serve(_start)

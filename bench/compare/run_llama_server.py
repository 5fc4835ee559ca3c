"""llama-server, by xllamacpp, in a process of its own: one slot, its prompt cache on."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

from child_loop import Commands, serve
from serving_peer_child import LlamaServer

from compare.words import Answer, Question, Setup


class OneSlot:
    """A server that answers one request at a time."""

    def __init__(self, xllamacpp: Any, setup: Setup) -> None:
        self._server = LlamaServer(
            xllamacpp,
            {
                "model": setup.model,
                "unified": True,
                "n_ctx": setup.n_ctx,
                "n_seq": 1,
                "threads": setup.threads,
                "folder": setup.root,
            },
        )
        self._recalled_at: float | None = None

    def answer(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Answer a question; the time of a recall before it counts."""
        question = Question.of(plain)
        asked_at, self._recalled_at = self._recalled_at or time.monotonic(), None
        times, events, end = self._server.complete(question.tokens, question.reply_tokens)
        if not times:
            raise RuntimeError(f"no token came, but {end[-500:]!r}")
        # Bytes that are no whole character come as U+FFFD, as its other clients see them.
        reply = [json.loads(event)["choices"][0]["text"] for event in events]
        timings = json.loads(end)["timings"]
        return Answer(
            asked_at=asked_at,
            token_times=tuple(times),
            reply="".join(reply),
            computed_tokens=timings["prompt_n"],
        ).plain()

    def keep(self, _: Any) -> None:
        """Save the slot to disk."""
        self._server.slot(0, "save")

    def recall(self, _: Any) -> None:
        """Restore the slot from disk, for the next question."""
        self._recalled_at = time.monotonic()
        self._server.slot(0, "restore")


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    xllamacpp = importlib.import_module("xllamacpp")
    server = OneSlot(xllamacpp, Setup(**setup))
    about = {"version": xllamacpp.__version__, "build": xllamacpp.get_system_info()}
    return about, {"answer": server.answer, "keep": server.keep, "recall": server.recall}


if __name__ == "__main__":
    serve(_start)

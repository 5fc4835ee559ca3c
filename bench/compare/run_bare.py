"""What a loop by hand can do: it computes what differs from its last context, and nothing else.

Its file is the state as llama.cpp gives it. In a new process it can also measure the floor of a
restore: to read that file, to check and to copy it, and to draw one token.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import xxhash
from bare_loop import BareLoop
from child_loop import Commands, serve

from compare.words import Answer, Question, Setup, common_tokens


class ByHand:
    """A bare loop that remembers which tokens its one sequence has."""

    def __init__(self, setup: Setup) -> None:
        self._loop = BareLoop(
            Path(setup.model), unified=True, n_ctx=setup.n_ctx, n_seq=1, threads=setup.threads
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._loop.model)
        self._path = Path(setup.root) / "state"
        self._held: tuple[int, ...] = ()
        self._recalled_at: float | None = None

    def answer(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Answer a question; the time of a recall before it counts."""
        question = Question.of(plain)
        asked_at, self._recalled_at = self._recalled_at or time.monotonic(), None
        # The last token is always computed: the logits behind it are what is drawn from.
        kept = min(common_tokens(self._held, question.tokens), len(question.tokens) - 1)
        self._loop.prefill(question.tokens, kept)
        drawn = [self._loop.draw()]
        times = [time.monotonic()]
        while len(drawn) < question.reply_tokens and not self._ends(drawn[-1]):
            self._loop.append(drawn[-1])
            drawn.append(self._loop.draw())
            times.append(time.monotonic())
        self._held = (*question.tokens, *drawn[:-1])
        return Answer(
            asked_at=asked_at,
            token_times=tuple(times),
            reply=b"".join(map(self._piece, drawn)).decode(errors="replace"),
            computed_tokens=len(question.tokens) - kept,
        ).plain()

    def _ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def _piece(self, token: int) -> bytes:
        if self._ends(token):
            return b""
        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(n, 0)]

    def keep(self, _: Any) -> None:
        """Write the state and its tokens."""
        self._path.write_bytes(bytes(self._loop.state()))
        self._path.with_suffix(".tokens").write_text(" ".join(map(str, self._held)))

    def recall(self, _: Any) -> None:
        """Read them, for the next question."""
        self._recalled_at = time.monotonic()
        self._held = self._tokens()
        data = self._path.read_bytes()
        self._loop.set_state((ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(self._held))

    def _tokens(self) -> tuple[int, ...]:
        return tuple(map(int, self._path.with_suffix(".tokens").read_text().split()))

    def floor(self, runs: int) -> list[float]:
        """Seconds of so many restores at their least: pages are there before the clock starts."""
        tokens = self._tokens()
        size = self._path.stat().st_size
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, 1, size)
        # Logits to draw from, which a cache would have stored.
        self._loop.prefill(tokens[:1])
        self._held = ()
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            with self._path.open("rb", buffering=0) as file:
                if file.readinto(buffer) != size:
                    raise RuntimeError("the state's file is not read in one piece")
            xxhash.xxh3_128_digest(buffer)
            self._loop.set_state(buffer, len(tokens))
            self._loop.draw()
            seconds.append(time.perf_counter() - began)
        return seconds


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    bare = ByHand(Setup(**setup))
    return {"version": llama_cpp.__version__}, {
        "answer": bare.answer,
        "keep": bare.keep,
        "recall": bare.recall,
        "floor": bare.floor,
    }


if __name__ == "__main__":
    serve(_start)

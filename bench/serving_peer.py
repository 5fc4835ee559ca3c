"""llama-server as a peer: in a child process, with its own llama.cpp."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
from serving_load import Ask, Reply

from erllama_backend_llama.context_params import default_threads

PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
"""Of the environment that ``make bench-serving`` makes."""


class PeerUnavailable(Exception):
    """The peer cannot be started here; the text says why."""


class LlamaServerPeer:
    """The same file, threads and context as ErllamaServer; see there for ``n_ctx``.

    Raises PeerUnavailable.
    """

    def __init__(self, path: Path, *, unified: bool, n_ctx: int, n_seq: int) -> None:
        if not PYTHON.exists():
            raise PeerUnavailable("xllamacpp is not installed; make bench-serving installs it")
        self._folder = tempfile.TemporaryDirectory(prefix="erllama-bench-")
        self._said = (Path(self._folder.name) / "log").open("w+b")
        self._child = subprocess.Popen(
            [str(PYTHON), str(Path(__file__).with_name("serving_peer_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        try:
            self._send(
                {
                    "model": str(path),
                    "unified": unified,
                    "n_ctx": n_ctx,
                    "n_seq": n_seq,
                    "threads": default_threads(),
                    "folder": self._folder.name,
                }
            )
            started = self._receive()
        except BaseException:
            self.close()
            raise
        self.version: str = started["version"]
        self.build: str = started["build"]

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        return [
            Reply(asked_at=reply["asked_at"], token_times=tuple(reply["token_times"]))
            for reply in self._do("ask", [attrs.asdict(ask) for ask in asks])
        ]

    def spread_slot(self, n_slots: int) -> None:
        """Give ``n_slots`` slots the state of the first, in cells of their own; empty the rest."""
        self._do("spread_slot", n_slots)

    def _do(self, what: str, argument: Any) -> Any:
        self._send({"do": what, "with": argument})
        answer = self._receive()
        if "error" in answer:
            raise RuntimeError(f"llama-server: {answer['error']}")
        return answer["done"]

    def _send(self, value: Any) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(value) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise PeerUnavailable(self._last_words()) from None

    def _receive(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise PeerUnavailable(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._child.wait(10)
        self._said.seek(0)
        said = self._said.read()[-500:].decode(errors="replace").strip()
        return f"its process ended with {self._child.returncode}: {said}"

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._said.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

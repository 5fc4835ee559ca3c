"""A peer's process, seen from the benchmark: started on a module, asked, ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

BENCH = Path(__file__).parent
OURS = Path(sys.executable)
PEERS = BENCH.parent / ".venv-peers" / "bin" / "python"
"""Of the environment that ``make .venv-peers/.ready`` makes."""


class PeerUnavailable(Exception):
    """The peer cannot be started here; the text says why."""


class ChildProcess:
    """A process that serves ``child_loop``'s commands. Raises PeerUnavailable.

    ``module``: below this folder. ``setup``: what its start is told. ``about`` is what it says of
    itself when it is ready.
    """

    def __init__(self, python: Path, module: str, setup: dict[str, Any]) -> None:
        self._name = module
        if not python.exists():
            raise PeerUnavailable(f"there is no {python.parent.parent.name}; make bench makes it")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._child = subprocess.Popen(
            [str(python), "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "PYTHONPATH": str(BENCH)},
        )
        try:
            self._send(setup)
            self.about: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def do(self, what: str, argument: Any = None) -> Any:
        """Have a command carried out. Raises RuntimeError when it fails, with what it says."""
        self._send({"do": what, "with": argument})
        answer = self._receive()
        if "error" in answer:
            raise RuntimeError(f"{self._name}: {answer['error']}")
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
        """End the process; more often is the same."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if self._said.closed:
            return
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._child.stdin.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

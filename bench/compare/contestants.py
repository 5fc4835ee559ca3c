"""Who takes part, and how each is started, asked and started again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import attrs
from child_process import OURS, PEERS, ChildProcess, PeerUnavailable

from compare.words import Answer, Question, Setup


@attrs.frozen(kw_only=True)
class Kind:
    """What runs a contestant, and what it can do."""

    name: str
    python: Path
    module: str
    options: dict[str, Any] = attrs.field(factory=dict)
    survives: bool = True
    """Whether a new process finds what an earlier one computed."""


OWN: Final = "erllama"
BARE: Final = "bare loop"
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind(name=OWN, python=OURS, module="compare.run_erllama"),
        Kind(name="llama-server", python=PEERS, module="compare.run_llama_server"),
        Kind(
            name="LlamaRAMCache",
            python=PEERS,
            module="compare.run_llama_cpp_python",
            options={"cache": "ram"},
            survives=False,
        ),
        Kind(
            name="LlamaDiskCache",
            python=PEERS,
            module="compare.run_llama_cpp_python",
            options={"cache": "disk"},
        ),
        Kind(name=BARE, python=OURS, module="compare.run_bare"),
    )
}


class Contestant:
    """One of them, running. Raises PeerUnavailable when it cannot be started."""

    def __init__(self, kind: Kind, path: Path, *, n_ctx: int, threads: int) -> None:
        self.kind: Final = kind
        self._folder = tempfile.TemporaryDirectory(prefix="erllama-bench-")
        self._setup: dict[str, Any] = {
            **attrs.asdict(
                Setup(model=str(path), n_ctx=n_ctx, threads=threads, root=self._folder.name)
            ),
            **kind.options,
        }
        try:
            self._child = self._start()
        except BaseException:
            self._folder.cleanup()
            raise

    def _start(self) -> ChildProcess:
        return ChildProcess(self.kind.python, self.kind.module, self._setup)

    @property
    def version(self) -> str:
        """Of the library that it runs; empty for our own."""
        return str(self._child.about.get("version", ""))

    def answer(self, question: Question) -> Answer:
        """Raises RuntimeError for a reply without a token."""
        answer = Answer.of(self._child.do("answer", question.plain()))
        if not answer.token_times:
            raise RuntimeError(f"{self.kind.name} answered nothing")
        return answer

    def restart(self) -> None:
        """Another process, which has what the first one's root keeps, and is ready."""
        self._child.do("keep")
        self._child.close()
        self._child = self._start()

    def recall(self) -> None:
        """Bring back what was kept, where that is a step of its own; the next answer counts it."""
        self._child.do("recall")

    def floor(self, runs: int) -> list[float]:
        """What the restore of its last context costs at least; of the bare loop alone."""
        seconds: list[float] = self._child.do("floor", runs)
        return seconds

    def stored(self) -> dict[str, int]:
        """What it holds in its cache, in bytes; of LlamaRAMCache alone."""
        found: dict[str, int] = self._child.do("stored")
        return found

    def close(self) -> None:
        """End it, and remove what it kept."""
        self._child.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Field:
    """All who take part. Who cannot be started or falls out is left out, and ``absent`` says why.

    ``names``: of ``KINDS``.
    """

    def __init__(self, path: Path, names: Sequence[str], *, n_ctx: int, threads: int) -> None:
        self.absent: dict[str, str] = {}
        self._running: dict[str, Contestant] = {}
        for name in names:
            try:
                self._running[name] = Contestant(KINDS[name], path, n_ctx=n_ctx, threads=threads)
            except PeerUnavailable as error:
                self.absent[name] = str(error)

    def each(self, number: int, turn: Callable[[Contestant], None]) -> None:
        """A turn for everybody; another one begins in each round, so that nobody always does."""
        names = list(self._running)
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            contestant = self._running[name]
            try:
                turn(contestant)
            except (PeerUnavailable, RuntimeError) as error:
                if name == OWN:
                    raise
                self.absent[name] = str(error)
                self._running.pop(name).close()

    def close(self) -> None:
        """End everybody."""
        while self._running:
            self._running.popitem()[1].close()


@contextmanager
def field(path: Path, names: Sequence[str], *, n_ctx: int, threads: int) -> Iterator[Field]:
    """All who take part, for a while."""
    found = Field(path, names, n_ctx=n_ctx, threads=threads)
    try:
        yield found
    finally:
        found.close()

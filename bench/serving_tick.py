"""What of a tick is spent outside llama.cpp."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figure import Figure
from llama_cpp import llama_cpp
from report import Section
from serving_bare import BareLoopProcess
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts
from serving_sizes import Sizes

from erllama_backend_llama import logits

TARGET_MS = 0.3


def measure(sizes: Sizes, path: Path) -> Section:
    """What lies between the end of one ``llama_decode`` and the start of the next.

    Code of the backend counts, and so does waiting for the interpreter's lock. Not counted is
    the one native pass over the logits, numpy's, that checks them and draws for all greedy
    streams; it is shown beside the draws of a bare loop.
    """
    streams = max(sizes.streams)
    n_ctx = sizes.context_tokens + sizes.tail_tokens + sizes.tick_steps + 8
    shape: Any = {"unified": True, "n_ctx": n_ctx, "n_seq": streams}
    read: list[Ticks] = []
    unread: list[Ticks] = []
    bare: list[float] = []
    with ErllamaServer(path, **shape) as server, BareLoopProcess(path, **shape) as loop:
        asks = _asks(sizes, server.prompts, streams)
        server.ask(asks)
        for _ in range(sizes.tick_runs):
            with watched(streams) as ticks:
                server.ask(asks)
            read.append(ticks)
            with watched(streams) as ticks:
                _unread(server, asks)
            unread.append(ticks)
            loop.fill([ask.tokens for ask in asks], shared_tokens=sizes.context_tokens)
            done = loop.decode(sizes.tick_steps)
            bare.append(1000 * done.sampling_s / done.steps)
    figures = [
        Figure.of_runs(
            f"Python's share of a tick, {streams} streams",
            [statistics.median(ticks.python_ms) for ticks in read],
            unit="ms",
            target=TARGET_MS,
        ),
        Figure.of_runs(
            "    mean of all ticks, saves included",
            [statistics.fmean(ticks.python_ms) for ticks in read],
            unit="ms",
        ),
        Figure.of_runs(
            "    while nobody reads the streams",
            [statistics.median(ticks.python_ms) for ticks in unread],
            unit="ms",
        ),
        Figure.of_runs(
            "    pass over the logits, not counted above",
            [statistics.median(ticks.pass_ms) for ticks in read],
            unit="ms",
        ),
        Figure.of_runs("    native greedy draws of the bare loop", bare, unit="ms"),
    ]
    return Section(name="tick", title="What a tick takes outside llama.cpp", figures=tuple(figures))


class Ticks:
    """Milliseconds of each tick: llama.cpp's, then those of Python and of the pass over the
    logits.
    """

    def __init__(self) -> None:
        self.decode_ms: list[float] = []
        self.python_ms: list[float] = []
        self.pass_ms: list[float] = []


def _asks(sizes: Sizes, prompts: Prompts, streams: int) -> list[Ask]:
    prefix = prompts.ledger(0, sizes.context_tokens)
    return [
        Ask(tokens=prefix + prompts.tail(n, sizes.tail_tokens), reply_tokens=sizes.tick_steps)
        for n in range(streams)
    ]


def _unread(server: ErllamaServer, asks: list[Ask]) -> None:
    """Nobody looks at the replies until all of them are there."""
    streams = [server.model.infer(a.tokens, response_tokens=a.reply_tokens) for a in asks]
    while server.model.phase() != "idle":
        time.sleep(0.05)
    for stream in streams:
        stream.result()


@contextmanager
def watched(streams: int) -> Iterator[Ticks]:
    """Watch steps of ``streams`` tokens; the result is filled in at the end."""
    decode: Callable[..., Any] = llama_cpp.llama_decode
    largest = logits.largest
    calls: list[tuple[int, float, float]] = []
    passes: list[tuple[float, float]] = []
    clock = time.perf_counter

    def timed_decode(context: Any, batch: Any) -> Any:
        began = clock()
        status = decode(context, batch)
        calls.append((batch.n_tokens, began, clock()))
        return status

    def timed_largest(rows: logits.Logits) -> list[int]:
        began = clock()
        found = largest(rows)
        passes.append((began, clock()))
        return found

    ticks = Ticks()
    setattr(llama_cpp, "llama_decode", timed_decode)  # noqa: B010 - mypy knows it as a function
    setattr(logits, "largest", timed_largest)  # noqa: B010 - as above
    try:
        yield ticks
    finally:
        setattr(llama_cpp, "llama_decode", decode)  # noqa: B010 - as above
        setattr(logits, "largest", largest)  # noqa: B010 - as above
    # Each decode is followed by its pass.
    for (before, (began, ended)), (after, _) in itertools.pairwise(
        zip(calls, passes, strict=False)
    ):
        if before[0] == after[0] == streams:
            ticks.decode_ms.append(1000 * (before[2] - before[1]))
            ticks.python_ms.append(1000 * (after[1] - before[2] - (ended - began)))
            ticks.pass_ms.append(1000 * (ended - began))

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
from serving_bare import BareLoop
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts
from serving_sizes import Sizes

TARGET_MS = 0.3


def measure(sizes: Sizes, path: Path) -> list[Figure]:
    """All that lies between the end of one ``llama_decode`` and the start of the next.

    Code of the backend counts, and so does waiting for the interpreter's lock. Greedy draws
    are no native calls of ours; those of a bare loop are shown beside it.
    """
    streams = max(sizes.streams)
    n_ctx = sizes.context_tokens + sizes.tail_tokens + sizes.tick_steps + 8
    shape: Any = {"unified": True, "n_ctx": n_ctx, "n_seq": streams}
    read: list[list[float]] = []
    unread: list[list[float]] = []
    bare: list[float] = []
    with ErllamaServer(path, **shape) as server, BareLoop(path, **shape) as loop:
        asks = _asks(sizes, server.prompts, streams)
        server.ask(asks)
        state = loop.compute(asks[0].tokens)
        for _ in range(sizes.tick_runs):
            with _gaps(streams) as gaps:
                server.ask(asks)
            read.append(gaps)
            with _gaps(streams) as gaps:
                _unread(server, asks)
            unread.append(gaps)
            loop.fill(state, [ask.tokens for ask in asks], shared_tokens=sizes.context_tokens)
            done = loop.decode(sizes.tick_steps)
            bare.append(1000 * done.sampling_s / done.steps)
    return [
        Figure.of_runs(
            f"Python's share of a tick, {streams} streams",
            [statistics.median(gaps) for gaps in read],
            unit="ms",
            target=TARGET_MS,
        ),
        Figure.of_runs(
            "    mean of all ticks, saves included",
            [statistics.fmean(gaps) for gaps in read],
            unit="ms",
        ),
        Figure.of_runs(
            "    while nobody reads the streams",
            [statistics.median(gaps) for gaps in unread],
            unit="ms",
        ),
        Figure.of_runs("    native greedy sampling, in the bare loop", bare, unit="ms"),
    ]


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
def _gaps(streams: int) -> Iterator[list[float]]:
    """Milliseconds between steps of ``streams`` tokens; filled in at the end."""
    native: Callable[..., Any] = llama_cpp.llama_decode
    calls: list[tuple[int, float, float]] = []
    clock = time.perf_counter

    def decode(context: Any, batch: Any) -> Any:
        began = clock()
        status = native(context, batch)
        calls.append((batch.n_tokens, began, clock()))
        return status

    gaps: list[float] = []
    setattr(llama_cpp, "llama_decode", decode)  # noqa: B010 - mypy knows it as a function
    try:
        yield gaps
    finally:
        setattr(llama_cpp, "llama_decode", native)  # noqa: B010 - as above
    gaps += [
        1000 * (after[1] - before[2])
        for before, after in itertools.pairwise(calls)
        if before[0] == after[0] == streams
    ]

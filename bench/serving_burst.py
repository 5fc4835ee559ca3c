"""Requests that arrive together and begin alike: the prefix is computed once, or for each."""

from __future__ import annotations

import statistics
from pathlib import Path

from figure import Figure
from report import Section
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts, Reply, all_done_s
from serving_peer import LlamaServerPeer, PeerUnavailable
from serving_sizes import Sizes

TIMES_SOONER = 5.0


def measure(sizes: Sizes, path: Path, modes: tuple[bool, ...]) -> Section:
    """For each mode of cells, ours beside llama-server in the same one."""
    figures: list[Figure] = []
    notes: list[str] = []
    for unified in modes:
        figures += _measure(sizes, path, notes, unified=unified)
    return Section(
        name="burst",
        title="Requests that arrive together and begin alike",
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _measure(sizes: Sizes, path: Path, notes: list[str], *, unified: bool) -> list[Figure]:
    mode = "unified" if unified else "separate"
    n_ctx = sizes.context_tokens + sizes.tail_tokens + sizes.burst_reply_tokens + 1
    ours: list[list[Reply]] = []
    theirs: list[list[Reply]] = []
    absent = ""
    with ErllamaServer(path, unified=unified, n_ctx=n_ctx, n_seq=sizes.burst) as server:
        try:
            with LlamaServerPeer(path, unified=unified, n_ctx=n_ctx, n_seq=sizes.burst) as peer:
                for run in range(sizes.burst_runs):
                    asks = _asks(sizes, server.prompts, run)
                    ours.append(server.ask(asks))
                    theirs.append(peer.ask(asks))
        except PeerUnavailable as error:
            absent = str(error)
            ours = [server.ask(_asks(sizes, server.prompts, n)) for n in range(sizes.burst_runs)]
    figures = [_times(f"{mode}: {sizes.burst} requests with one prefix, all done", ours)]
    if absent:
        notes.append(f"llama-server was not measured: {absent}")
        return figures
    ratios = [all_done_s(b) / all_done_s(a) for a, b in zip(ours, theirs, strict=True)]
    return [
        *figures,
        _times("    llama-server", theirs),
        Figure.of_runs(
            "    sooner by",
            ratios,
            unit="times",
            target=TIMES_SOONER,
            bound="at least",
            digits=2,
        ),
        Figure.of_runs("    first tokens, median", _first_tokens(ours), unit="s"),
        Figure.of_runs("    first tokens of llama-server, median", _first_tokens(theirs), unit="s"),
    ]


def _asks(sizes: Sizes, prompts: Prompts, run: int) -> list[Ask]:
    prefix = prompts.ledger(run, sizes.context_tokens)
    return [
        Ask(
            tokens=prefix + prompts.tail(number, sizes.tail_tokens),
            reply_tokens=sizes.burst_reply_tokens,
        )
        for number in range(sizes.burst)
    ]


def _times(name: str, runs: list[list[Reply]]) -> Figure:
    return Figure.of_runs(name, [all_done_s(run) for run in runs], unit="s")


def _first_tokens(runs: list[list[Reply]]) -> list[float]:
    return [statistics.median(reply.first_token_s for reply in run) for run in runs]

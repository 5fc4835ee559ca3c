"""How many tokens a second all streams get together, beside a bare loop and llama-server."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from figure import Figure
from report import Section
from series import Axis, Plot, Series
from serving_bare import BareLoopProcess
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts, tokens_per_s
from serving_peer import LlamaServerPeer, PeerUnavailable
from serving_sizes import Sizes

TARGET = 0.97
_WARM_UP_STEPS = 4


@attrs.frozen
class Case:
    """How many streams there are, and how their contexts lie in the cells."""

    unified: bool
    shared: bool
    streams: int


Rates = dict[Case, list[float]]
"""Tokens per second of all streams, in the order of the rounds."""


class _Contexts:
    """The streams' contexts."""

    def __init__(self, sizes: Sizes, prompts: Prompts) -> None:
        whole = sizes.context_tokens + sizes.tail_tokens
        most = max(sizes.streams)
        self.own = [prompts.ledger(number, whole) for number in range(most)]
        prefix = self.own[0][: sizes.context_tokens]
        self.shared = [prefix + prompts.tail(number, sizes.tail_tokens) for number in range(most)]

    def of(self, case: Case) -> Sequence[tuple[int, ...]]:
        return (self.shared if case.shared else self.own)[: case.streams]


def measure(sizes: Sizes, path: Path, modes: tuple[bool, ...]) -> Section:
    """Rounds in which everybody takes a turn at each case."""
    ours: Rates = {}
    bare: Rates = {}
    peer: Rates = {}
    absent = ""
    for unified in modes:
        absent = _measure(sizes, path, unified, (ours, bare, peer)) or absent
    cases = sorted(ours, key=lambda case: (not case.unified, not case.shared, case.streams))
    figures = _against_bare(cases, ours, bare)
    if not absent:
        figures += _against_peer(sizes, modes, ours, peer)
    return Section(
        name="decode",
        title="Throughput of streams that run together",
        figures=tuple(figures),
        plots=tuple(_plot(shared, ours, bare, peer) for shared in (True, False)),
        notes=(f"llama-server was not measured: {absent}",) if absent else (),
    )


def _measure(sizes: Sizes, path: Path, unified: bool, rates: tuple[Rates, Rates, Rates]) -> str:
    """Add the rates of all cases with such cells: ours, a bare loop's, llama-server's.

    One model is loaded at a time, as in a service; see ``serving_bare``. Why there is no
    llama-server, if there is none.
    """
    n_ctx = sizes.context_tokens + sizes.tail_tokens + sizes.decode_steps + _WARM_UP_STEPS + 1
    shape: Any = {"unified": unified, "n_ctx": n_ctx, "n_seq": max(sizes.streams)}
    absent = ""
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(ErllamaServer(path, **shape))
        loop = stack.enter_context(BareLoopProcess(path, **shape))
        contexts = _Contexts(sizes, engine.prompts)
        cases = [Case(unified, shared, n) for shared in (True, False) for n in sizes.streams]
        for case in cases:
            if case.streams == max(sizes.streams):  # computed before anything is measured
                engine.ask(_asks(contexts, case, 2))
        turns: list[tuple[Rates, Callable[[Case], float]]] = [
            (rates[0], lambda case: _ours(engine, contexts, case, sizes)),
            (rates[1], lambda case: _bare(loop, contexts, case, sizes)),
        ]
        try:
            server = stack.enter_context(LlamaServerPeer(path, keeps_idle_slots=True, **shape))
        except PeerUnavailable as error:
            absent = str(error)
        else:
            server.ask([Ask(tokens=contexts.own[0], reply_tokens=1, slot=0)])
            turns.append((rates[2], lambda case: _peer(server, contexts, case, sizes)))
        for number in range(sizes.decode_rounds):
            # A round begins with another case and another contestant than the one before; those
            # who are compared follow each other within seconds, as the machine is never even.
            for case in cases if number % 2 else reversed(cases):
                first = number % len(turns)
                for found, measured in turns[first:] + turns[:first]:
                    # llama-server's sequences share no cells, whatever they begin with.
                    if found is not rates[2] or not case.shared:
                        found.setdefault(case, []).append(measured(case))
    return absent


def _asks(contexts: _Contexts, case: Case, reply_tokens: int) -> list[Ask]:
    return [Ask(tokens=tokens, reply_tokens=reply_tokens) for tokens in contexts.of(case)]


def _ours(server: ErllamaServer, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    steps = _WARM_UP_STEPS + sizes.decode_steps
    return tokens_per_s(server.ask(_asks(contexts, case, steps)))


def _peer(server: LlamaServerPeer, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    server.spread_slot(case.streams)
    steps = _WARM_UP_STEPS + sizes.decode_steps
    asks = [
        Ask(tokens=contexts.own[0], reply_tokens=steps, slot=slot) for slot in range(case.streams)
    ]
    return tokens_per_s(server.ask(asks))


def _bare(loop: BareLoopProcess, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    loop.fill(contexts.of(case), shared_tokens=sizes.context_tokens if case.shared else 0)
    loop.decode(_WARM_UP_STEPS)
    done = loop.decode(sizes.decode_steps)
    return case.streams * done.steps / done.seconds


def _against_bare(cases: Sequence[Case], ours: Rates, bare: Rates) -> list[Figure]:
    figures = []
    for case in cases:
        figures += _compared(f"{_words(case)}: of the bare loop", ours[case], bare[case])
    return figures


def _against_peer(sizes: Sizes, modes: tuple[bool, ...], ours: Rates, peer: Rates) -> list[Figure]:
    figures = []
    for shared in (True, False):
        for streams in sizes.streams:
            theirs = {u: peer[Case(u, False, streams)] for u in modes}
            better = max(modes, key=lambda u: statistics.median(theirs[u]))
            for unified in modes:
                case = Case(unified, shared, streams)
                name = f"{_words(case)}: of llama-server, {_cells(better)}"
                figures += _compared(name, ours[case], theirs[better])
    return figures


def _compared(name: str, ours: list[float], theirs: list[float]) -> list[Figure]:
    """The ratio of each round, and the rate that it is a part of."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return [
        Figure.of_runs(name, ratios, target=TARGET, bound="at least"),
        Figure.of_runs("    which makes", theirs, unit="tokens/s", digits=1),
    ]


def _plot(shared: bool, ours: Rates, bare: Rates, peer: Rates) -> Plot:
    """Each rate that was measured for such contexts; llama-server has its own in both."""
    curves = []
    for who, rates, theirs in (
        ("erllama", ours, shared),
        ("bare loop", bare, shared),
        ("llama-server", peer, False),
    ):
        for unified in (True, False):
            runs = [
                (case.streams, values)
                for case, values in rates.items()
                if (case.unified, case.shared) == (unified, theirs)
            ]
            if runs:
                curves.append(Series.of_runs(f"{who}, {_cells(unified)}", runs))
    return Plot(
        name=f"throughput_against_streams_{'shared' if shared else 'own'}",
        title=f"Throughput, {_contexts(shared)}",
        x=Axis("streams"),
        y=Axis("of all streams", "tokens/s"),
        series=tuple(curves),
    )


def _words(case: Case) -> str:
    return f"{_cells(case.unified)}, {_contexts(case.shared)}, {case.streams} streams"


def _cells(unified: bool) -> str:
    return "unified" if unified else "separate"


def _contexts(shared: bool) -> str:
    return "shared prefix" if shared else "own contexts"

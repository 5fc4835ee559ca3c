"""How many tokens a second all streams get together, beside a bare loop and llama-server."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from bare_loop import BareLoop
from figure import Figure
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
    """The streams' contexts, and a bare loop's state of the first."""

    def __init__(self, sizes: Sizes, prompts: Prompts) -> None:
        whole = sizes.context_tokens + sizes.tail_tokens
        most = max(sizes.streams)
        self.own = [prompts.ledger(number, whole) for number in range(most)]
        prefix = self.own[0][: sizes.context_tokens]
        self.shared = [prefix + prompts.tail(number, sizes.tail_tokens) for number in range(most)]
        self.states: dict[tuple[bool, bool], Any] = {}

    def of(self, case: Case) -> Sequence[tuple[int, ...]]:
        return (self.shared if case.shared else self.own)[: case.streams]


def measure(sizes: Sizes, path: Path, modes: tuple[bool, ...]) -> list[Figure]:
    """Rounds in which everybody takes a turn at each case."""
    n_ctx = sizes.context_tokens + sizes.tail_tokens + sizes.decode_steps + _WARM_UP_STEPS + 1
    shape: Any = {"n_ctx": n_ctx, "n_seq": max(sizes.streams)}
    ours: Rates = {}
    bare: Rates = {}
    peer: Rates = {}
    absent = ""
    with contextlib.ExitStack() as stack:
        engines = {
            unified: stack.enter_context(ErllamaServer(path, unified=unified, **shape))
            for unified in modes
        }
        contexts = _Contexts(sizes, engines[modes[0]].prompts)
        cases = [Case(u, s, n) for u in modes for s in (True, False) for n in sizes.streams]
        peers = {}
        try:
            for unified in modes:
                peers[unified] = stack.enter_context(
                    LlamaServerPeer(path, unified=unified, **shape)
                )
        except PeerUnavailable as error:
            absent = str(error)
        for case in cases:
            if case.streams == max(sizes.streams):  # computed before anything is measured
                engines[case.unified].ask(_asks(contexts, case, 2))
        for server in peers.values():
            server.ask([Ask(tokens=contexts.own[0], reply_tokens=1, slot=0)])
        for number in range(sizes.decode_rounds):
            # In one order and in the other, so that nobody is always the first.
            for case in cases if number % 2 else reversed(cases):
                _note(ours, case, _ours(engines[case.unified], contexts, case, sizes))
                if case.unified in peers and not case.shared:
                    _note(peer, case, _peer(peers[case.unified], contexts, case, sizes))
            for unified in modes:
                with BareLoop(path, unified=unified, **shape) as loop:
                    for case in cases:
                        if case.unified == unified:
                            _note(bare, case, _bare(loop, contexts, case, sizes))
    figures = [_against_bare(case, ours, bare) for case in cases]
    if absent:
        return [*figures, Figure(name=f"    llama-server was not measured: {absent}", measured=0)]
    return figures + _against_peer(sizes, modes, ours, peer)


def _note(rates: Rates, case: Case, rate: float) -> None:
    rates.setdefault(case, []).append(rate)


def _asks(contexts: _Contexts, case: Case, reply_tokens: int) -> list[Ask]:
    return [Ask(tokens=tokens, reply_tokens=reply_tokens) for tokens in contexts.of(case)]


def _ours(server: ErllamaServer, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    steps = _WARM_UP_STEPS + sizes.decode_steps
    return tokens_per_s(server.ask(_asks(contexts, case, steps)))


def _peer(server: LlamaServerPeer, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    """Sequences of llama-server share no cells, whatever they begin with."""
    server.spread_slot(case.streams)
    steps = _WARM_UP_STEPS + sizes.decode_steps
    asks = [
        Ask(tokens=contexts.own[0], reply_tokens=steps, slot=slot) for slot in range(case.streams)
    ]
    return tokens_per_s(server.ask(asks))


def _bare(loop: BareLoop, contexts: _Contexts, case: Case, sizes: Sizes) -> float:
    streams = contexts.of(case)
    kind = (case.unified, case.shared)
    if kind not in contexts.states:
        contexts.states[kind] = loop.compute(streams[0])
    loop.fill(
        contexts.states[kind], streams, shared_tokens=sizes.context_tokens if case.shared else 0
    )
    loop.decode(_WARM_UP_STEPS)
    done = loop.decode(sizes.decode_steps)
    return case.streams * done.steps / done.seconds


def _against_bare(case: Case, ours: Rates, bare: Rates) -> Figure:
    rate = statistics.median(bare[case])
    return Figure.of_runs(
        f"{_words(case)}: of the bare loop's {rate:.1f} tokens/s",
        [a / b for a, b in zip(ours[case], bare[case], strict=True)],
        target=TARGET,
        bound="at least",
    )


def _against_peer(sizes: Sizes, modes: tuple[bool, ...], ours: Rates, peer: Rates) -> list[Figure]:
    figures = []
    for shared in (True, False):
        for streams in sizes.streams:
            theirs = {u: peer[Case(u, False, streams)] for u in modes}
            better = max(modes, key=lambda u: statistics.median(theirs[u]))
            mode = "unified" if better else "separate"
            rate = statistics.median(theirs[better])
            for unified in modes:
                case = Case(unified, shared, streams)
                figures.append(
                    Figure.of_runs(
                        f"{_words(case)}: of llama-server's {rate:.1f} tokens/s, {mode}",
                        [a / b for a, b in zip(ours[case], theirs[better], strict=True)],
                        target=TARGET,
                        bound="at least",
                    )
                )
    return figures


def _words(case: Case) -> str:
    cells = "unified" if case.unified else "separate"
    contexts = "shared prefix" if case.shared else "own contexts"
    return f"{cells}, {contexts}, {case.streams} streams"

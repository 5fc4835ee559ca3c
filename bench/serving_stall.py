"""How long replies halt while a long prompt is computed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from figure import Figure
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts, Reply, Server
from serving_peer import LlamaServerPeer, PeerUnavailable
from serving_sizes import Sizes

from erllama_core.cache.policy import SavePolicy

_ALONE_S = 1.0
"""How long the streams run before the long prompt comes."""
_AT_LEAST_TOKENS = 16
"""Of the long prompt in a step with replies: the scheduler's least."""


def measure(sizes: Sizes, path: Path) -> list[Figure]:
    """Longest gaps, with the default settings of the scheduler."""
    reply_tokens = 150 + sizes.stalling_tokens // _AT_LEAST_TOKENS
    n_seq = sizes.stalled_streams + 1
    room = sizes.stalled_streams * (sizes.stalled_tokens + reply_tokens) + sizes.stalling_tokens
    shape = {"n_ctx": -(-room // n_seq) + 64, "n_seq": n_seq}
    ours: list[_Run] = []
    theirs: list[_Run] = []
    absent = ""
    with ErllamaServer(path, unified=True, **shape) as server:
        _run(server, server.prompts, sizes, reply_tokens, -1)  # its rates are measured here
        try:
            with LlamaServerPeer(path, unified=True, **shape) as peer:
                for number in range(sizes.stall_runs):
                    ours.append(_run(server, server.prompts, sizes, reply_tokens, number))
                    theirs.append(_run(peer, server.prompts, sizes, reply_tokens, number))
        except PeerUnavailable as error:
            absent = str(error)
            ours = [
                _run(server, server.prompts, sizes, reply_tokens, number)
                for number in range(sizes.stall_runs)
            ]
    target_s = SavePolicy().stall_target_ms / 1000
    tick_s = statistics.median(run.tick_s for run in ours)
    figures = [
        Figure.of_runs(
            f"{sizes.stalled_streams} streams, a prompt of {sizes.stalling_tokens}: longest gap",
            [1000 * run.longest_s for run in ours],
            unit="ms",
            target=1000 * (target_s + 2 * tick_s),
            digits=1,
        ),
        Figure.of_runs(
            "    a tick of the streams alone",
            [1000 * run.tick_s for run in ours],
            unit="ms",
            digits=1,
        ),
        Figure.of_runs("    the prompt's first token", [run.prompt_s for run in ours], unit="s"),
    ]
    if absent:
        return [*figures, Figure(name=f"    llama-server was not measured: {absent}", measured=0)]
    return [
        *figures,
        Figure.of_runs(
            "    llama-server: longest gap",
            [1000 * run.longest_s for run in theirs],
            unit="ms",
            digits=1,
        ),
        Figure.of_runs(
            "    llama-server: the prompt's first token", [r.prompt_s for r in theirs], unit="s"
        ),
    ]


class _Run:
    """What one run shows: the streams' replies, then the long prompt's."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        *streams, long = replies
        arrived, computed = long.asked_at, long.token_times[0]
        if min(reply.token_times[-1] for reply in streams) < computed:
            raise RuntimeError("the streams ended before the long prompt was computed")
        pairs = [pair for s in streams for pair in itertools.pairwise(s.token_times)]
        self.prompt_s = computed - arrived
        self.longest_s = max(b - a for a, b in pairs if b > arrived and a < computed)
        self.tick_s = statistics.median(b - a for a, b in pairs if b < arrived or a > computed)


def _run(server: Server, prompts: Prompts, sizes: Sizes, reply_tokens: int, number: int) -> _Run:
    first = 10 + number * (sizes.stalled_streams + 1)
    asks = [
        Ask(tokens=prompts.ledger(first + n, sizes.stalled_tokens), reply_tokens=reply_tokens)
        for n in range(sizes.stalled_streams)
    ]
    long = prompts.ledger(first + sizes.stalled_streams, sizes.stalling_tokens)
    return _Run(server.ask([*asks, Ask(tokens=long, reply_tokens=1, after_s=_ALONE_S)]))

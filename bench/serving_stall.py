"""How long replies halt while a long prompt is computed."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figure import Figure
from report import Section
from serving_engine import ErllamaServer
from serving_load import Ask, Prompts, Reply, Server
from serving_peer import LlamaServerPeer, PeerUnavailable
from serving_sizes import Sizes

from erllama_core.cache.policy import SavePolicy

_ALONE_S = 1.0
"""How long the streams run before the long prompt comes."""
_AT_LEAST_TOKENS = 4
"""Of the long prompt in a step with replies: the scheduler's least."""
_WARM_UP_TOKENS = 600


def measure(sizes: Sizes, path: Path) -> Section:
    """Longest gaps, with the default settings of the scheduler."""
    reply_tokens = _reply_tokens(sizes.stalling_tokens)
    n_seq = sizes.stalled_streams + 1
    room = sizes.stalled_streams * (sizes.stalled_tokens + reply_tokens) + sizes.stalling_tokens
    shape: Any = {"n_ctx": -(-room // n_seq) + 64, "n_seq": n_seq}
    ours: list[_Run] = []
    theirs: list[_Run] = []
    absent = ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ErllamaServer(path, unified=True, **shape))
        prompts = server.prompts
        # Its rates are measured here, for which a short prompt is enough.
        _run(server, prompts, sizes, -1, min(_WARM_UP_TOKENS, sizes.stalling_tokens))
        peer = None
        try:
            peer = stack.enter_context(LlamaServerPeer(path, unified=True, **shape))
        except PeerUnavailable as error:
            absent = str(error)
        for number in range(sizes.stall_runs):
            ours.append(_run(server, prompts, sizes, number, sizes.stalling_tokens))
            if peer is not None:
                theirs.append(_run(peer, prompts, sizes, number, sizes.stalling_tokens))
    return Section(
        name="stall",
        title="Streams while a long prompt is computed",
        figures=(*_figures(sizes, ours), *(_peer_figures(theirs) if theirs else ())),
        notes=(f"llama-server was not measured: {absent}",) if absent else (),
    )


def _figures(sizes: Sizes, ours: list[_Run]) -> list[Figure]:
    target_s = SavePolicy().stall_target_ms / 1000
    tick_s = statistics.median(run.tick_s for run in ours)
    return [
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


def _peer_figures(theirs: list[_Run]) -> list[Figure]:
    return [
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


def _reply_tokens(prompt_tokens: int) -> int:
    """What streams may have to say so as not to end before the prompt is computed."""
    return 150 + prompt_tokens // _AT_LEAST_TOKENS


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


def _run(server: Server, prompts: Prompts, sizes: Sizes, number: int, prompt_tokens: int) -> _Run:
    first = 10 + number * (sizes.stalled_streams + 1)
    reply_tokens = _reply_tokens(prompt_tokens)
    asks = [
        Ask(
            tokens=prompts.ledger(first + n, sizes.stalled_tokens),
            reply_tokens=reply_tokens,
            lasts=True,
        )
        for n in range(sizes.stalled_streams)
    ]
    long = prompts.ledger(first + sizes.stalled_streams, prompt_tokens)
    return _Run(server.ask([*asks, Ask(tokens=long, reply_tokens=1, after_s=_ALONE_S)]))

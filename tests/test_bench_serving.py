"""What the benchmark of serving makes of the times at which tokens came."""

from __future__ import annotations

import itertools
import threading

import pytest
from serving_load import Ask, Enough, Prompts, Reply, all_done_s, run_at_once, tokens_per_s


def reply(*times: float, asked_at: float = 0.0) -> Reply:
    return Reply(asked_at=asked_at, token_times=times)


def test_throughput_counts_only_while_all_streams_run() -> None:
    """Tokens before the last stream has begun, or after the first has ended, do not count."""
    together = [reply(1.0, 2.0, 3.0, 4.0), reply(2.0, 3.0, 4.0, 5.0, 6.0)]
    assert tokens_per_s(together) == pytest.approx(2.0)
    # In step, one a moment after the other: each has its token in every second.
    after = [reply(1.1, 2.1, 3.1), reply(1.0, 2.0, 3.0)]
    assert tokens_per_s(after) == pytest.approx(2.0)
    with pytest.raises(RuntimeError, match="did not run together"):
        tokens_per_s([reply(1.0, 2.0), reply(3.0, 4.0)])


def test_all_are_done_when_the_last_one_is() -> None:
    """A burst lasts from its first request to its last token."""
    assert all_done_s([reply(2.0, 3.0, asked_at=1.0), reply(4.0, 9.0, asked_at=1.5)]) == 8.0


def test_requests_run_together_and_an_incomplete_reply_is_an_error() -> None:
    """Each request has a thread of its own; a reply of another length is not measured."""
    together = threading.Barrier(2, timeout=10)

    def answer(ask: Ask, _: Enough) -> list[float]:
        together.wait()
        return [float(token) for token in ask.tokens]

    asks = [Ask(tokens=(1, 2), reply_tokens=2), Ask(tokens=(3, 4), reply_tokens=2)]
    assert [r.token_times for r in run_at_once(asks, answer)] == [(1.0, 2.0), (3.0, 4.0)]
    with pytest.raises(RuntimeError, match="3 tokens were asked for, 2 came"):
        run_at_once([asks[0], Ask(tokens=(3, 4), reply_tokens=3)], answer)


def test_streams_that_last_end_with_the_request_that_they_are_measured_for() -> None:
    """They are not held to a length, and go on no longer than until it is answered."""
    runs = threading.Event()

    def answer(ask: Ask, enough: Enough) -> list[float]:
        if not ask.lasts:
            assert runs.wait(10)
            return [0.0]
        times = []
        for number in itertools.count():
            times.append(float(number))
            runs.set()
            if enough():
                return times
        raise AssertionError

    asks = [Ask(tokens=(1,), reply_tokens=10, lasts=True), Ask(tokens=(2,), reply_tokens=1)]
    lasting, short = run_at_once(asks, answer)
    assert lasting.token_times
    assert short.token_times == (0.0,)


def test_prompts_have_exact_lengths_and_differ_from_the_start() -> None:
    """Prompts of other numbers share nothing, and a text that is too short is an error."""
    prompts = Prompts(lambda text: list(text.encode()))
    first, second = prompts.ledger(0, 100), prompts.ledger(1, 100)
    assert len(first) == len(second) == 100
    assert first[0] != second[0]
    assert len(prompts.tail(3, 12)) == 12
    with pytest.raises(RuntimeError, match="has only"):
        Prompts(lambda _: [1]).ledger(0, 2)

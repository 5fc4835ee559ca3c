"""Logits, marks and samplers."""

from __future__ import annotations

import math
import struct
from collections import Counter

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_backend_stub import StubSampler
from erllama_backend_stub.arithmetic import exp, logsumexp
from erllama_backend_stub.logits import LogitRow
from erllama_backend_stub.vocabulary import IM_END, N_TOKENS
from erllama_core.interfaces.backend import PENALTY_WINDOW, Mark, SamplingParams

PRINTABLE = range(0x20, 0x7F)

digests = st.binary(min_size=32, max_size=32)
all_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0, 1000.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 265, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.1, 2.0]),
    seed=st.integers(-(2**40), 2**70),
)


def pack(tokens: list[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def new_row(digest: bytes, forced: int | None = None, eog_rate: float = 0.0) -> LogitRow:
    return LogitRow(digest, forced, eog_rate)


def tokens_of(mark: Mark) -> list[int]:
    return list(struct.unpack(f"<{mark.size}I", mark.tokens))


def logits_of(mark: Mark) -> list[float]:
    return list(struct.unpack(f"<{mark.size}f", mark.logits))


@given(digest=digests)
def test_a_whole_mark_is_the_row(digest: bytes) -> None:
    """It has every token once, largest logit first, ties by id, bit for bit."""
    values = new_row(digest).values
    mark = new_row(digest).mark(None)
    assert mark.is_whole
    assert dict(zip(tokens_of(mark), logits_of(mark), strict=True)) == dict(enumerate(values))
    order = [(-logit, token) for token, logit in zip(tokens_of(mark), logits_of(mark), strict=True)]
    assert order == sorted(order)
    top = max(values)
    total = math.fsum(math.exp(value - top) for value in values)
    assert mark.logsumexp == pytest.approx(top + math.log(total), rel=1e-14)


@given(digest=digests, size=st.integers(1, 300))
def test_a_small_mark_is_the_head_of_the_whole(digest: bytes, size: int) -> None:
    """Fewer logits, the same logsumexp."""
    whole, head = new_row(digest).mark(None), new_row(digest).mark(size)
    assert tokens_of(head) == tokens_of(whole)[:size]
    assert head.logits == whole.logits[: 4 * size]
    assert head.logsumexp == whole.logsumexp
    assert head.is_whole == (size >= N_TOKENS)


@settings(max_examples=300)
@given(
    stream=st.lists(digests, min_size=1, max_size=4),
    params=all_params,
    history=st.lists(st.integers(0, N_TOKENS - 1), max_size=100),
    size=st.one_of(st.none(), st.integers(1, N_TOKENS)),
)
def test_marks_draw_what_rows_draw(
    stream: list[bytes], params: SamplingParams, history: list[int], size: int | None
) -> None:
    """A sampler fed marks that serve it draws the same tokens as one fed rows."""
    by_row = StubSampler(params, pack(history))
    by_mark = StubSampler(params, memoryview(pack(history)))
    for digest in stream:
        mark = new_row(digest).mark(size)
        if not mark.serves(params):
            with pytest.raises(ValueError, match="cannot serve"):
                by_mark.sample_mark(mark)
            return
        assert by_row.sample_row(new_row(digest)) == by_mark.sample_mark(mark)


@given(digest=digests, params=all_params)
def test_what_is_drawn_is_among_the_candidates(digest: bytes, params: SamplingParams) -> None:
    """top_k, top_p and min_p keep what they say, the best token always."""
    params = SamplingParams(
        temperature=1.0, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    )
    row = new_row(digest)
    sampler = StubSampler(params, b"")
    drawn = {sampler.sample_row(row) for _ in range(20)}
    ranked = tokens_of(row.mark(params.top_k or None))
    values = [row.values[token] for token in ranked]
    weights = [math.exp(value - values[0]) for value in values]
    allowed: set[int] = set()
    reached = 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if allowed and (reached >= params.top_p * sum(weights) or weight < params.min_p):
            break
        allowed.add(token)
        reached += weight
    assert drawn <= allowed


def test_equal_logits_go_by_id() -> None:
    """Among equally likely tokens the order is that of ids, however they are listed."""
    logits = struct.pack("<3f", 1, 1, 1)
    mark = Mark(tokens=pack([9, 3, 5]), logits=logits, logsumexp=0, n_vocab=N_TOKENS)
    assert StubSampler(SamplingParams(), b"").sample_mark(mark) == 3
    two = SamplingParams(temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)
    sampler = StubSampler(two, b"")
    assert {sampler.sample_mark(mark) for _ in range(50)} == {3, 5}


def test_draws_follow_the_probabilities() -> None:
    """With all restrictions off, tokens come as often as their logits say."""
    row = new_row(b"\1" * 32)
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    sampler = StubSampler(params, b"")
    n = 3000
    found = Counter(sampler.sample_row(row) for _ in range(n))
    total = logsumexp(row.values)
    for token in PRINTABLE:
        expected = n * math.exp(row.values[token] - total)
        assert abs(found[token] - expected) < 6 * math.sqrt(expected) + 6


def test_the_seed_decides() -> None:
    """Equal seeds draw equal tokens, another seed others."""
    rows = [new_row(bytes([n]) * 32) for n in range(40)]

    def draw(seed: int) -> list[int]:
        sampler = StubSampler(SamplingParams(temperature=1.0, seed=seed), b"")
        return [sampler.sample_row(row) for row in rows]

    assert draw(1) == draw(1) != draw(2)


def test_greedy_ignores_what_only_draws_look_at() -> None:
    """At temperature 0 the best token is chosen, whatever else is set."""
    row = new_row(b"\2" * 32)
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=9)
    assert row.values[StubSampler(params, b"").sample_row(row)] == max(row.values)


def test_a_strong_penalty_forbids_repetition_within_its_window() -> None:
    """Tokens of the history and of the reply are avoided while they are in the window."""
    history = list(range(0x20, 0x20 + PENALTY_WINDOW))
    sampler = StubSampler(SamplingParams(repetition_penalty=1e9), pack([0x7E] * 50 + history))
    said = list(history)
    for n in range(200):
        token = sampler.sample_row(new_row(struct.pack("<Q", n)))
        assert token not in said[-PENALTY_WINDOW:]
        said.append(token)
    # What left the window comes back: 95 printable tokens cannot last for 200.
    assert len(set(said)) < len(said)


@given(digest=digests)
def test_replies_are_printable_and_do_not_end(digest: bytes) -> None:
    """By default no draw at an ordinary temperature leaves printable ASCII."""
    row = new_row(digest)
    greedy = StubSampler(SamplingParams(), b"").sample_row(row)
    params = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    assert {greedy, StubSampler(params, b"").sample_row(row)} <= set(PRINTABLE)


def test_replies_end_as_often_as_asked_for() -> None:
    """eog_rate is the share of positions at which the end comes next, greedy or not."""
    ends = 0
    for n in range(2000):
        row = new_row(struct.pack("<Q", n), eog_rate=0.25)
        tokens = {
            StubSampler(SamplingParams(temperature=t), b"").sample_row(row) for t in (0.0, 1.0)
        }
        assert (tokens == {IM_END}) == (IM_END in tokens)
        ends += IM_END in tokens
    assert 400 < ends < 600
    always = new_row(b"\3" * 32, eog_rate=1.0)
    assert StubSampler(SamplingParams(), b"").sample_row(always) == IM_END


@given(digest=digests, forced=st.integers(0, N_TOKENS - 1))
def test_forced_tokens_come(digest: bytes, forced: int) -> None:
    """A token that must come does, greedy or drawn, penalised or not."""
    row = new_row(digest, forced, eog_rate=1.0)
    for params in (
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0),
    ):
        assert StubSampler(params, pack([forced])).sample_row(row) == forced


@given(x=st.floats(-708.0, 700.0))
def test_exp_is_the_exponential(x: float) -> None:
    """It agrees with the C library's to about the last bit."""
    assert exp(x) == pytest.approx(math.exp(x), rel=1e-15)


def test_exp_of_very_little_is_zero() -> None:
    """Below the range of normal numbers nothing is left."""
    assert exp(-708.5) == 0.0
    assert exp(-math.inf) == 0.0


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_single_tokens_may_be_greedy(penalty: float) -> None:
    """A greedy draw is the largest logit after penalties, and uses up no number of the seed."""
    params = SamplingParams(temperature=2.0, top_k=0, seed=5, repetition_penalty=penalty)
    mixed, history = StubSampler(params, b""), b""
    plain = StubSampler(params, b"")
    for turn in range(30):
        row = new_row(bytes([turn]) * 32)
        reference = plain
        if turn % 3:
            reference = StubSampler(attrs.evolve(params, temperature=0.0), history)
        token = mixed.sample_row(row, greedy=bool(turn % 3))
        if turn % 3 or penalty == 1.0:
            assert token == reference.sample_mark(row.mark(None))
        history += struct.pack("<I", token)

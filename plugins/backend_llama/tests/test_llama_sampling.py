"""Samplers and marks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from llama_cpp import llama_cpp

from erllama_backend_llama import candidates
from erllama_backend_llama.logits import largest, make_mark
from erllama_core.errors import EngineClosed
from erllama_core.interfaces.backend import PENALTY_WINDOW, Mark, Row, SamplingParams

Bench = Callable[..., Any]
TOKENS = [(11 * index + 3) % 256 for index in range(100)]

PARAMS = {
    "greedy": SamplingParams(),
    "greedy, penalties": SamplingParams(repetition_penalty=1.3),
    "usual": SamplingParams(temperature=0.8, seed=3),
    "hot": SamplingParams(temperature=3.0, top_k=100, top_p=1.0, min_p=0.0, seed=4),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=5),
    "no cut at all": SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=6),
    "largest seed": SamplingParams(temperature=1.0, seed=2**32 - 1),
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("size", [200, None])
def test_a_mark_draws_what_the_row_draws(bench: Bench, name: str, size: int | None) -> None:
    """50 draws from a stored mark are the 50 draws from the live logits, seed by seed."""
    params = PARAMS[name]
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, size)
    if name == "no cut at all" and size is not None:
        assert not mark.serves(params)
        return
    history = b.pack(TOKENS)
    live = b.model.new_sampler(params, history)
    stored = b.model.new_sampler(params, history)
    drawn = [b.context.sample(0, live) for _ in range(50)]
    assert [stored.sample_mark(mark) for _ in range(50)] == drawn
    live.close()
    stored.close()


def test_seeds_repeat_and_differ(bench: Bench) -> None:
    """A seed draws the same tokens every time, another seed others."""
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, None)

    def draws(seed: int) -> list[int]:
        params = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        sampler = b.model.new_sampler(params, b"")
        tokens = [sampler.sample_mark(mark) for _ in range(20)]
        sampler.close()
        return tokens

    assert draws(2**32 - 1) == draws(2**32 - 1)
    assert draws(1) == draws(1) != draws(2)


def test_penalties_look_back_over_the_window_only(bench: Bench) -> None:
    """The last PENALTY_WINDOW tokens of the history count, what lies before does not."""
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, None)
    best = int(np.frombuffer(mark.tokens, "<u4")[0])
    other = (best + 1) % 256
    params = SamplingParams(repetition_penalty=50.0)

    def greedy(history: list[int]) -> int:
        sampler = b.model.new_sampler(params, memoryview(b.pack(history)))
        token: int = sampler.sample_mark(mark)
        sampler.close()
        return token

    assert greedy([]) == best
    assert greedy([best] + [other] * PENALTY_WINDOW) == best
    assert greedy([best] + [other] * (PENALTY_WINDOW - 1)) != best


def test_greedy_takes_the_largest_logit(bench: Bench) -> None:
    """Without a temperature the draw is the arg-max."""
    b = bench("llama")
    row = b.feed(0, TOKENS)
    sampler = b.model.new_sampler(SamplingParams(), b"")
    assert b.context.sample(0, sampler) == int(row.argmax())
    sampler.close()


@pytest.mark.parametrize("unified", [True, False])
def test_greedy_draws_are_those_of_the_native_sampler(bench: Bench, unified: bool) -> None:
    """Rows in any order, of one token or several: each greedy draw is llama.cpp's own."""
    b = bench("llama", n_seq_max=4, kv_unified=unified)
    sampler = b.model.new_sampler(SamplingParams(), b"")
    swapped = b.model.new_sampler(PARAMS["usual"], b"")
    chain = sampler.chain_for(greedy=True)
    drawn = set()
    for step, order in enumerate(permutations(range(4))):
        rows = []
        for seq in order:
            count = 1 + 5 * (seq == step % 4) * (step % 2)
            part = TOKENS[(step + seq) % 90 :][:count]
            rows.append(Row(seq, b.lengths[seq], b.pack(part), logits=True))
            b.lengths[seq] += count
        b.context.step(rows)
        for row in range(4):
            index = sum(len(rows[n].tokens) // 4 for n in range(4) if rows[n].seq <= rows[row].seq)
            expected = llama_cpp.llama_sampler_sample(chain, b.context._context, index - 1)
            assert b.context.sample(row, sampler) == expected
            assert b.context.sample(row, swapped, greedy=True) == expected
            drawn.add(expected)
    assert len(drawn) > 4
    sampler.close()
    swapped.close()
    with pytest.raises(EngineClosed):
        b.context.sample(0, sampler)


def test_the_largest_of_equal_logits_is_the_first() -> None:
    """Of equal logits the lowest token is drawn; rows that are no numbers are told apart."""
    rows = np.zeros((6, 70), dtype=np.float32)
    rows[0, [9, 30, 69]] = 2.0
    rows[1] = 1.0
    rows[2, 40] = np.nan
    rows[3, 40] = np.inf
    rows[4] = -np.inf
    rows[5, 1:] = -np.inf
    assert largest(rows) == [9, 0, -1, -1, -1, 0]


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(-4, 4).map(float)),
    st.integers(1, 70),
)
def test_marks_hold_the_largest_in_a_fixed_order(row: Any, size: int) -> None:
    """A mark is the largest logits, descending, ties by id, with the whole row's logsumexp."""
    order = sorted(range(row.size), key=lambda token: (-row[token], token))[:size]
    mark = make_mark(row, size)
    assert [int(token) for token in np.frombuffer(mark.tokens, "<u4")] == order
    assert np.array_equal(np.frombuffer(mark.logits, "<f4"), row[order])
    expected = np.log(np.exp(row.astype(np.float64)).sum())
    assert mark.logsumexp == pytest.approx(expected, abs=1e-9)
    assert (mark.n_vocab, mark.is_whole) == (row.size, size >= row.size)


def test_a_mark_outlives_the_step(bench: Bench) -> None:
    """A mark is a copy: the next step does not change it."""
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, None)
    before = bytes(mark.logits)
    b.feed(0, [1])
    assert mark.logits == before


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=-1),
        SamplingParams(seed=2**32),
        SamplingParams(repetition_penalty=0.0),
        SamplingParams(repetition_penalty=float("nan")),
        SamplingParams(top_k=-1, temperature=1.0),
        SamplingParams(temperature=float("nan")),
        SamplingParams(temperature=1.0, top_p=1.5),
        SamplingParams(temperature=1.0, min_p=-0.1),
    ],
)
def test_meaningless_parameters_are_refused(bench: Bench, params: SamplingParams) -> None:
    """Parameters that llama.cpp would misread are a ValueError."""
    with pytest.raises(ValueError, match=r"seed|repetition_penalty|top_k|temperature|top_p|min_p"):
        bench("llama").model.new_sampler(params, b"")


def test_foreign_marks_and_histories_are_refused(bench: Bench) -> None:
    """A mark of another vocabulary, a malformed one, or unknown tokens are a ValueError."""
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, 10)
    sampler = b.model.new_sampler(SamplingParams(), b"")
    foreign = [
        attrs.evolve(mark, n_vocab=999),
        attrs.evolve(mark, tokens=b"", logits=b""),
        attrs.evolve(mark, logits=mark.logits[:-4]),
        attrs.evolve(mark, tokens=b"\xff" * 40),
    ]
    for wrong in foreign:
        with pytest.raises(ValueError, match="mark"):
            sampler.sample_mark(wrong)
    sampler.close()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        b.model.new_sampler(SamplingParams(repetition_penalty=1.1), b.pack([300]))
    with pytest.raises(ValueError, match="1 at least"):
        b.context.mark(0, 0)


def test_a_closed_sampler_is_freed_once(bench: Bench) -> None:
    """Closing twice is harmless, and a closed sampler draws nothing."""
    b = bench("llama")
    b.feed(0, TOKENS)
    sampler = b.model.new_sampler(SamplingParams(), b"")
    sampler.close()
    sampler.close()
    with pytest.raises(EngineClosed):
        sampler.sample_mark(b.context.mark(0, None))
    with pytest.raises(EngineClosed):
        b.context.sample(0, sampler)


def test_samplers_of_other_backends_are_refused(bench: Bench) -> None:
    """A context samples with its own backend's samplers only."""

    class Foreign:
        def sample_mark(self, mark: Mark) -> int:
            return 0

        def close(self) -> None:
            """Nothing to free."""

    b = bench("llama")
    b.feed(0, TOKENS)
    with pytest.raises(TypeError, match="new_sampler"):
        b.context.sample(0, Foreign())


@pytest.mark.real_model
@pytest.mark.parametrize("name", PARAMS)
def test_demo_marks_draw_what_the_row_draws(bench: Bench, demo_model_path: Path, name: str) -> None:
    """With a real vocabulary the 1,024 largest logits draw the same 50 tokens."""
    b = bench(demo_model_path)
    tokens = b.model.vocabulary.tokenize("The capital of", add_bos=False, parse_special=False)
    b.feed(0, [int(token) for token in np.frombuffer(tokens, "<u4")])
    params = PARAMS[name]
    mark = b.context.mark(0, 1024 if params.top_k else None)
    live, stored = (b.model.new_sampler(params, tokens) for _ in range(2))
    drawn = [b.context.sample(0, live) for _ in range(50)]
    assert [stored.sample_mark(mark) for _ in range(50)] == drawn


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("by_mark", [False, True])
def test_single_tokens_may_be_greedy(bench: Bench, name: str, by_mark: bool) -> None:
    """A greedy draw is what a greedy sampler with the same past draws, and uses up no number
    of the seed: the draws between are those of a sampler that never was greedy.
    """
    params = PARAMS[name]
    b = bench("llama")
    b.feed(0, TOKENS)
    mark = b.context.mark(0, None)
    history = list(TOKENS)
    mixed = b.model.new_sampler(params, b.pack(history))
    without_penalties = params.repetition_penalty == 1.0
    plain = b.model.new_sampler(params, b.pack(history))
    for turn in range(40):
        greedy = turn % 3 != 0
        reference = plain
        if greedy:
            reference = b.model.new_sampler(attrs.evolve(params, temperature=0.0), b.pack(history))
        if by_mark:
            token = mixed.sample_mark(mark, greedy=greedy)
        else:
            token = b.context.sample(0, mixed, greedy=greedy)
        if greedy or without_penalties:
            assert token == reference.sample_mark(mark)
        history.append(token)
    mixed.close()
    with pytest.raises(EngineClosed):
        b.context.sample(0, mixed, greedy=True)


def test_penalties_count_what_was_drawn_greedily(bench: Bench) -> None:
    """A sampler that was greedy for a while goes on as a new one with the same past."""
    params = SamplingParams(temperature=1.0, repetition_penalty=5.0, seed=7)
    b = bench("llama")
    b.feed(0, TOKENS)
    sampler = b.model.new_sampler(params, b"")
    drawn = [b.context.sample(0, sampler, greedy=True) for _ in range(8)]
    assert len(set(drawn)) > 4
    new = b.model.new_sampler(params, b.pack(drawn))
    after = [b.context.sample(0, sampler) for _ in range(10)]
    assert after == [b.context.sample(0, new) for _ in range(10)]


def test_a_mark_of_no_numbers_is_refused() -> None:
    """Logits that are no numbers never reach llama.cpp, which would sort by them."""
    tokens = np.array([1, 2], "<u4").tobytes()
    mark = Mark(tokens, np.array([1.0, np.nan], "<f4").tobytes(), 1.5, 4)
    with pytest.raises(ValueError, match="no numbers"):
        candidates.of_mark(mark, 4)

"""Steps: what they compute, and what they refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp

from erllama_backend_llama.context import DECODE_STATUS
from erllama_core.errors import DecodeAborted, DecodeFailed, EngineClosed, InvalidPrompt
from erllama_core.interfaces.backend import DeclaresCosts, KVClass, Row

Bench = Callable[..., Any]
TOKENS = [(11 * index + 3) % 256 for index in range(300)]


def test_rows_of_one_step_are_independent(bench: Bench) -> None:
    """Several sequences in one step get the logits that each gets alone."""
    together, alone = bench("llama", n_seq_max=3), bench("llama", n_seq_max=3)
    parts = [TOKENS[:40], TOKENS[40:41], TOKENS[50:130]]
    rows = [Row(seq, 0, together.pack(part), logits=seq != 1) for seq, part in enumerate(parts)]
    together.context.step(rows)
    for row in (0, 2):
        got = together.whole_row(together.context.mark(row, None))
        # Rounding depends on the shape of the batch; another row's logits are off by 1 and more.
        assert np.abs(got - alone.feed(row, parts[row])).max() < 0.03
    with pytest.raises(ValueError, match="no logits"):
        together.context.mark(1, None)


def test_memoryviews_are_tokens_too(bench: Bench) -> None:
    """A row may hold any bytes-like packed tokens."""
    b = bench("llama", n_seq_max=2)
    packed = b.pack(TOKENS[:30])
    b.context.step([Row(0, 0, memoryview(b"zz" + packed)[2:], logits=True)])
    first = b.whole_row(b.context.mark(0, None))
    b.drop(0)
    b.context.step([Row(0, 0, packed, logits=True)])
    assert np.array_equal(first, b.whole_row(b.context.mark(0, None)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one row"),
        ([Row(0, 0, b"", True)], "packed u32"),
        ([Row(0, 0, b"abc", True)], "packed u32"),
        ([Row(2, 0, b"\1\0\0\0", True)], "sequences are 0 to 1"),
        ([Row(-1, 0, b"\1\0\0\0", True)], "sequences are 0 to 1"),
        ([Row(0, 1, b"\1\0\0\0", True)], "has 0 tokens"),
        ([Row(0, -1, b"\1\0\0\0", True)], "has 0 tokens"),
        ([Row(0, 0, b"\1\0\0\0", True), Row(0, 0, b"\1\0\0\0", True)], "twice"),
        ([Row(0, 0, b"\1\0\0\0" * 257, True)], "256 cells"),
        ([Row(0, 0, b"\1\0\0\0" * 33, True)], "more than 32 tokens"),
        ([Row(0, 0, b"\1\0\0\0" * 20, True), Row(1, 0, b"\1\0\0\0" * 13, True)], "more than 32"),
    ],
)
def test_impossible_rows_change_nothing(bench: Bench, rows: list[Row], words: str) -> None:
    """Rows that make no sense are a ValueError before llama.cpp sees them."""
    b = bench("llama", n_ctx=256, n_batch=32, n_seq_max=2)
    with pytest.raises(ValueError, match=words):
        b.context.step(rows)
    b.feed(0, TOKENS[:10])


@pytest.mark.parametrize("token", [288, 2**31 - 1, 2**31, 2**32 - 1])
def test_tokens_outside_the_vocabulary_are_refused(bench: Bench, token: int) -> None:
    """An id that the vocabulary lacks is an InvalidPrompt, wherever in the batch it is."""
    b = bench("llama")
    with pytest.raises(InvalidPrompt, match="outside the vocabulary"):
        b.context.step([Row(0, 0, b.pack([1, 2, token, 3]), logits=True)])
    b.feed(0, TOKENS[:10])


def test_a_step_without_free_cells_fails_and_can_be_recovered(bench: Bench) -> None:
    """Too few cells: status 1, the sequence is what it was before, others go on."""
    b = bench("llama", n_ctx=256, n_seq_max=2)
    b.feed(0, TOKENS[:200])
    b.feed(1, TOKENS[:50])
    with pytest.raises(DecodeFailed, match="n_ctx") as error:
        b.feed(1, TOKENS[:50])
    assert error.value.code == 1
    assert [b.context.length(seq) for seq in (0, 1)] == [200, 50]
    with pytest.raises(ValueError, match="no logits"):
        b.context.mark(0, None)
    b.feed(1, [1])
    b.drop(1)
    b.feed(1, TOKENS[:50])
    b.feed(0, [1])


@pytest.mark.parametrize("status", [1, 2, -1, -2, -3])
def test_every_status_is_told_in_words(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Each status of llama_decode becomes a DecodeFailed with that code and its meaning."""
    b = bench("llama")
    monkeypatch.setattr(llama_cpp, "llama_decode", lambda *_: status)
    with pytest.raises(DecodeFailed) as error:
        b.context.step([Row(0, 0, b.pack([1]), logits=True)])
    assert error.value.code == status
    assert DECODE_STATUS.get(status, "llama.cpp failed") in str(error.value)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("unified", [True, False])
def test_what_is_not_numbers_is_refused_and_heals(
    bench: Bench, wanted: bool, unified: bool
) -> None:
    """A step over a state of NaN fails, also one that wants no logits, and empties it.

    With one pool of cells and no flash attention a NaN that stayed would spoil every sequence.
    """
    b = bench("llama", n_seq_max=2, kv_unified=unified)
    prompt = Row(0, 0, b.pack(TOKENS[:32]), logits=True)
    b.context.step([prompt])
    expected = b.context.mark(0, None)
    data = bytearray(b.export(0, 0, 32))
    data[-4096:] = b"\xff" * 4096
    b.drop(0)
    b.restore(0, [(0, 32, bytes(data))])
    with pytest.raises(DecodeFailed, match="not numbers") as caught:
        b.context.step([Row(0, 32, b.pack([1]), logits=wanted)])
    assert caught.value.code == 0
    assert b.context.length(0) == 0
    b.feed(1, TOKENS[:32])
    b.drop(1)
    b.context.step([prompt])
    assert b.context.mark(0, None) == expected


def test_separate_cells_contain_and_heal_what_is_not_numbers(bench: Bench) -> None:
    """A neighbour of the same step goes on, and the sequence is usable at once beside it."""
    b = bench("llama", n_seq_max=2, kv_unified=False)
    b.feed(1, TOKENS[:32])
    data = bytearray(b.export(1, 0, 32))
    expected = b.feed(1, [9])
    b.truncate(1, 32)
    data[-4096:] = b"\xff" * 4096
    b.restore(0, [(0, 32, bytes(data))])
    with pytest.raises(DecodeFailed, match="not numbers"):
        b.context.step([Row(seq, 32, b.pack([9]), logits=True) for seq in (0, 1)])
    assert [b.context.length(seq) for seq in (0, 1)] == [0, 32]
    assert np.array_equal(b.feed(1, [9]), expected)
    b.lengths[0] = 0
    b.feed(0, TOKENS[:32])
    assert np.array_equal(b.feed(0, [9]), expected)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
def test_a_running_step_can_be_aborted(bench: Bench, arch: str, unified: bool) -> None:
    """Its sequences are what they were, or empty where that cannot be; others do not notice."""
    options = {"n_seq_max": 3, "n_ctx": 8192, "n_batch": 8192, "n_ubatch": 64}
    b = bench(arch, kv_unified=unified, **options)
    b.feed(2, TOKENS)
    b.feed(0, TOKENS[:40])
    other = b.feed(2, [7])
    b.truncate(2, 300)
    size = min(3500, b.context.n_batch // 2)
    long = b.pack([TOKENS[index % 300] for index in range(size)])

    def step_until_aborted() -> None:
        for _ in range(1000):  # some begin and end between two aborts
            b.context.step([Row(0, b.context.length(0), long, True), Row(1, 0, long, True)])
            b.context.drop(0)
            b.context.drop(1)

    ended = threading.Event()

    def abort() -> None:
        while not ended.wait(0.001):  # whether the step has begun cannot be seen
            b.context.abort()

    aborting = threading.Thread(target=abort)
    aborting.start()
    try:
        with pytest.raises(DecodeAborted) as caught:
            step_until_aborted()
    finally:
        ended.set()
        aborting.join()
    assert caught.value.code == 2
    span = b.context.kv_class is KVClass.SPAN
    assert b.context.length(1) == 0
    assert b.context.length(0) in ((0, 40) if span else (0,))
    for seq in (0, 1):
        b.drop(seq)
        b.feed(seq, TOKENS[:40])
    if span:
        assert np.abs(b.feed(2, [7]) - other).max() < 0.06


@pytest.mark.parametrize("unified", [True, False])
def test_an_aborted_sequence_goes_on_where_it_was(bench: Bench, unified: bool) -> None:
    """What the aborted step has left behind of a span sequence is gone."""
    b = bench("llama", kv_unified=unified, n_seq_max=2, n_ctx=2048, n_ubatch=64)
    b.feed(0, TOKENS)
    expected = b.feed(0, [7])
    b.truncate(0, 300)
    before = b.export(0, 0, 300)
    decode = llama_cpp.llama_decode

    def late(context: Any, batch: Any) -> int:
        # Part of the step is computed, the rest is not: as llama.cpp leaves it.
        batch.n_tokens = 64
        assert decode(context, batch) == 0
        return 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", late)
        with pytest.raises(DecodeAborted):
            b.context.step([Row(0, 300, b.pack(TOKENS[:200]), logits=True)])
    assert b.context.length(0) == 300
    assert b.export(0, 0, 300) == before
    assert np.abs(b.feed(0, [7]) - expected).max() < 0.06


def test_sequences_are_dropped_without_an_error(bench: Bench) -> None:
    """Dropping what is empty, unknown, or of a closed context does nothing."""
    b = bench("llama", n_seq_max=2)
    for seq in (0, 1, 2, -1, 99):
        b.context.drop(seq)
    b.context.close()
    b.context.drop(0)


def test_a_closed_context_refuses_everything_else(bench: Bench) -> None:
    """After close, which may be called again, each call is an EngineClosed."""
    b = bench("llama")
    b.feed(0, TOKENS[:10])
    b.context.close()
    b.context.close()
    calls: list[Callable[[], object]] = [
        lambda: b.context.step([Row(0, 10, b.pack([1]), logits=True)]),
        lambda: b.context.mark(0, None),
        lambda: b.context.truncate(0, 5),
        lambda: b.context.range_bytes(0, 0, 5),
        lambda: b.context.import_ranges(0, []),
    ]
    for call in calls:
        with pytest.raises(EngineClosed):
            call()


def test_the_guess_at_costs_goes_by_weights_and_threads(bench: Bench) -> None:
    """Twice the threads, half the time; a larger model takes longer."""
    one, two = bench("llama", n_threads=1).context, bench("llama", n_threads=2).context
    assert isinstance(one, DeclaresCosts)
    prior = one.cost_prior
    assert prior is not None
    assert prior.import_s_per_byte > 0
    small = bench("mamba", n_threads=1).context.cost_prior
    assert 0 < small.compute_s_per_token < prior.compute_s_per_token
    if not llama_cpp.llama_supports_gpu_offload():
        assert two.cost_prior.compute_s_per_token == pytest.approx(prior.compute_s_per_token / 2)

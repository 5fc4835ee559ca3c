"""Snapshots on top of ranges, where a part of the state cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from erllama_core.errors import DecodeFailed, NotNumbers, StateRejected
from erllama_core.interfaces.backend import KVClass, Row

Bench = Callable[..., Any]

TOKENS = [(7 * index + index // 13) % 256 for index in range(400)]
NEXT = [5, 250, 17, 99]

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lfm2", {}),
    ("qwen35", {}),
    ("gemma3", {"swa_full": False}),
    ("lfm2", {"kv_unified": False}),
    ("qwen35", {"kv_unified": False, "flash_attn": True}),
    ("gemma3", {"kv_unified": False}),
]


@pytest.mark.parametrize(("arch", "options"), KINDS)
def test_another_context_of_other_sizes_goes_on(
    bench: Bench, arch: str, options: dict[str, Any]
) -> None:
    """State moves between contexts that differ in sizes, threads and sequences alone."""
    source = bench(arch, n_ctx=1024, n_ubatch=64, **options)
    n_seq_max = 1 if arch == "gemma3" and options.get("kv_unified") is False else 3
    target = bench(arch, n_ctx=2048, n_ubatch=128, n_seq_max=n_seq_max, n_threads=2, **options)
    assert source.context.kv_class is KVClass.CHECKPOINT
    source.feed(0, TOKENS[:250])
    snapshot = source.snapshot(0)
    expected = source.decode(0, NEXT)
    blocks = source.export_chain(0, [0, 90, 254])
    seq = n_seq_max - 1
    target.restore(seq, blocks, 250)
    target.restore_snapshot(seq, 250, snapshot)
    assert np.abs(target.decode(seq, NEXT) - expected).max() < 0.06


@pytest.mark.parametrize(("arch", "options"), KINDS)
def test_a_snapshot_of_another_position_is_refused(
    bench: Bench, arch: str, options: dict[str, Any]
) -> None:
    """What stands elsewhere than the ranges end is never taken for what stands there."""
    b = bench(arch, n_seq_max=2, **options)
    b.feed(0, TOKENS[:100])
    early = b.snapshot(0)
    b.feed(0, TOKENS[100:200])
    late = b.snapshot(0)
    blocks = b.export_chain(0, [0, 100, 200])
    for stop, snapshot in ((100, late), (200, early), (150, late), (199, late)):
        b.restore(1, blocks if stop > 100 else blocks[:1], stop)
        with pytest.raises(StateRejected):
            b.restore_snapshot(1, stop, snapshot)
        b.drop(1)
    b.restore(1, blocks)
    b.restore_snapshot(1, 200, late)
    b.feed(1, NEXT)


@pytest.mark.parametrize(("arch", "options"), KINDS)
def test_what_is_refused_leaves_no_cells_behind(
    bench: Bench, arch: str, options: dict[str, Any]
) -> None:
    """Whatever part of a state was damaged: all cells can be used once the sequence is dropped."""
    b = bench(arch, n_ctx=256, n_seq_max=2, n_batch=64, **options)
    b.feed(0, TOKENS[:64])
    (_, _, good), snapshot = b.export_chain(0, [0, 64])[0], b.snapshot(0)
    wrong_position = good[:16] + (77).to_bytes(4, "little") + good[20:]
    for data in (good[:-1], good + b"\0", good[: len(good) // 2], wrong_position, bytes(len(good))):
        with pytest.raises(StateRejected):
            b.restore(1, [(0, 64, data)])
        b.drop(1)
    for data in (snapshot[:-1], snapshot + b"\0", snapshot[:40], bytes(len(snapshot)), good):
        b.restore(1, [(0, 64, good)])
        with pytest.raises(StateRejected):
            b.restore_snapshot(1, 64, data)
        b.drop(1)
    for seq in range(3 if options.get("kv_unified", True) else 2):
        assert (seq == 0) == (b.context._state.positions(seq) != (-1, -1))
    for seq, room in ((1, 192), (0, 0)):
        if room:
            b.feed(seq, TOKENS[:room])
    b.drop(1)
    b.restore(1, [(0, 64, good)])
    b.restore_snapshot(1, 64, snapshot)
    b.feed(1, NEXT)


def test_an_aborted_step_leaves_nothing_half_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a recurrent state is half computed its last position says otherwise: it is dropped."""
    from llama_cpp import llama_cpp

    b = bench("qwen35", n_seq_max=2)
    b.feed(0, TOKENS[:100])
    snapshot, blocks = b.snapshot(0), b.export_chain(0, [0, 100])
    expected = b.decode(0, NEXT)
    b.drop(0)
    b.restore(0, blocks)
    b.restore_snapshot(0, 100, snapshot)
    decode = llama_cpp.llama_decode

    def late(context: Any, batch: Any) -> int:
        assert decode(context, batch) == 0
        return 2

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", late)
        with pytest.raises(DecodeFailed):
            b.context.step([Row(0, 100, b.pack(TOKENS[:60]), logits=True)])
    assert b.context.length(0) == 0
    b.drop(0)
    b.restore(0, blocks)
    b.restore_snapshot(0, 100, snapshot)
    assert np.array_equal(b.decode(0, NEXT), expected)


@pytest.mark.parametrize(
    ("arch", "unified"), [("mamba", True), ("mamba", False), ("qwen35", False), ("qwen35", True)]
)
def test_a_state_of_nan_is_contained_and_heals(bench: Bench, arch: str, unified: bool) -> None:
    """Its sequence fails and is empty; afterwards every sequence computes numbers again.

    llama.cpp starts a new sequence by multiplying an old state with zero, which NaN survives.
    """
    b = bench(arch, n_seq_max=3, kv_unified=unified)
    expected = b.feed(0, TOKENS[:32])
    snapshot = b.snapshot(0)
    blocks = b.export_chain(0, [0, 32]) if arch == "qwen35" else []
    contained = arch == "mamba" or not unified
    if contained:
        b.feed(1, TOKENS[:32])
    else:
        b.drop(0)  # one pool of cells without flash attention: nothing contains it
    for seq in (2, 0):
        b.drop(seq)
        if blocks:
            b.restore(seq, blocks)
        bad = snapshot[:-16] + np.full(4, np.nan, dtype="<f4").tobytes()
        b.restore_snapshot(seq, 32, bad)
        with pytest.raises(DecodeFailed, match="not numbers"):
            b.feed(seq, [1])
        assert b.context.length(seq) == 0
        b.drop(seq)
    for seq in (0, 2):
        assert np.array_equal(b.feed(seq, TOKENS[:32]), expected)
    if contained:
        b.feed(1, [9])


def test_states_that_are_shared_heal_too(bench: Bench) -> None:
    """While sequences have one state together more of them are free than can be filled."""
    b = bench("mamba", n_seq_max=4)
    expected = b.feed(0, TOKENS[:32])
    snapshot = b.snapshot(0)
    bad = snapshot[:-16] + np.full(4, np.nan, dtype="<f4").tobytes()
    for seq in (1, 2):
        assert b.context.share(0, seq, 32)
        b.lengths[seq] = 32
    b.restore_snapshot(3, 32, bad)
    with pytest.raises(DecodeFailed):
        b.feed(3, [1])
    b.drop(3)
    for seq in (0, 1, 2):
        b.feed(seq, [seq])  # each takes a state of its own, wherever one is free
    for seq in range(4):
        b.drop(seq)
        assert np.array_equal(b.feed(seq, TOKENS[:32]), expected)


@pytest.mark.parametrize(
    ("arch", "unified"), [("mamba", True), ("mamba", False), ("qwen35", False)]
)
def test_nan_in_a_step_with_others_heals(bench: Bench, arch: str, unified: bool) -> None:
    """Whichever rows of a step are spoilt, and wherever they stand among the others."""
    b = bench(arch, n_seq_max=4, kv_unified=unified)
    expected = b.feed(0, TOKENS[:32])
    snapshot = b.snapshot(0)
    blocks = b.export_chain(0, [0, 32]) if arch == "qwen35" else []
    bad = snapshot[:-16] + np.full(4, np.nan, dtype="<f4").tobytes()
    for spoilt in ((1,), (2,), (1, 2), (0, 3), (0, 1, 2)):
        for seq in range(4):
            b.drop(seq)
            if blocks:
                b.restore(seq, blocks)
            b.restore_snapshot(seq, 32, bad if seq in spoilt else snapshot)
        with pytest.raises(NotNumbers) as caught:
            b.context.step([Row(seq, 32, b.pack([5]), logits=True) for seq in range(3, -1, -1)])
        assert caught.value.seqs == frozenset(spoilt)
        assert not caught.value.reaches_others
        for seq in range(4):
            b.drop(seq)
        for seq in range(4):
            assert np.array_equal(b.feed(seq, TOKENS[:32]), expected)

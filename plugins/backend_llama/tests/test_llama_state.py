"""State that was exported and imported again is the state that was."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erllama_core.errors import NotSupported, StateRejected
from erllama_core.interfaces.backend import KVClass, RangeExport, RangeImport, Row

Bench = Callable[..., Any]

TOKENS = [(7 * index + index // 13) % 256 for index in range(400)]
STEPS = 150
NEXT = [5, 250, 17, 99]


def cuts_of(length: int, block: int) -> list[int]:
    return [*range(0, length, block), length]


# Logits are compared to the bit between contexts that hold one sequence each: where its cells
# lie decides in which order the CPU adds them up, and so how the sum is rounded.


@pytest.mark.parametrize(("arch", "block"), [("llama", 70), ("gemma3", 64)])
@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "f16"), ("f32", "bf16")])
def test_restored_ranges_compute_the_same_logits(
    bench: Bench, arch: str, block: int, types: tuple[str, str]
) -> None:
    """A sequence put together from ranges, in a context of other sizes, goes on bit for bit."""
    kv = {"type_k": types[0], "type_v": types[1]}
    source = bench(arch, n_ctx=1024, **kv)
    target = bench(arch, n_ctx=2048, n_seq_max=4, n_ubatch=128, **kv)
    source.feed(0, TOKENS)
    target.restore(3, source.export_chain(0, cuts_of(400, block)))
    assert np.array_equal(target.decode(3, NEXT), source.decode(0, NEXT))


def test_flash_attention_state_round_trips(bench: Bench) -> None:
    """With flash attention the exported bytes come back unchanged too."""
    b = bench("llama", n_seq_max=2, flash_attn=True)
    b.feed(0, TOKENS)
    blocks = b.export_chain(0, cuts_of(400, 90))
    b.restore(1, blocks)
    assert b.export_chain(1, cuts_of(400, 90)) == blocks


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_any_cuts_and_any_branch_are_exact(bench: Bench, arch: str) -> None:
    """Wherever a context was cut, and wherever a branch leaves it, the restored one is exact.

    The reference is the live sequence, truncated to where the branch leaves.
    """
    live, restored = bench(arch), bench(arch)
    limit = live.context.max_block_tokens or 400
    branch = [3, 1, 4]

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        live.drop(0)
        restored.drop(0)
        length = data.draw(st.integers(2, 300))
        live.feed(0, TOKENS[:length])
        cuts = [0]
        while cuts[-1] < length:
            cuts.append(data.draw(st.integers(cuts[-1] + 1, min(length, cuts[-1] + limit))))
        blocks = live.export_chain(0, cuts)
        stop = data.draw(st.integers(1, length))
        used = [block for block in blocks if block[0] < stop]
        restored.restore(0, used, stop)
        assert live.truncate(0, stop)
        assert np.array_equal(restored.decode(0, branch), live.decode(0, branch))

    check()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_truncated_sequence_goes_on_as_a_fresh_one(bench: Bench, arch: str) -> None:
    """After a truncation the sequence computes what it would have without the lost tokens."""
    b = bench(arch, n_seq_max=2)
    b.feed(0, TOKENS)
    b.feed(1, TOKENS[:130])
    assert b.truncate(0, 130)
    # Not to the bit: the two were computed in batches of other shapes (rounding, up to 0.01).
    assert np.abs(b.decode(0, NEXT) - b.decode(1, NEXT)).max() < 0.02


@pytest.mark.parametrize("options", [{}, {"kv_unified": False}])
def test_whole_state_restores_exactly(bench: Bench, options: dict[str, Any]) -> None:
    """A snapshot restored into another context goes on bit for bit as the original does."""
    source = bench("mamba", n_ctx=1024, n_ubatch=64, n_seq_max=3, **options)
    target = bench("mamba", n_ctx=2048, n_seq_max=3, **options)
    assert source.context.kv_class is KVClass.WHOLE
    source.feed(0, TOKENS)
    target.restore_snapshot(2, 400, source.snapshot(0))
    assert np.array_equal(target.decode(2, NEXT), source.decode(0, NEXT))


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("types", [("f16", "f16"), ("f32", "bf16")])
def test_separate_cells_restore_to_the_bit_beside_others(
    bench: Bench, flash_attn: bool, types: tuple[str, str]
) -> None:
    """Cut, joined, appended to what is there, or shared: nobody else's cells are in the way."""
    kv = {"type_k": types[0], "type_v": types[1], "flash_attn": flash_attn, "kv_unified": False}
    source = bench("llama", n_ctx=1024, **kv)
    target = bench("llama", n_ctx=2048, n_seq_max=4, n_ubatch=128, **kv)
    source.feed(0, TOKENS)
    target.feed(1, TOKENS[7:200])
    blocks = source.export_chain(0, cuts_of(400, 90))
    target.restore(3, blocks[:2])
    target.restore(3, blocks[2:])
    assert target.export_chain(3, cuts_of(400, 90)) == blocks
    assert target.context.share(3, 0, 400)
    assert target.context.share(3, 2, 217)
    target.lengths[0], target.lengths[2] = 400, 217
    assert source.truncate(0, 400)
    expected = source.decode(0, NEXT)
    assert np.array_equal(target.decode(3, NEXT), expected)
    assert np.array_equal(target.decode(0, NEXT), expected)
    source.truncate(0, 217)
    assert np.array_equal(target.decode(2, NEXT), source.decode(0, NEXT))


def test_whole_states_beside_each_other(bench: Bench) -> None:
    """A snapshot restored beside other sequences exports again what it was made of."""
    b = bench("mamba", n_seq_max=3)
    b.feed(2, TOKENS[9:50])
    b.feed(0, TOKENS)
    data, other = b.snapshot(0), b.snapshot(2)
    b.restore_snapshot(1, 400, data)
    b.drop(0)
    b.restore_snapshot(0, 400, data)
    assert b.snapshot(0) == data
    assert b.snapshot(2) == other


def test_whole_class_refuses_to_truncate(bench: Bench) -> None:
    """A state that cannot be cut says so, and is unchanged."""
    b = bench("mamba", n_seq_max=2)
    b.feed(0, TOKENS[:50])
    before = b.snapshot(0)
    assert not b.truncate(0, 20)
    assert b.snapshot(0) == before
    assert b.truncate(0, 50)
    assert b.truncate(0, 0)
    b.feed(0, TOKENS[:3])


def test_other_sequences_are_not_touched(bench: Bench) -> None:
    """Exports, imports, truncations and drops leave what another sequence holds as it was."""
    b = bench("llama", n_seq_max=3)
    b.feed(2, TOKENS[100:250])
    before = b.export(2, 0, 150)
    b.feed(0, TOKENS)
    blocks = b.export_chain(0, cuts_of(400, 64))
    b.restore(1, blocks, 390)
    b.truncate(1, 33)
    b.drop(0)
    assert b.export(2, 0, 150) == before


def damaged(data: bytes) -> list[bytes]:
    rng = random.Random(4)
    return [
        data[:-1],
        data + b"\0",
        data[: len(data) // 2],
        rng.randbytes(len(data)),
        b"\0" * len(data),
        # Another number of cells than the header of the blob has room for.
        data[:12] + (200).to_bytes(4, "little") + data[16:],
        # The first cell claims to be at position 77.
        data[:16] + (77).to_bytes(4, "little") + data[20:],
    ]


@pytest.mark.parametrize(("arch", "unified"), [("llama", True), ("gemma3", True), ("llama", False)])
def test_damaged_ranges_leave_nothing_behind(bench: Bench, arch: str, unified: bool) -> None:
    """Bytes that are no state of that range are refused, and all cells stay usable."""
    b = bench(arch, n_ctx=256, n_seq_max=2, kv_unified=unified)
    b.feed(0, TOKENS[:64])
    good = b.export_chain(0, cuts_of(64, 32))
    for data in damaged(good[1][2]):
        with pytest.raises(StateRejected):
            b.restore(1, [good[0], (32, 64, data)])
        with pytest.raises(ValueError, match="dropped"):
            b.truncate(1, 1)
        b.drop(1)
        if unified:
            assert b.context._state.positions(2) == (-1, -1)
    # Every cell that seq 0 does not have is free, and nothing else is in the state.
    b.restore(1, good)
    b.drop(1)
    b.feed(1, TOKENS[: 192 if unified else 256])


def test_damaged_snapshots_leave_the_sequence_empty(bench: Bench) -> None:
    """Bytes that are no snapshot are refused, and the sequence can be used once it is dropped."""
    b = bench("mamba", n_ctx=256, n_seq_max=2)
    b.feed(0, TOKENS[:64])
    good = b.snapshot(0)
    for data in (good[:-1], good + b"\0", good[:40], b"\0" * len(good)):
        with pytest.raises(StateRejected):
            b.restore_snapshot(1, 64, data)
        assert b.context._state.positions(1) == (-1, -1)
        b.drop(1)
    with pytest.raises(StateRejected, match="positions"):
        b.restore_snapshot(1, 63, good)
    b.drop(1)
    b.restore_snapshot(1, 64, good)
    b.feed(1, NEXT)


@pytest.mark.parametrize("unified", [True, False])
def test_a_range_of_another_layout_is_refused(bench: Bench, unified: bool) -> None:
    """State of a context with another V layout or element type is not taken for this one's."""
    source = bench("llama", n_seq_max=1, kv_unified=unified)
    source.feed(0, TOKENS[:64])
    block = (0, 64, source.export(0, 0, 64))
    for options in ({"flash_attn": True}, {"type_k": "q8_0"}, {"type_k": "bf16"}):
        target = bench("llama", n_seq_max=1, kv_unified=unified, **options)
        with pytest.raises(StateRejected):
            target.restore(0, [block])


def test_import_without_free_cells_is_refused(bench: Bench) -> None:
    """A range that does not fit leaves the others as they are."""
    b = bench("llama", n_ctx=256, n_seq_max=2)
    b.feed(0, TOKENS[:100])
    block = (0, 100, b.export(0, 0, 100))
    b.feed(0, TOKENS[100:200])
    with pytest.raises(StateRejected, match="free cells"):
        b.restore(1, [block])
    b.drop(1)
    assert b.export(0, 0, 100) == block[2]


def test_import_takes_read_only_memory_of_any_alignment(bench: Bench) -> None:
    """Ranges are read where they lie: in bytes, in a slice at an odd address."""
    b = bench("llama", n_seq_max=2)
    b.feed(0, TOKENS[:64])
    data = b.export(0, 0, 64)
    shifted = memoryview(b"x" + data)[1:]
    b.context.import_ranges(1, [RangeImport(0, 64, 64, shifted)])
    assert b.export(1, 0, 64) == data


def test_export_needs_a_buffer_of_the_right_size(bench: Bench) -> None:
    """A buffer of another size or without write access is the caller's error."""
    b = bench("llama")
    b.feed(0, TOKENS[:64])
    size = b.context.range_bytes(0, 8, 40)
    for wrong in (size - 1, size + 1):
        with pytest.raises(ValueError, match="bytes"):
            b.context.export_ranges(0, [RangeExport(8, 40, memoryview(bytearray(wrong)))])
    with pytest.raises(ValueError, match="writable"):
        b.context.export_ranges(0, [RangeExport(8, 40, memoryview(bytes(size)))])
    assert b.context._state.positions(1) == (-1, -1)


def test_malformed_calls_are_refused_before_llama_cpp_sees_them(bench: Bench) -> None:
    """Ranges that are empty, out of order, too long or not there are a ValueError."""
    b = bench("gemma3", n_seq_max=2)
    b.feed(0, TOKENS[:200])
    for start, end in ((0, 0), (5, 4), (-1, 3), (150, 201), (0, 65)):
        with pytest.raises(ValueError, match=r"range|tokens"):
            b.context.range_bytes(0, start, end)
    with pytest.raises(ValueError, match="sequences are"):
        b.context.range_bytes(2, 0, 1)
    data = memoryview(b.export(0, 0, 64))
    for start, end, stop in ((1, 64, 64), (0, 64, 0), (0, 64, 65)):
        with pytest.raises(ValueError, match="continue"):
            b.context.import_ranges(1, [RangeImport(start, end, stop, data)])
    with pytest.raises(ValueError, match="keep"):
        b.context.truncate(0, 201)


def test_each_class_refuses_the_others_calls(bench: Bench) -> None:
    """Ranges of a whole-state model, and snapshots of a span model, are NotSupported."""
    span, whole = bench("llama"), bench("mamba")
    span.feed(0, TOKENS[:8])
    whole.feed(0, TOKENS[:8])
    with pytest.raises(NotSupported):
        span.snapshot(0)
    with pytest.raises(NotSupported):
        whole.export(0, 0, 8)
    with pytest.raises(NotSupported):
        whole.restore(0, [(0, 8, b"")])


@pytest.mark.parametrize(
    ("arch", "flash_attn", "seed", "rounding"),
    [("llama", False, 1, 0.06), ("gemma3", False, 1, 0.03), ("gemma3", True, 2, 0.03)],
)
def test_mixed_load(bench: Bench, arch: str, flash_attn: bool, seed: int, rounding: float) -> None:
    """Whatever was fed, cut, stored and restored before, a sequence computes what a fresh
    context computes; a sliding window may refuse an export or a cut instead.

    Cells are scarce, so llama.cpp gives away those that windows have left behind. A state with
    a hole in its window is off by 0.09 and more.
    """
    options = {"n_ctx": 768, "n_ubatch": 64, "flash_attn": flash_attn}
    b, reference = bench(arch, n_seq_max=3, **options), bench(arch, **options)
    rng = random.Random(seed)
    prefixes = [[rng.randrange(256) for _ in range(700)] for _ in range(3)]
    sequences: list[list[int]] = [[], [], []]
    store: dict[tuple[int, ...], list[tuple[int, bytes, list[int]]]] = {}
    refused = 0

    def feed(seq: int, tokens: list[int]) -> None:
        row = b.feed(seq, tokens)
        sequences[seq] = sequences[seq] + tokens
        reference.drop(0)
        assert np.abs(row - reference.feed(0, sequences[seq])).max() < rounding

    for _ in range(STEPS):
        seq = rng.randrange(3)
        tokens = sequences[seq]
        match rng.choice(("feed", "feed", "next", "drop", "store", "restore", "cut", "cut")):
            case "feed":
                room = min(768 - sum(map(len, sequences)), 700 - len(tokens), 150)
                if room > 1:
                    end = len(tokens) + rng.randrange(1, room)
                    feed(seq, rng.choice(prefixes)[len(tokens) : end])
            case "next":
                if sum(map(len, sequences)) < 768:
                    feed(seq, [rng.randrange(256)])
            case "drop":
                b.drop(seq)
                sequences[seq] = []
            case "store":
                cuts = [0]
                while cuts[-1] < len(tokens):
                    cuts.append(min(len(tokens), cuts[-1] + rng.randrange(1, 65)))
                for start, end in pairwise(cuts):
                    try:
                        data = b.export(seq, start, end)
                    except StateRejected:
                        refused += 1
                    else:
                        found = store.setdefault(tuple(tokens[:start]), [])
                        found.append((end, data, tokens[start:end]))
            case "restore":
                b.drop(seq)
                sequences[seq] = []
                restored: list[int] = []
                blocks: list[tuple[int, int, bytes]] = []
                stop = 0
                while tuple(restored) in store and rng.random() < 0.9:
                    end, data, part = rng.choice(store[tuple(restored)])
                    blocks.append((len(restored), end, data))
                    restored = restored + part
                    stop = end
                if not blocks:
                    continue
                stop = rng.randrange(blocks[-1][0] + 1, stop + 1)
                try:
                    b.restore(seq, blocks, stop)
                except StateRejected:
                    b.drop(seq)
                else:
                    sequences[seq] = restored[:stop]
                    if sum(map(len, sequences)) < 768:
                        feed(seq, [7])
            case "cut":
                if len(tokens) > 1:
                    length = rng.randrange(1, len(tokens))
                    if b.truncate(seq, length):
                        sequences[seq] = tokens[:length]
                        feed(seq, [7])
                    else:
                        refused += 1
    assert (refused > 0) == (arch == "gemma3"), f"{refused} refused"


@pytest.mark.real_model
@pytest.mark.parametrize("unified", [True, False])
def test_demo_model_restores_exactly(bench: Bench, demo_model_path: Path, unified: bool) -> None:
    """On a real model, without flash attention, restored ranges go on bit for bit."""
    live, restored = (bench(demo_model_path, kv_unified=unified) for _ in range(2))
    assert live.context.kv_class is KVClass.SPAN
    live.feed(0, TOKENS[:100])
    restored.restore(0, live.export_chain(0, [0, 64, 100]))
    assert np.array_equal(restored.decode(0, NEXT), live.decode(0, NEXT))


FORGED_CELLS = [
    (12, (1 << 28).to_bytes(4, "little")),  # another number of cells, for which memory is taken
    (12, bytes(4)),
    (16, (1 << 31).to_bytes(4, "little")),  # a position that nothing but a clear removes
    (16, (7).to_bytes(4, "little")),  # one that another cell has
    (20, (2).to_bytes(4, "little")),  # of two sequences
    (8, (3).to_bytes(4, "little")),  # another number of pools
]


@pytest.mark.parametrize(("at", "value"), FORGED_CELLS)
@pytest.mark.parametrize(
    ("arch", "options", "weights"),
    [
        ("llama", {}, {}),
        ("llama", {"kv_unified": False}, {}),
        ("gemma3", {}, {}),
        ("gemma3", {"kv_unified": False}, {}),
        ("gemma3", {"swa_full": False}, {}),
        ("lfm2", {}, {}),
        ("lfm2", {}, {"hybrid_window": 32}),
    ],
    ids=str,
)
def test_forged_cells_are_refused_before_llama_cpp_takes_them(
    bench: Bench,
    tiny: Callable[..., Path],
    arch: str,
    options: dict[str, Any],
    weights: dict[str, Any],
    at: int,
    value: bytes,
) -> None:
    """Cells with other positions than they should have leave nothing in the memory: a state that
    is restored after them is again what it was, wherever the forged ones were.
    """
    b = bench(tiny(arch, **weights), n_ctx=256, n_seq_max=2, **options)
    b.feed(0, TOKENS[:40])
    has_ranges = b.context.kv_class is not KVClass.WHOLE
    has_snapshot = b.context.kv_class is not KVClass.SPAN
    good = b.export_chain(0, [0, 16, 40]) if has_ranges else []
    snapshot = b.snapshot(0) if has_snapshot else b""

    def forged(data: bytes) -> bytes:
        return data[:at] + value + data[at + 4 :]

    def restore(blocks: list[tuple[int, int, bytes]], last: bytes) -> None:
        if has_ranges:
            b.restore(1, blocks)
        if has_snapshot:
            b.restore_snapshot(1, 40, last)

    def held() -> tuple[list[tuple[int, int, bytes]], bytes]:
        return (
            b.export_chain(1, [0, 16, 40]) if has_ranges else [],
            b.snapshot(1) if has_snapshot else b"",
        )

    restore(good, snapshot)
    before = held()
    b.drop(1)
    if has_ranges:
        with pytest.raises(StateRejected):
            restore([good[0], (16, 40, forged(good[1][2]))], snapshot)
        b.drop(1)
    if has_snapshot and (arch == "gemma3" or not has_ranges):  # others' has no such cells
        with pytest.raises(StateRejected):
            restore(good, forged(snapshot))
        b.drop(1)
    restore(good, snapshot)
    assert held() == before


@pytest.mark.real_model
def test_demo_model_with_cells_of_its_own_computes_the_same_beside_others(
    bench: Bench, demo_model_path: Path
) -> None:
    """A restored context goes on bit for bit as the live one does alone, whatever else is in its
    batches; torture's ``kill`` compares replies on that ground.

    llama.cpp computes as many tokens of each sequence together as the shortest row has, so beside
    rows of one token the first one of a longer row is computed by itself.
    """
    options = {"kv_unified": False, "n_ctx": 512, "n_seq_max": 3}
    alone, beside = (bench(demo_model_path, **options) for _ in range(2))
    alone.feed(0, TOKENS[:64])
    blocks = alone.export_chain(0, [0, 32, 64])
    alone.feed(0, TOKENS[64:65])
    expected = alone.feed(0, TOKENS[65:100])
    beside.feed(0, TOKENS[9:80])
    beside.feed(1, TOKENS[20:50])
    beside.restore(2, blocks)
    rows = [
        Row(0, 71, beside.pack([5]), logits=True),
        Row(1, 30, beside.pack([5]), logits=True),
        Row(2, 64, beside.pack(TOKENS[64:100]), logits=True),
    ]
    beside.context.step(rows)
    assert np.array_equal(beside.whole_row(beside.context.mark(2, None)), expected)
    assert beside.export(2, 0, 64) == alone.export(0, 0, 64)
    assert beside.export(2, 64, 100) == alone.export(0, 64, 100)

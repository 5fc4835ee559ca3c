"""Which operations a model's memory is said to allow, and how that is proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from erllama_backend_llama import kv_class as kv_class_module
from erllama_backend_llama.layout import v_transposed
from erllama_backend_llama.state import SequenceState, UnifiedRanges
from erllama_core.errors import ModelLoadError, StateRejected
from erllama_core.interfaces.backend import KVClass, RangeImport, Row

Bench = Callable[..., Any]


@pytest.mark.parametrize(
    ("arch", "options", "kv_class", "block"),
    [
        ("llama", {}, KVClass.SPAN, None),
        ("gemma3", {}, KVClass.SPAN, 64),
        ("gemma3", {"swa_full": False}, KVClass.CHECKPOINT, None),
        ("mamba", {}, KVClass.WHOLE, None),
        ("lfm2", {}, KVClass.CHECKPOINT, None),
        ("qwen35", {}, KVClass.CHECKPOINT, None),
        ("llama", {"kv_unified": False}, KVClass.SPAN, None),
        ("gemma3", {"kv_unified": False}, KVClass.CHECKPOINT, None),
        ("gemma3", {"kv_unified": False, "swa_full": False}, KVClass.CHECKPOINT, None),
        ("lfm2", {"kv_unified": False}, KVClass.CHECKPOINT, None),
        ("qwen35", {"kv_unified": False, "n_seq_max": 3}, KVClass.CHECKPOINT, None),
        ("mamba", {"kv_unified": False}, KVClass.WHOLE, None),
    ],
)
@pytest.mark.parametrize("flash_attn", [False, "auto"])
def test_class_follows_the_memory(
    bench: Bench,
    arch: str,
    options: dict[str, Any],
    kv_class: KVClass,
    block: int | None,
    flash_attn: Any,
) -> None:
    """Full attention and a kept window are cut freely, recurrent models are whole, and the others
    have a part of each kind; the proof agrees, silently.
    """
    with capture_logs() as logs:
        context = bench(arch, flash_attn=flash_attn, **options).context
    assert (context.kv_class, context.max_block_tokens) == (kv_class, block)
    assert not [entry for entry in logs if entry["log_level"] == "warning"]


@pytest.mark.parametrize("options", [{}, {"swa_full": False}, {"kv_unified": False}])
def test_a_hybrid_model_with_a_window_is_whole(
    bench: Bench, tiny: Callable[..., Path], options: dict[str, Any]
) -> None:
    """What llama.cpp tells of its parts is the recurrent one alone, without the window: neither
    with the cells nor with that could it be restored. Its whole state can.
    """
    b = bench(tiny("lfm2", hybrid_window=48), n_seq_max=2, n_ubatch=64, **options)
    assert (b.context.kv_class, b.context.memory_class.window) == (KVClass.WHOLE, 48)
    state = b.context._state
    b.feed(0, [index % 256 for index in range(300)])
    recurrent = state.size(0, rest=True)
    b.feed(0, [7] * 100)
    assert state.size(0, rest=True) == recurrent
    data = b.snapshot(0)
    expected = b.decode(0, [9, 8, 7])
    b.restore_snapshot(1, 400, data)
    assert np.abs(b.decode(1, [9, 8, 7]) - expected).max() < 0.01


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2", "qwen35"])
def test_the_proof_leaves_the_context_empty(bench: Bench, arch: str) -> None:
    """After opening, every cell is free and every sequence is empty."""
    b = bench(arch, n_ctx=256, n_seq_max=2)
    for seq in range(2 if b.context.kv_class is KVClass.WHOLE else 3):
        assert b.context._state.positions(seq) == (-1, -1)
    b.feed(1, [index % 256 for index in range(256)])
    with pytest.raises(ValueError, match="no logits"):
        bench(arch).context.mark(0, None)


def test_a_failed_proof_falls_back_to_whole_states(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranges do not come back as they were, snapshots are used, with a warning."""

    def restore_too_little(
        self: UnifiedRanges, seq: int, _length: int, ranges: Sequence[RangeImport]
    ) -> None:
        for item in ranges:
            with self._using_scratch() as scratch:
                self._state.write(scratch, item.data, item.start, item.end)
                self._state.share(scratch, seq, item.start, max(item.start + 1, item.stop - 1))

    monkeypatch.setattr(UnifiedRanges, "restore", restore_too_little)
    with capture_logs() as logs:
        b = bench("llama", n_seq_max=2)
    assert b.context.kv_class is KVClass.WHOLE
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
        "llama.state.whole_only"
    ]
    b.feed(0, list(range(40)))
    data = b.snapshot(0)
    b.restore_snapshot(1, 40, data)
    assert not b.truncate(1, 20)
    b.decode(1, [1])


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_layout_that_is_not_as_known_is_not_cut(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, flash_attn: bool
) -> None:
    """Separate cells of a build that lays out state otherwise are stored whole."""
    original = SequenceState.read

    def other(self: SequenceState, seq: int, into: memoryview) -> None:
        original(self, seq, into)
        if len(into) > 100:
            into[8 + 4 * 3 :] = bytes(into[8 + 4 * 3 + 4 :]) + b"more"  # a count is missing

    with monkeypatch.context() as patch:
        patch.setattr(kv_class_module, "prove_whole", lambda _state: None)
        patch.setattr(SequenceState, "read", other)
        with capture_logs() as logs:
            b = bench("llama", n_seq_max=3, kv_unified=False, flash_attn=flash_attn)
    assert (b.context.kv_class, b.context.exports_whole) == (KVClass.WHOLE, False)
    assert "llama.state.whole_only" in str(logs)
    b.feed(0, list(range(40)))
    assert not b.context.share(0, 1, 39)
    assert b.context.share(0, 1, 40)
    b.lengths[1] = 40
    assert (b.decode(1, [5, 6]) == b.decode(0, [5, 6])).all()


def test_a_model_whose_state_cannot_be_restored_is_not_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without even whole states nothing would be right, so opening fails and says why."""

    def refuse(*_: object) -> None:
        raise StateRejected("it differs")

    monkeypatch.setattr(SequenceState, "write", refuse)
    with pytest.raises(ModelLoadError, match="it differs"):
        bench("mamba")


def test_unknown_layouts_are_unknown() -> None:
    """A blob that is laid out otherwise gives None, not a guess."""
    for blob in (b"", bytes(400), b"\1\0\0\0" * 100):
        for more in (False, True):
            assert v_transposed(blob, tokens=3, streams=1, has_more_positions=more) is None


def test_sizes_are_proved_not_assumed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory whose ranges do not grow by the same for each token is not cut."""
    original = SequenceState.size
    bias = iter(range(100))
    monkeypatch.setattr(
        SequenceState, "size", lambda self, seq: original(self, seq) + next(bias) ** 2
    )
    monkeypatch.setattr(kv_class_module, "prove_whole", lambda _state: None)
    monkeypatch.setattr(SequenceState, "read", lambda *_: None)
    with capture_logs() as logs:
        b = bench("llama")
    assert b.context.kv_class is KVClass.WHOLE
    assert "linear" in str(logs)
    b.context.step([Row(0, 0, b.pack([1]), logits=True)])

"""What the stub refuses: broken contracts, full buffers, injected faults."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from erllama_backend_stub import (
    HangGate,
    Status,
    StubContext,
    StubFaults,
    StubModel,
    StubOptions,
    gate,
    open_model,
)
from erllama_core.errors import DecodeAborted, DecodeFailed, ModelLoadError, StateRejected
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    Mark,
    RangeExport,
    RangeImport,
    Row,
    SamplingParams,
)


def load(kv_class: str = "span", faults: StubFaults | None = None, **context: Any) -> StubModel:
    return open_model(
        BackendRequest(
            model_path=None,
            options=StubOptions(
                kv_class=kv_class,  # type: ignore[arg-type]
                faults=faults or StubFaults(),
                max_block_tokens=4,
            ),
            context=ContextOptions(**{"n_ctx": 8, "n_batch": 8, "n_seq_max": 2, **context}),
        )
    )


def row(seq: int, start: int, *tokens: int, logits: bool = True) -> Row:
    return Row(seq, start, struct.pack(f"<{len(tokens)}I", *tokens), logits)


def fresh_mark(*tokens: int) -> Mark:
    context = load().open_context()
    context.step([row(0, 0, *tokens)])
    return context.mark(0, None)


# --------------------------------------------------------------------- steps


def lose_sequence(context: StubContext) -> None:
    with pytest.raises(StateRejected):
        context.import_ranges(0, [RangeImport(0, 1, 1, memoryview(b""))])


def import_without_snapshot(context: StubContext) -> None:
    context.step([row(1, 0, 1, 2)])
    data = bytearray(context.range_bytes(1, 0, 2))
    context.export_ranges(1, [RangeExport(0, 2, memoryview(data))])
    context.import_ranges(0, [RangeImport(0, 2, 2, memoryview(data))])


def nothing(_context: StubContext) -> None:
    pass


BAD_STEPS: list[tuple[str, Status, Callable[[StubContext], None], list[Row]]] = [
    ("a position too far", Status.INVALID_BATCH, nothing, [row(0, 1, 1)]),
    ("no tokens", Status.INVALID_BATCH, nothing, [row(0, 0)]),
    ("half a token", Status.INVALID_BATCH, nothing, [Row(0, 0, b"\0\0\0\0\0\0", True)]),
    ("no such token", Status.INVALID_BATCH, nothing, [row(0, 0, 265)]),
    ("no such sequence", Status.INVALID_BATCH, nothing, [row(2, 0, 1)]),
    ("a negative sequence", Status.INVALID_BATCH, nothing, [row(-1, 0, 1)]),
    ("a sequence twice", Status.INVALID_BATCH, nothing, [row(0, 0, 1), row(0, 1, 1)]),
    ("a large batch", Status.INVALID_BATCH, nothing, [row(0, 0, *range(9))]),
    ("a full pool", Status.NO_CELL, nothing, [row(0, 0, *range(4)), row(1, 0, *range(3))]),
    ("an injected fault", Status.COMPUTE_FAILED, nothing, [row(0, 0, 1)]),
    ("a lost sequence", Status.MUST_DROP, lose_sequence, [row(0, 0, 1)]),
    ("a missing snapshot", Status.STATE_MISSING, import_without_snapshot, [row(0, 2, 1)]),
]


@pytest.mark.parametrize(
    ("status", "prepare", "rows"),
    [case[1:] for case in BAD_STEPS],
    ids=[case[0] for case in BAD_STEPS],
)
def test_bad_steps_fail_with_their_status(
    status: Status, prepare: Callable[[StubContext], None], rows: list[Row]
) -> None:
    """A step that cannot be done fails as a whole and leaves no logits and no tokens."""
    faults = StubFaults(fail_step=1 if status is Status.COMPUTE_FAILED else None)
    kv_class = "checkpoint" if status is Status.STATE_MISSING else "span"
    context = load(kv_class, faults, n_ctx=6).open_context()
    prepare(context)
    with pytest.raises(DecodeFailed) as caught:
        context.step(rows)
    assert caught.value.code == status
    with pytest.raises(ValueError, match="no logits"):
        context.mark(0, None)
    context.drop(0)
    context.drop(1)
    context.step([row(0, 0, 1, 2), row(1, 0, 1, 2)])
    assert context.mark(0, None) == context.mark(1, None)


def test_every_status_has_its_test() -> None:
    """The table above leaves no status out, but for that of a step that was aborted."""
    assert {case[1] for case in BAD_STEPS} == set(Status) - {Status.ABORTED}


@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
def test_a_failed_step_takes_its_sequences_back_and_no_other(kv_class: str) -> None:
    """Span sequences are what they were before it, others empty; neighbours go on."""
    context = load(kv_class, StubFaults(fail_step=2)).open_context()
    context.step([row(0, 0, 1), row(1, 0, 1)])
    first = context.mark(0, None)
    with pytest.raises(DecodeFailed):
        context.step([row(0, 1, 2)])
    assert [context.length(seq) for seq in (0, 1)] == [kv_class == "span", 1]
    if not context.length(0):
        context.step([row(0, 0, 1)])
        assert context.mark(0, None) == first
    context.step([row(0, 1, 2), row(1, 1, 2)])
    assert context.mark(0, None) == context.mark(1, None)


def test_a_failed_import_spoils_its_sequence_and_no_other() -> None:
    """Until it is dropped it serves nothing and has no length; the others go on."""
    context = load().open_context()
    context.step([row(1, 0, 1)])
    lose_sequence(context)
    assert context.length(0) == 0
    assert not context.truncate(0, 0)
    for call in (
        lambda: context.range_bytes(0, 0, 1),
        lambda: context.import_ranges(0, []),
        lambda: context.share(1, 0, 1),
        lambda: context.share(0, 1, 1),
    ):
        with pytest.raises(StateRejected, match="not dropped"):
            call()
    context.step([row(1, 1, 2)])
    assert context.mark(0, None) == fresh_mark(1, 2)
    context.drop(0)
    assert context.share(1, 0, 2)


def test_unified_cells_are_shared_and_separate_ones_are_not() -> None:
    """A unified context holds n_ctx tokens, a separate one n_ctx for each sequence."""
    unified, separate = load(kv_unified=True), load(kv_unified=False)
    context = unified.open_context()
    assert (context.n_ctx, context.n_cells) == (8, 8)
    context.step([row(0, 0, *range(6))])
    with pytest.raises(DecodeFailed) as caught:
        context.step([row(1, 0, *range(3))])
    assert caught.value.code == Status.NO_CELL
    context = separate.open_context()
    assert (context.n_ctx, context.n_cells) == (8, 16)
    context.step([row(0, 0, *range(8))])
    context.step([row(1, 0, *range(8))])
    with pytest.raises(DecodeFailed) as caught:
        context.step([row(1, 8, 1)])
    assert caught.value.code == Status.NO_CELL


def test_rows_that_asked_for_no_logits_have_none() -> None:
    """Sampling a row without logits is an error, beside one that has them."""
    model = load()
    context = model.open_context()
    context.step([row(0, 0, 1, logits=False), row(1, 0, 1)])
    sampler = model.new_sampler(SamplingParams(), b"")
    for missing in (0, 2, -1):
        with pytest.raises(ValueError, match="no logits"):
            context.sample(missing, sampler)
    assert context.sample(1, sampler) == context.sample(1, sampler)


# --------------------------------------------------------------------- state


@pytest.mark.parametrize(("start", "end", "stop"), [(1, 3, 3), (0, 3, 0), (0, 3, 4), (3, 3, 3)])
def test_ranges_must_follow_each_other(start: int, end: int, stop: int) -> None:
    """A range that leaves a hole, is empty or ends outside its block spoils the sequence."""
    context = load().open_context()
    context.step([row(1, 0, 1, 2, 3)])
    size = max(1, end - start)
    data = bytearray(context.range_bytes(1, 0, size))
    context.export_ranges(1, [RangeExport(0, size, memoryview(data))])
    with pytest.raises(StateRejected, match="cannot follow the 0 tokens"):
        context.import_ranges(0, [RangeImport(start, end, stop, memoryview(data))])
    with pytest.raises(DecodeFailed) as caught:
        context.step([row(0, 0, 1)])
    assert caught.value.code == Status.MUST_DROP


@pytest.mark.parametrize(("start", "end"), [(0, 4), (2, 2), (-1, 2), (2, 1)])
def test_only_ranges_of_the_sequence_are_exported(start: int, end: int) -> None:
    """A range outside the sequence, or an empty one, is refused and nothing changes."""
    context = load().open_context()
    context.step([row(0, 0, 1, 2, 3)])
    with pytest.raises(StateRejected):
        context.range_bytes(0, start, end)
    with pytest.raises(StateRejected):
        context.export_ranges(0, [RangeExport(start, end, memoryview(bytearray(1000)))])
    context.step([row(0, 3, 4)])
    assert context.mark(0, None) == fresh_mark(1, 2, 3, 4)


def test_long_blocks_are_refused_where_the_model_has_a_limit() -> None:
    """Ranges beyond max_block_tokens are neither exported nor imported."""
    context = load().open_context()
    assert context.max_block_tokens == 4
    context.step([row(0, 0, 1, 2, 3, 4, 5)])
    assert context.range_bytes(0, 1, 5) > 0
    with pytest.raises(StateRejected, match="max_block_tokens"):
        context.range_bytes(0, 0, 5)
    with pytest.raises(StateRejected, match="max_block_tokens"):
        context.import_ranges(1, [RangeImport(0, 5, 5, memoryview(bytes(16 + 5 * 32)))])


def test_a_buffer_of_the_wrong_size_is_refused() -> None:
    """Exports fill their buffer exactly."""
    context = load("checkpoint").open_context()
    context.step([row(0, 0, 1, 2)])
    for size in (context.range_bytes(0, 0, 2) - 1, context.range_bytes(0, 0, 2) + 1):
        with pytest.raises(StateRejected, match="buffer"):
            context.export_ranges(0, [RangeExport(0, 2, memoryview(bytearray(size)))])
    with pytest.raises(StateRejected, match="buffer"):
        context.export_snapshot(0, memoryview(bytearray(context.snapshot_bytes(0) + 1)))


def test_imports_need_free_cells() -> None:
    """State that does not fit into the pool is refused."""
    context = load().open_context()
    context.step([row(1, 0, 1, 2, 3, 4)])
    data = bytearray(context.range_bytes(1, 0, 4))
    context.export_ranges(1, [RangeExport(0, 4, memoryview(data))])
    context.step([row(1, 4, 5)])
    with pytest.raises(StateRejected, match="no cells"):
        context.import_ranges(0, [RangeImport(0, 4, 4, memoryview(data))])
    # As many as are free still fit.
    context.drop(0)
    context.import_ranges(0, [RangeImport(0, 4, 3, memoryview(data))])


def test_each_class_refuses_what_it_cannot_do() -> None:
    """A span model has no snapshots, a whole-state model no ranges."""
    data = memoryview(bytes(100))
    context = load("span").open_context()
    context.step([row(0, 0, 1)])
    for call in (
        lambda: context.snapshot_bytes(0),
        lambda: context.export_snapshot(0, memoryview(bytearray(100))),
        lambda: context.import_snapshot(1, 1, data),
    ):
        with pytest.raises(StateRejected, match="no snapshots"):
            call()
    whole = load("whole").open_context()
    whole.step([row(0, 0, 1)])
    for call in (
        lambda: whole.range_bytes(0, 0, 1),
        lambda: whole.export_ranges(0, [RangeExport(0, 1, memoryview(bytearray(100)))]),
        lambda: whole.import_ranges(1, [RangeImport(0, 1, 1, data)]),
    ):
        with pytest.raises(StateRejected, match="no ranges"):
            call()


def test_whole_state_needs_an_empty_sequence() -> None:
    """A whole state does not go on top of another."""
    context = load("whole").open_context()
    context.step([row(0, 0, 1, 2)])
    data = bytearray(context.snapshot_bytes(0))
    context.export_snapshot(0, memoryview(data))
    with pytest.raises(StateRejected, match="not empty"):
        context.import_snapshot(0, 2, memoryview(data))


def test_a_snapshot_belongs_behind_its_ranges() -> None:
    """A checkpoint snapshot is refused at a length that the ranges do not have."""
    context = load("checkpoint").open_context()
    context.step([row(0, 0, 1, 2)])
    data = bytearray(context.snapshot_bytes(0))
    context.export_snapshot(0, memoryview(data))
    with pytest.raises(StateRejected, match="a snapshot at 2 tokens"):
        context.import_snapshot(1, 2, memoryview(data))


def test_there_is_no_snapshot_between_ranges_and_their_snapshot() -> None:
    """A checkpoint sequence whose state is missing cannot give one."""
    context = load("checkpoint").open_context()
    import_without_snapshot(context)
    with pytest.raises(StateRejected, match="no state"):
        context.snapshot_bytes(0)


# -------------------------------------------------------------------- faults


def test_faults_fire_once_over_all_contexts() -> None:
    """A second context of the model goes on counting where the first one stopped."""
    model = load(faults=StubFaults(fail_step=2))
    first, second = model.open_context(), model.open_context()
    first.step([row(0, 0, 1)])
    with pytest.raises(DecodeFailed) as caught:
        second.step([row(0, 0, 1)])
    assert caught.value.code == Status.COMPUTE_FAILED
    second.drop(0)
    second.step([row(0, 0, 1)])
    first.step([row(0, 1, 1)])


def test_an_export_fails_when_told_to() -> None:
    """The n-th export fails, of ranges or snapshots, and changes nothing."""
    context = load("checkpoint", StubFaults(fail_export=2)).open_context()
    context.step([row(0, 0, 1)])
    data = memoryview(bytearray(context.range_bytes(0, 0, 1)))
    context.export_ranges(0, [RangeExport(0, 1, data)])
    state = memoryview(bytearray(context.snapshot_bytes(0)))
    with pytest.raises(StateRejected, match="injected fault in export 2"):
        context.export_snapshot(0, state)
    context.export_snapshot(0, state)
    context.export_ranges(0, [RangeExport(0, 1, data)])


def test_an_import_fails_when_told_to() -> None:
    """The n-th import fails and leaves its sequence to be dropped."""
    context = load(faults=StubFaults(fail_import=1)).open_context()
    with pytest.raises(StateRejected, match="injected fault in import 1"):
        context.import_ranges(0, [])
    with pytest.raises(DecodeFailed):
        context.step([row(0, 0, 1)])
    context.drop(0)
    context.import_ranges(0, [])


@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
def test_a_short_export_is_refused_on_import(kv_class: str) -> None:
    """An export that came out short has the usual size and is found by the import."""
    context = load(kv_class, StubFaults(short_export=1)).open_context()
    context.step([row(0, 0, 1, 2)])
    if kv_class == "whole":
        data = bytearray(context.snapshot_bytes(0))
        context.export_snapshot(0, memoryview(data))
        with pytest.raises(StateRejected, match="head"):
            context.import_snapshot(1, 2, memoryview(data))
    else:
        data = bytearray(context.range_bytes(0, 0, 2))
        context.export_ranges(0, [RangeExport(0, 2, memoryview(data))])
        with pytest.raises(StateRejected, match="head"):
            context.import_ranges(1, [RangeImport(0, 2, 2, memoryview(data))])


def test_a_model_fails_to_load_when_told_to() -> None:
    """The factory raises what a backend raises, with a reason."""
    with pytest.raises(ModelLoadError) as caught:
        load(faults=StubFaults(fail_load=True))
    assert caught.value.reason == "injected fault"


@pytest.mark.parametrize("name", ["", "test_a_step_hangs_until_its_gate_opens"])
def test_a_step_hangs_until_its_gate_opens(name: str) -> None:
    """A hanging step can be waited for and let go, and computes as if nothing had been."""
    held: HangGate | None = gate(name) if name else None
    model = load(faults=StubFaults(hang_step=2, hang_gate=name))
    if held is not None:
        assert model.gate is held
    marks: list[Mark] = []

    def work() -> None:
        context = model.open_context()
        context.step([row(0, 0, 1)])
        context.step([row(0, 1, 2)])
        marks.append(context.mark(0, None))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert model.gate.wait_reached(60.0)
        assert model.gate.reached
        assert not marks
    finally:
        model.gate.open()
        worker.join(60.0)
    assert marks == [fresh_mark(1, 2)]


# ------------------------------------------------------------ life and thread


def test_a_context_belongs_to_one_thread() -> None:
    """A call from a second thread is an error."""
    context = load().open_context()
    context.drop(0)
    errors: list[BaseException] = []

    def intrude() -> None:
        try:
            context.drop(0)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join(60.0)
    assert len(errors) == 1


def test_a_closed_context_serves_nothing() -> None:
    """close can be called again; everything else is an error."""
    context = load().open_context()
    context.step([row(0, 0, 1)])
    context.close()
    context.close()
    for call in (
        lambda: context.step([]),
        lambda: context.drop(0),
        lambda: context.mark(0, None),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_sequence_that_does_not_exist_is_an_error() -> None:
    """Neither a negative number nor one too large picks some other sequence."""
    context = load().open_context()
    for seq in (-1, 2):
        with pytest.raises(ValueError, match="no sequence"):
            context.drop(seq)


@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
@pytest.mark.parametrize("sleeps", [False, True])
def test_a_step_that_hangs_or_sleeps_can_be_aborted(kv_class: str, sleeps: bool) -> None:
    """Abort ends it with a status of its own; the next step computes what it would have."""
    options = StubOptions(
        kv_class=kv_class,  # type: ignore[arg-type]
        prefill_us_per_token=1e9 if sleeps else 0.0,
        faults=StubFaults() if sleeps else StubFaults(hang_step=2),
    )
    model = open_model(
        BackendRequest(model_path=None, options=options, context=ContextOptions(n_seq_max=2))
    )
    context = model.open_context()
    context.step([row(0, 0, 1)])
    ended = threading.Event()

    def abort() -> None:
        if not sleeps:
            assert model.gate.wait_reached(60.0)
        while not ended.wait(0.001):  # whether the step has begun to sleep cannot be seen
            context.abort()

    aborting = threading.Thread(target=abort)
    aborting.start()
    with pytest.raises(DecodeAborted) as caught:
        context.step([row(0, 1, 2, 3)])
    ended.set()
    aborting.join()
    assert caught.value.code == Status.ABORTED
    context.drop(0)
    for token in (1, 2, 3):
        context.step([row(0, context.length(0), token)])
    plain = load(kv_class).open_context()
    plain.step([row(0, 0, 1, 2, 3)])
    assert context.mark(0, None) == plain.mark(0, None)


def test_a_deaf_step_hangs_on() -> None:
    """A step that does not hear of abort ends when its gate opens, and then as aborted."""
    model = load(faults=StubFaults(hang_step=1, hang_deaf=True))
    outcomes: list[str] = []

    def work() -> None:
        try:
            model_context.append(model.open_context())
            model_context[0].step([row(0, 0, 1)])
        except DecodeAborted:
            outcomes.append("aborted")

    model_context: list[StubContext] = []
    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert model.gate.wait_reached(60.0)
        model_context[0].abort()
        assert worker.is_alive()
        assert not outcomes
    finally:
        model.gate.open()
        worker.join(60.0)
    assert outcomes == ["aborted"]

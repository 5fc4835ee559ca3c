"""Requests that share a context: whatever happens to others, each says what it says alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import gate
from erllama_core import Completion, Engine, Model, Stream
from erllama_core.errors import (
    DecodeTimeout,
    EngineReset,
    NoSession,
    SeqCapacity,
    StickyBusy,
    TierError,
    TimeoutExceeded,
    TranscriptMismatch,
)
from erllama_core.interfaces.backend import RangeImport
from erllama_tier_disk.store import FileTier
from stub_engine import KV_CLASSES, load_stub, make_engine

SHARED = "You are a patient assistant who answers in short sentences and never guesses. " * 2
CELLS = (True, False)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


def cold(tokens: Any, kv_class: str = "span", **options: Any) -> Completion:
    with make_engine() as engine:
        model = load_stub(engine, tier=[], kv_class=kv_class, context_opts={"n_ctx": 4096})
        return model.complete(tokens, **options)


def same_as_alone(done: Completion, kv_class: str) -> None:
    """The reply is that of an engine which computes the very same tokens, and nothing else."""
    prompt = done.context_tokens[: done.stats.prompt_tokens]
    alone = cold(prompt, kv_class, response_tokens=len(done.generated))
    assert done.generated == alone.generated
    assert done.committed_tokens == len(done.context_tokens)


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_agents_with_one_prefix_prefill_it_once(
    engine: Engine, kv_class: str, unified: bool
) -> None:
    """Of prompts that arrive together, what they share is computed by one of them."""
    held = gate(f"agents-{kv_class}-{unified}")
    model = load_stub(
        engine,
        kv_class=kv_class,
        tier=[],
        context_opts={"n_ctx": 2048, "n_seq_max": 5, "kv_unified": unified},
        policy={"prefill_chunk_size": 32},
        faults={"hang_step": 1, "hang_gate": f"agents-{kv_class}-{unified}"},
    )
    first = model.infer("x", response_tokens=1)
    assert held.wait_reached(10)
    streams = [model.infer(f"{SHARED}{n} is who?", response_tokens=6) for n in range(4)]
    held.open()
    first.result()
    done = [stream.result() for stream in streams]
    for one in done:
        same_as_alone(one, kv_class)
    if kv_class != "whole":
        assert [one.cache_delta.read for one in done].count(0) == 1
        assert sum(one.cache_delta.read >= len(SHARED) for one in done) == 3


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_stored_prefix_is_brought_into_cells_once(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests at once that read the same share its cells, whichever of them imports it."""
    imported: list[int] = []
    plain = StubContext.import_ranges

    def counting(self: StubContext, seq: int, ranges: Sequence[RangeImport]) -> None:
        imported.extend(item.stop - item.start for item in ranges)
        plain(self, seq, ranges)

    monkeypatch.setattr(StubContext, "import_ranges", counting)
    prompts = [f"{SHARED}{n} is who?" for n in range(4)]
    with make_engine(tmp_path) as engine:
        model = load_stub(engine, tier=[tier], context_opts={"n_seq_max": 4})
        first = [model.complete(prompt, response_tokens=6) for prompt in prompts]
        engine.flush()
        name = f"stored-{tier}"
        held = gate(name)
        again = load_stub(
            engine,
            "again",
            tier=[tier],
            # One that has ended already when another one's state arrives still has its cells.
            context_opts={"n_seq_max": 5, "resident_cells_max": 1024},
            faults={"hang_step": 1, "hang_gate": name},
        )
        other = again.infer("x", response_tokens=1)
        assert held.wait_reached(10)
        imported.clear()
        streams = [again.infer(prompt, response_tokens=6) for prompt in prompts]
        held.open()
        other.result()
        done = [stream.result() for stream in streams]
    assert [one.generated for one in done] == [one.generated for one in first]
    assert {one.cache_hit_kind for one in done} == {"exact"}
    whole = len(SHARED) // 32 * 32
    assert whole < sum(imported) < whole + 5 * 64, "the prefix, and each one's own end"


@pytest.mark.parametrize("end", ["cancel", "fail"])
@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
def test_followers_outlive_their_leader(engine: Engine, kv_class: str, end: str) -> None:
    """Who waited for a prefix that another computed carries on from what there is of it."""
    name = f"leader-{kv_class}-{end}"
    held = gate(name)
    faults: dict[str, Any] = {"hang_step": 3, "hang_gate": name}
    if end == "fail":
        faults |= {"fail_step": 4}
    model = load_stub(
        engine,
        kv_class=kv_class,
        tier=[],
        context_opts={"n_ctx": 2048, "n_seq_max": 3},
        policy={"prefill_chunk_size": 16},
        faults=faults,
    )
    leader = model.infer(SHARED + "first", response_tokens=4)
    assert held.wait_reached(10)
    others = [model.infer(f"{SHARED}{n}nd", response_tokens=4) for n in (2, 3)]
    if end == "cancel":
        leader.cancel()
    held.open()
    if end == "cancel":
        assert leader.result().finish_reason == "cancelled"
    else:
        with pytest.raises(Exception, match="status"):
            leader.result()
    for stream in others:
        same_as_alone(stream.result(), kv_class)
    assert model.info().available_seqs == 3


@pytest.mark.parametrize("tier", [["ram"], []])
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_preempted_request_goes_on_where_it_was(
    engine: Engine, kv_class: str, tier: list[str]
) -> None:
    """When cells run short requests give way in turn, and say the same, saved or not."""
    model = load_stub(
        engine, kv_class=kv_class, tier=tier, context_opts={"n_ctx": 256, "n_seq_max": 4}
    )
    prompts = [f"{n} bottles stand on the wall of the house" for n in range(4)]
    streams = [model.infer(prompt, response_tokens=150) for prompt in prompts]
    done = [stream.result() for stream in streams]
    for one in done:
        assert len(one.generated) == 150
        same_as_alone(one, kv_class)
    assert model.info().preemptions > 0
    assert (model.info().available_seqs, model.pending_len()) == (4, 0)


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_session_goes_on_in_its_cells(engine: Engine, kv_class: str, unified: bool) -> None:
    """The next turn reads the last one whole, and other callers change nothing."""
    model = load_stub(
        engine, kv_class=kv_class, context_opts={"n_seq_max": 2, "kv_unified": unified}
    )
    first = model.complete(SHARED, session_id="a", response_tokens=9)
    assert first.cache_hit_kind == "cold"
    model.complete("somebody else", response_tokens=5)
    assert model.info().pinned_idle_seqs == 1
    second = model.complete([*first.context_tokens, 65, 66], session_id="a", response_tokens=9)
    assert (second.cache_hit_kind, second.cache_delta.read) == ("sticky", first.committed_tokens)
    same_as_alone(second, kv_class)
    third = model.continue_session([67], session_id="a", response_tokens=9).result()
    assert third.cache_hit_kind == "continuation"
    assert third.cache_delta.read == second.committed_tokens
    assert third.cache_delta.created == 1 + 9
    assert third.context_tokens[: second.committed_tokens] == second.context_tokens
    same_as_alone(third, kv_class)
    model.end_session("a")
    model.end_session("a")
    with pytest.raises(NoSession):
        model.continue_session([], session_id="a")
    engine.flush()
    assert model.info().pinned_idle_seqs == 0


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_an_empty_suffix_generates_from_where_the_session_is(engine: Engine, kv_class: str) -> None:
    """What is said next is what would have been said."""
    model = load_stub(engine, kv_class=kv_class)
    first = model.complete(SHARED, session_id=1, response_tokens=5)
    more = model.continue_session([], session_id=1, response_tokens=7).result()
    whole = cold(SHARED, kv_class, response_tokens=12)
    assert first.generated + more.generated == whole.generated


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_prompt_that_leaves_the_session_is_served_like_any_other(
    engine: Engine, kv_class: str
) -> None:
    """The common part may be reused, and the session goes on from the new prompt."""
    model = load_stub(engine, kv_class=kv_class, context_opts={"n_seq_max": 1})
    model.complete(SHARED + "one", session_id="s", response_tokens=5)
    other = model.complete(SHARED + "two", session_id="s", response_tokens=5)
    assert other.cache_hit_kind in {"partial", "cold"}
    same_as_alone(other, kv_class)
    longer = model.complete([*other.context_tokens, 70], session_id="s", response_tokens=5)
    assert longer.cache_hit_kind == "sticky"
    same_as_alone(longer, kv_class)


def test_what_a_caller_believes_of_a_session_is_checked(engine: Engine) -> None:
    """Other tokens than expected are told apart, by where they differ."""
    model = load_stub(engine)
    first = model.complete(SHARED, session_id="s", response_tokens=4)
    tokens = list(first.context_tokens)
    done = model.continue_session(
        [65], session_id="s", expect_committed=tokens, response_tokens=2
    ).result()
    assert done.cache_hit_kind == "continuation"
    with pytest.raises(TranscriptMismatch) as caught:
        model.continue_session([65], session_id="s", expect_committed=tokens)
    assert caught.value.stored_len == done.committed_tokens
    assert (caught.value.expected_len, caught.value.diverge_at) == (len(tokens), len(tokens))
    with pytest.raises(NoSession):
        model.continue_session([65], session_id="s", cache_salt="other")


def test_a_session_has_one_request_at_a_time(engine: Engine) -> None:
    """A second one is refused while the first runs, and welcome at once when it has ended."""
    held = gate("busy")
    model = load_stub(engine, faults={"hang_step": 2, "hang_gate": "busy"})
    stream = model.infer(SHARED, session_id="s", response_tokens=8)
    assert held.wait_reached(10)
    with pytest.raises(StickyBusy):
        model.complete(SHARED, session_id="s")
    with pytest.raises(StickyBusy):
        model.continue_session([], session_id="s")
    held.open()
    first = stream.result()
    for _ in range(20):
        first = model.complete([*first.context_tokens, 65], session_id="s", response_tokens=2)
        assert first.cache_hit_kind == "sticky"


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_idle_sessions_make_room_and_come_back(engine: Engine, kv_class: str) -> None:
    """More sessions than sequences: the one that lost its own goes on by restore."""
    model = load_stub(engine, kv_class=kv_class, context_opts={"n_seq_max": 2})
    turns = {n: model.complete(f"{n}: {SHARED}", session_id=n, response_tokens=4) for n in range(4)}
    engine.flush()
    for n, turn in turns.items():
        again = model.complete([*turn.context_tokens, 65], session_id=n, response_tokens=4)
        assert again.cache_delta.read == turn.committed_tokens
        same_as_alone(again, kv_class)
    assert model.info().pinned_idle_seqs == 2


def test_a_reset_session_is_gone_with_its_request(engine: Engine) -> None:
    """Its caller is told, and nothing of it is sticky any more."""
    held = gate("reset")
    model = load_stub(engine, tier=[], faults={"hang_step": 3, "hang_gate": "reset"})
    stream = model.infer(SHARED, session_id="s", response_tokens=50)
    assert held.wait_reached(10)
    answers: list[bool] = []
    resetting = threading.Thread(target=lambda: answers.append(model.reset_session("s")))
    resetting.start()
    held.open()
    resetting.join(10)
    assert answers == [True]
    with pytest.raises(EngineReset):
        stream.result()
    assert not model.reset_session("s")
    again = model.complete(SHARED, session_id="s", response_tokens=2)
    assert again.cache_hit_kind == "cold"


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_reset_right_behind_an_answer_ends_nobody_else(engine: Engine, kv_class: str) -> None:
    """A turn that was answered, and whose last token is still to be computed, may be reset."""
    held = gate(f"behind-{kv_class}")
    model = load_stub(
        engine, kv_class=kv_class, faults={"hang_step": 3, "hang_gate": f"behind-{kv_class}"}
    )
    first = model.complete(SHARED, session_id="s", response_tokens=1)  # steps: prompt, reply
    turn = [*first.context_tokens, 65]
    stream = model.infer(turn, session_id="s", response_tokens=1)
    assert held.wait_reached(10)
    resetting = threading.Thread(target=model.reset_session, args=("s",))
    resetting.start()
    while not _is_gone(model, "s"):  # it is asked for while the step runs that ends the turn
        resetting.join(0.001)
    held.open()
    assert len(stream.result().generated) == 1
    resetting.join(10)
    assert not resetting.is_alive()
    same_as_alone(model.complete(turn, session_id="s", response_tokens=4), kv_class)
    assert model.settle(10)
    assert model.info().available_seqs == 2


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_first_turn_that_is_reset_right_behind_its_answer_leaves_nothing(
    engine: Engine, kv_class: str
) -> None:
    """What a session held is dropped, also where it was not the session's sequence yet."""
    name = f"first-{kv_class}"
    held = gate(name)
    model = load_stub(
        engine,
        tier=[],
        kv_class=kv_class,
        context_opts={"resident_cells_max": 1024},
        faults={"hang_step": 2, "hang_gate": name},
    )
    first = model.infer(SHARED, session_id="s", response_tokens=1)  # steps: prompt, reply
    assert len(first.result().generated) == 1
    assert held.wait_reached(10)
    resetting = threading.Thread(target=model.reset_session, args=("s",))
    resetting.start()
    while not _is_gone(model, "s"):
        resetting.join(0.001)
    held.open()
    resetting.join(10)
    assert model.settle(10)
    assert (model.info().available_seqs, model.info().pinned_idle_seqs) == (2, 0)
    again = model.complete(SHARED, session_id="s", response_tokens=4)
    assert again.cache_hit_kind == "cold"


def _is_gone(model: Model, session_id: str) -> bool:
    try:
        model.continue_session([], session_id=session_id)
    except StickyBusy:
        return False
    except NoSession:
        return True
    raise AssertionError("a turn began that should not have")


def test_who_follows_a_request_that_is_respelt_gets_its_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader that goes on with other tokens of its text is followed as far as both agree."""
    system = "<|im_start|>system\n" + "a" * 80 + "<|im_end|>"
    asked = "nothing in the thing " * 4
    options: dict[str, Any] = {
        "tier": ["ram", "disk"],
        "digraphs": True,
        "context_opts": {"n_ctx": 4096, "n_seq_max": 3},
    }
    with make_engine(tmp_path) as engine:
        load_stub(engine, **options).complete(system, response_tokens=1)
    reached, go_on = threading.Event(), threading.Event()
    read = FileTier.read

    def first_read_fails(*arguments: Any) -> memoryview:
        if threading.current_thread().name.startswith("erllama") and not reached.is_set():
            reached.set()
            assert go_on.wait(20)
            raise TierError("a bad sector")
        return read(*arguments)

    with capture_logs(), make_engine(tmp_path) as engine:
        model = load_stub(engine, **options)
        assert engine.cache.wait_scanned(10)
        monkeypatch.setattr(FileTier, "read", first_read_fails)
        text = system + asked + "<|im_end|>"
        leader = model.infer(text, response_tokens=8)
        assert reached.wait(10)
        canonical = list(model.tokenize(text))
        follower = model.infer([*canonical, 66], response_tokens=20)  # ids are not respelt
        spelt = [*model.tokenize(system), *asked.encode()]
        model.complete(spelt, response_tokens=1)
        model.complete([*spelt, 260], response_tokens=1)
        assert model.phase() == "prefilling", "the leader is loading, and is followed"
        go_on.set()
        respelt, done = leader.result(), follower.result()
        assert respelt.context_tokens[: len(spelt)] == tuple(spelt), "it was respelt"
        assert done.context_tokens[: len(canonical)] == tuple(canonical)
    with make_engine() as engine:
        alone = load_stub(engine, **{**options, "tier": []})
        assert done.generated == alone.complete([*canonical, 66], response_tokens=20).generated


def test_a_full_model_can_say_so(engine: Engine) -> None:
    """``on_full="error"`` raises from the call; the others are served."""
    held = gate("full")
    model = load_stub(
        engine, context_opts={"n_seq_max": 1}, faults={"hang_step": 1, "hang_gate": "full"}
    )
    stream = model.infer("running", response_tokens=3)
    assert held.wait_reached(10)
    waiting = model.infer("waiting", response_tokens=3)
    with pytest.raises(SeqCapacity):
        model.infer("no", on_full="error")
    assert (engine.queue_depth(), engine.queue_depth("stub")) == (2, 2)
    held.open()
    assert len(stream.result().generated) == len(waiting.result().generated) == 3
    assert model.complete("now", on_full="error", response_tokens=1).generated
    assert engine.queue_depth() == engine.queue_depth("unknown") == 0


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_request_that_takes_too_long_tells_what_it_has(engine: Engine, kv_class: str) -> None:
    """TimeoutExceeded carries the partial completion; the sequence is free for the next."""
    model = load_stub(engine, kv_class=kv_class, context_opts={"n_seq_max": 1}, decode_us=2000)
    with pytest.raises(TimeoutExceeded) as caught:
        model.complete(SHARED, timeout_s=0.2, response_tokens=700)
    partial = caught.value.partial
    assert partial is not None
    assert partial.generated
    assert isinstance(caught.value, TimeoutError)
    alone = cold(SHARED, kv_class, response_tokens=len(partial.generated))
    assert partial.generated == alone.generated
    with pytest.raises(TimeoutExceeded):
        model.complete("at once", timeout_s=0)
    assert model.complete("next", response_tokens=2).generated


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_step_over_its_budget_is_aborted(engine: Engine, kv_class: str) -> None:
    """Its requests are told; one that waits is served, and so is the next."""
    gate(f"budget-{kv_class}")
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_seq_max": 1, "decode_budget_ms": 100},
        faults={"hang_step": 3, "hang_gate": f"budget-{kv_class}"},
    )
    stream = model.infer(SHARED, response_tokens=30)
    waiting = model.infer("waiting", response_tokens=3)
    with pytest.raises(DecodeTimeout):
        stream.result()
    same_as_alone(waiting.result(), kv_class)
    same_as_alone(model.complete(SHARED, response_tokens=5), kv_class)


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_step_that_never_ends_is_left_behind(engine: Engine, kv_class: str) -> None:
    """Its caller is told, a waiting one is served by a new context, and closing is not held up."""
    held = gate(f"never-{kv_class}")
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_seq_max": 1, "decode_budget_ms": 100},
        faults={"hang_step": 3, "hang_gate": f"never-{kv_class}", "hang_deaf": True},
    )
    stream = model.infer(SHARED, session_id="s", response_tokens=30)
    assert held.wait_reached(10)
    waiting = model.infer("waiting", response_tokens=3)
    with pytest.raises(DecodeTimeout):
        stream.result()
    same_as_alone(waiting.result(), kv_class)
    again = model.complete(SHARED, session_id="s", response_tokens=5)
    same_as_alone(again, kv_class)
    assert model.info().quarantined_contexts == 1
    model.unload()
    held.open()


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_prefill_only_computes_and_saves(engine: Engine, kv_class: str) -> None:
    """The prompt alone; a second time it is an exact hit, and a longer one goes on from it."""
    model = load_stub(engine, kv_class=kv_class)
    warm = model.prefill_only(SHARED)
    assert (warm.cache_hit_kind, warm.committed_tokens) == ("cold", len(SHARED))
    assert warm.finish_key is not None
    assert warm.cache_delta.created == len(SHARED)
    engine.flush()
    assert model.prefill_only(SHARED).cache_hit_kind == "exact"
    longer = model.prefill_only(SHARED + "more", parent_key=warm.finish_key)
    assert (longer.cache_hit_kind, longer.cache_delta.read) == ("partial", len(SHARED))
    done = model.complete(SHARED, response_tokens=5)
    assert done.cache_hit_kind == "exact"
    same_as_alone(done, kv_class)
    assert model.prefill_only("short").finish_key is None


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_prefill_can_be_pinned(engine: Engine, kv_class: str) -> None:
    """What is pinned stays when everything else goes, and is an exact hit afterwards."""
    model = load_stub(engine, kv_class=kv_class)
    warm = model.prefill_only(SHARED, pin=True)
    assert warm.is_pinned
    assert warm.finish_key is not None
    model.complete("Something else entirely, which is not pinned. " * 3, response_tokens=5)
    engine.flush()
    engine.cache.gc()
    done = model.complete(SHARED, response_tokens=5)
    assert (done.cache_hit_kind, done.cache_delta.read) == ("exact", len(SHARED))
    same_as_alone(done, kv_class)
    engine.cache.unpin(warm.finish_key)
    engine.flush()
    engine.cache.gc()
    assert model.prefill_only(SHARED).cache_hit_kind == "cold"


def test_what_is_not_saved_is_not_pinned(engine: Engine) -> None:
    """A prompt that is too short, or that no tier takes, is computed, and not pinned."""
    model = load_stub(engine)
    assert not model.prefill_only("short", pin=True).is_pinned
    nowhere = load_stub(engine, "nowhere", tier=[])
    assert not nowhere.prefill_only(SHARED, pin=True).is_pinned


def test_a_request_is_cancelled_by_its_id(engine: Engine) -> None:
    """Whoever has the id can end the request; one that is over, or unknown, is a no-op."""
    held = gate("cancel by id")
    model = load_stub(engine, faults={"hang_step": 3, "hang_gate": "cancel by id"})
    stream = model.infer(SHARED, response_tokens=800)
    assert held.wait_reached(10)
    engine.cancel(stream.request_id)
    engine.cancel(stream.request_id)
    held.open()
    done = stream.result()
    assert done.stats.cancelled
    assert len(done.generated) < 800
    engine.cancel(stream.request_id)
    engine.cancel(1 << 40)
    engine.cancel(stream)


@pytest.mark.parametrize("kv_class", KV_CLASSES)
@pytest.mark.parametrize("salt", [None, "other"])
def test_residents_serve_who_goes_on_from_them(
    engine: Engine, kv_class: str, salt: str | None
) -> None:
    """What a finished context has in its cells is shared with the same salt, and no other."""
    model = load_stub(
        engine, kv_class=kv_class, tier=[], context_opts={"n_ctx": 4096, "resident_cells_max": 999}
    )
    first = model.complete(SHARED, response_tokens=5)
    more = [*first.context_tokens, 65]
    again = model.complete(more, response_tokens=5, cache_salt=salt)
    assert again.cache_delta.read == (0 if salt else first.committed_tokens)
    same_as_alone(again, kv_class)


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("n_seq_max", [1, 2])
def test_residents_are_bounded(engine: Engine, unified: bool, n_seq_max: int) -> None:
    """With no cells to hold on to, finished contexts come back from the tiers."""
    options: dict[str, Any] = {"n_seq_max": n_seq_max, "kv_unified": unified}
    model = load_stub(engine, context_opts={**options, "resident_cells_max": 0})
    model.complete(SHARED, response_tokens=5)
    engine.flush()  # until then its state comes from a save buffer, or from both
    again = model.complete(SHARED, response_tokens=5, explain=True)
    assert again.stats.explain is not None
    assert again.stats.explain.tiers == ("ram",)


def test_cancelled_streams_leave_nothing_behind(engine: Engine) -> None:
    """However many are dropped, and in whatever phase, sequences come back."""
    model = load_stub(engine, context_opts={"n_seq_max": 3}, policy={"prefill_chunk_size": 16})
    streams: list[Stream] = []
    for n in range(60):
        streams.append(
            model.infer(f"{SHARED}{n % 7}", response_tokens=20, session_id=n % 5 or None)
            if n % 5 == 0
            else model.infer(f"{n}{SHARED}", response_tokens=20)
        )
        if n % 3:
            streams[n // 2].cancel()
    for stream in streams:
        done = stream.result()
        assert done.committed_tokens == len(done.context_tokens)
    assert model.complete("end", response_tokens=1).generated
    assert model.settle(10)
    assert model.info().available_seqs == 3


def load_many(model: Model, errors: list[Exception], seed: int) -> None:
    chance = random.Random(seed)
    prompts = [SHARED[: chance.randint(1, 150)] for _ in range(3)]
    for turn in range(25):
        options: dict[str, Any] = {"response_tokens": chance.randint(1, 30)}
        if chance.random() < 0.3:
            options["session_id"] = seed
        if chance.random() < 0.2:
            options["timeout_s"] = chance.choice([0.0, 0.01, 5.0])
        if chance.random() < 0.2:
            options["cache_salt"] = str(seed % 2)
        stream = model.infer(chance.choice(prompts) + str(turn % 3), **options)
        if chance.random() < 0.2:
            stream.cancel()
        try:
            done = stream.result()
        except TimeoutExceeded:
            continue
        except Exception as error:  # noqa: BLE001 - told by the test's own thread
            errors.append(error)
            return
        prompt = done.context_tokens[: done.stats.prompt_tokens]
        if len(done.generated) and done.finish_reason != "cancelled":
            alone = REFERENCE.setdefault(prompt, {})
            expected = alone.get("reply", ())
            shorter = min(len(expected), len(done.generated))
            if expected[:shorter] != done.generated[:shorter]:
                errors.append(AssertionError(f"{seed}.{turn} differs"))
            if len(done.generated) > len(expected):
                alone["reply"] = done.generated


REFERENCE: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_many_callers_with_little_room(engine: Engine, kv_class: str, unified: bool) -> None:
    """Sessions, salts, cancels and timeouts over too few cells: one answer each, and the right."""
    REFERENCE.clear()
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={
            "n_ctx": 320,
            "n_seq_max": 4,
            "n_batch": 96,
            "kv_unified": unified,
            "resident_cells_max": 100,
        },
        policy={"prefill_chunk_size": 32},
    )
    errors: list[Exception] = []
    callers = [
        threading.Thread(target=load_many, args=(model, errors, seed), daemon=True)
        for seed in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive(), "a caller never got its answer"
    assert not errors
    with make_engine() as quiet:  # without a tier and without residents, each is computed anew
        alone = load_stub(quiet, tier=[], kv_class=kv_class, context_opts={"n_ctx": 4096})
        for prompt, known in REFERENCE.items():
            reply = known["reply"]
            done = alone.complete(prompt, response_tokens=len(reply))
            assert (done.cache_hit_kind, done.generated) == ("cold", reply)
    assert model.settle(10)
    assert (model.info().available_seqs, model.pending_len()) == (4, 0)
    assert engine.cache.counters().state_rejected == 0

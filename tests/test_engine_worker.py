"""The worker's corners, one by one: each of these went wrong once, or might."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import gate
from erllama_backend_stub.model import StubModel
from erllama_core import Completion, Done, Engine, Model, Prompt, Stream
from erllama_core.errors import (
    DecodeAborted,
    DecodeTimeout,
    EngineClosed,
    EngineReset,
    ModelLoadError,
    PluginFailed,
    TimeoutExceeded,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.stream import Channel, ProcessorRequest
from erllama_core.model import admission
from erllama_core.model.options import RequestOptions
from erllama_core.model.request import Phase, Request
from erllama_core.model.roster import Roster
from erllama_core.model.sequences import LiveSequence
from erllama_core.model.watch import Abandoned, StepWatch
from erllama_core.providers import StreamProcessorProvider
from held_tier import HeldTier, engine_with
from stepped import Hand, by_hand
from stub_alone import alone
from stub_engine import KV_CLASSES, load_stub, make_engine

LONG = "Somewhere beyond the hills there is a town in which all clocks show another time. "


@pytest.fixture
def engine() -> Iterator[Engine]:
    with by_hand(), make_engine() as made:
        yield made


def load(engine: Engine, **options: Any) -> tuple[Model, Hand]:
    model = load_stub(engine, **options)
    return model, Hand(model)


def ends(stream: Stream) -> list[Any]:
    """Whatever ended a stream that nobody reads at the moment; there must be one such thing."""
    found: list[Any] = []
    items = stream._events._items
    for _ in range(items.qsize()):  # once around, which leaves them as they were
        items.put(item := items.get_nowait())
        found.append(item)
    return [item for item in found if isinstance(item, Done | Exception)]


def told(stream: Stream) -> Completion:
    """What a request came to, which must have been told by now."""
    assert stream._stats or stream._error or ends(stream), "it was never answered"
    return stream.result()


def generated(hand: Hand, stream: Stream) -> int:
    [request] = [r for r in hand.worker._unfinished if r.id == stream.request_id]
    return len(request.generated)


# --------------------------------------------------------------------------- news


def test_news_is_heard_between_any_two_tokens(engine: Engine) -> None:
    """Also without a stall target a reply does not keep the worker from its inbox."""
    model, hand = load(engine, policy={"stall_target_ms": 0})
    first = model.infer(LONG, response_tokens=400)
    hand.until(lambda: generated(hand, first) > 3)
    second = model.infer("a second one", response_tokens=2)
    hand.turns_of(8)
    assert len(told(second).generated) == 2
    model.unload()
    with pytest.raises(EngineClosed):
        told(first)


def test_who_waits_is_counted_while_a_step_runs() -> None:
    """``pending_len`` does not depend on when the worker looks into its inbox."""
    held = gate("pending")
    with make_engine() as engine:
        model = load_stub(
            engine,
            context_opts={"n_seq_max": 1},
            faults={"hang_step": 2, "hang_gate": "pending"},
        )
        running = model.infer(LONG, response_tokens=3)
        assert held.wait_reached(10)
        waiting = [model.infer(LONG, response_tokens=1) for _ in range(2)]
        assert (engine.pending_len("stub"), engine.queue_depth("stub")) == (2, 3)
        held.open()
        for stream in (running, *waiting):
            stream.result()
        assert model.pending_len() == model.queue_depth() == 0
        assert not model.cancel(running.request_id)


def test_a_look_at_a_sequence_that_changes_hands() -> None:
    """Any thread may ask whether a sequence is idle while its request leaves it."""

    class Changing(LiveSequence):
        looks = 0

        @property
        def request(self) -> Any:
            self.looks += 1
            return type("One", (), {"phase": Phase.ENDED}) if self.looks == 1 else None

        @request.setter
        def request(self, _: Any) -> None:
            self.looks = 0

    assert Changing(0).is_idle
    assert Changing(0).is_resident


# ------------------------------------------------------------- contexts that are lost


def test_what_was_asked_of_a_context_that_hangs_is_done_by_the_next_one() -> None:
    """Messages that wait for a step that never ends reach its successor, and touch only that."""
    held = gate("asked")
    with capture_logs() as logs, make_engine() as engine:
        model = load_stub(
            engine,
            context_opts={"n_seq_max": 2, "decode_budget_ms": 50, "resident_cells_max": 999},
            faults={"hang_step": 6, "hang_gate": "asked", "hang_deaf": True},
        )
        for session in ("one", "two"):
            model.complete(f"{session} {LONG}", session_id=session, response_tokens=1)
        stream = model.infer("x", response_tokens=20, session_id="one")
        assert held.wait_reached(10)
        answers: list[Any] = []
        calls: list[Callable[[], Any]] = [
            model.settle,
            lambda: model.reset_session("two"),
            model._worker.save_live,
        ]
        threads = [threading.Thread(target=lambda c=call: answers.append(c())) for call in calls]
        for thread in threads:
            thread.start()
        model._worker.drop_residents()
        model.end_session("one")
        queued = model.infer("queued", response_tokens=3)
        with pytest.raises(DecodeTimeout):
            stream.result()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert answers == [True, True, True]
        assert len(queued.result().generated) == 3
        assert model.complete(LONG, response_tokens=2).generated
        assert not [entry for entry in logs if entry["event"] == "context.lost"]
        model.unload()
        held.open()


@pytest.mark.parametrize("in_inbox", [True, False])
def test_who_waits_when_a_context_is_given_up_is_served(engine: Engine, *, in_inbox: bool) -> None:
    """Whether the worker had taken note of it already or not."""
    model, hand = load(engine, context_opts={"n_seq_max": 1})
    with capture_logs():
        running = model.infer(LONG, response_tokens=9)
        waiting = [model.infer("waits", response_tokens=3)]
        hand.until(lambda: generated(hand, running) > 2)
        if in_inbox:
            waiting.append(model.infer("came later", response_tokens=3))
        hand.faults.in_step = hand.give_up
        hand.turns()
    with pytest.raises(DecodeTimeout):
        told(running)
    assert [len(told(stream).generated) for stream in waiting] == [3] * len(waiting)
    assert model._worker.quarantined == 1
    hand.checks()


def test_what_a_lost_context_was_to_save_keeps_nobody_waiting(engine: Engine) -> None:
    """``settle`` waits for a request's last token, and not for one that never comes."""
    model, hand = load(engine)
    stream = model.infer(LONG, response_tokens=3)
    hand.until(lambda: bool(ends(stream)))
    settled = threading.Event()
    hand.runner.inbox.post(lambda runner: runner.wait_settled(settled))
    hand.faults.in_step = hand.give_up
    with capture_logs():
        hand.turn()
    assert settled.is_set()
    assert [type(end) for end in ends(stream)] == [Done]


@pytest.mark.parametrize("ended", [True, False])
def test_a_session_of_a_context_that_is_gone_has_no_cells_there(
    engine: Engine, *, ended: bool
) -> None:
    """A turn that waits goes on in the new context, also of a session that was ended meanwhile."""
    model, hand = load(engine, context_opts={"n_seq_max": 2})
    first = model.infer(LONG, session_id="s", response_tokens=2)
    hand.turns()
    turn = [*told(first).context_tokens, 65]
    other = model.infer("somebody else", response_tokens=9)
    seconds: list[Stream] = []

    def hang() -> None:
        assert model.info().pinned_idle_seqs == 1
        seconds.append(model.infer(turn, session_id="s", response_tokens=3))
        if ended:
            hand.worker._sessions.remove("s")  # what its end does first, on another thread
        hand.give_up()

    hand.turns_of(2)
    hand.faults.in_step = hang
    with capture_logs():
        hand.turns()
    assert [type(end) for end in ends(other)] == [DecodeTimeout]
    assert told(seconds[0]).generated == alone("span", turn, 3)
    hand.checks()


def test_closing_when_no_new_context_could_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that never ends: everybody is answered, and nobody waits for its thread."""
    held = gate("no successor")
    plain, opened = StubModel.open_context, 0

    def once(self: StubModel) -> StubContext:
        nonlocal opened
        opened += 1
        if opened > 1:
            raise ModelLoadError("no memory is left")
        return plain(self)

    monkeypatch.setattr(StubModel, "open_context", once)
    engine = make_engine()
    with capture_logs():
        model = load_stub(
            engine,
            context_opts={"n_seq_max": 1, "decode_budget_ms": 50},
            faults={"hang_step": 2, "hang_gate": "no successor", "hang_deaf": True},
        )
        running, waiting = (model.infer(LONG, response_tokens=9) for _ in range(2))
        settled = threading.Thread(target=model.settle)
        assert held.wait_reached(10)
        settled.start()
        with pytest.raises(DecodeTimeout):
            running.result()
        with pytest.raises(ModelLoadError):
            waiting.result()
        settled.join(10)
        assert not settled.is_alive()
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
        held.open()


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_context_that_raises_where_it_must_not_is_replaced(engine: Engine, kv_class: str) -> None:
    """Those whose state it held are told, those who wait and those who come are served."""
    model, hand = load(engine, kv_class=kv_class, context_opts={"n_ctx": 256, "n_seq_max": 3})
    with capture_logs() as logs:
        prompts = [f"{n} bottles stand on the wall of the house" for n in range(3)]
        streams = [model.infer(prompt, response_tokens=150) for prompt in prompts]
        hand.until(lambda: generated(hand, streams[1]) > 3)
        _break_once(hand.context, "drop")  # which is next called to take somebody's cells
        hand.turns()
        answers = [ends(stream) for stream in streams]
        assert [len(each) for each in answers] == [1, 1, 1]
        failed = [each[0] for each in answers if isinstance(each[0], Exception)]
        assert 0 < len(failed) < 3
        assert {type(error) for error in failed} == {PluginFailed}
        last = model.infer(LONG, response_tokens=3)
        hand.turns()
    assert told(last).generated == alone(kv_class, LONG, 3)
    assert [entry["event"] for entry in logs].count("context.lost") == 1
    hand.checks()


def test_a_context_that_never_worked_is_not_replaced_for_ever(engine: Engine) -> None:
    """A model whose contexts fail before they computed anything closes, and says why."""
    model, hand = load(engine)
    with capture_logs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(hand.runner.stepper), "step", _careless)
        streams = [model.infer(LONG, response_tokens=3) for _ in range(3)]
        hand.turns()
        for stream in streams:
            with pytest.raises(PluginFailed):
                told(stream)
        with pytest.raises(EngineClosed):
            model.infer(LONG)


def _careless(*_: Any) -> Any:
    raise RuntimeError("careless")


def _break_once(context: StubContext, what: str) -> None:
    def broken(*_: Any) -> Any:
        delattr(context, what)
        raise RuntimeError("careless")

    setattr(context, what, broken)


# ------------------------------------------------------------------------- watching


def test_a_step_that_has_ended_is_not_given_up() -> None:
    """Its watcher and its end cannot both win."""
    watch = StepWatch()
    aborts: list[int] = []
    watch.begin(())
    watch.end()
    assert not watch.check(0.0, lambda: aborts.append(1))
    assert not aborts
    watch.begin(())
    assert watch.check(-1.0, lambda: aborts.append(1))
    assert (aborts, watch.over_budget) == ([1], True)
    with pytest.raises(Abandoned):
        watch.end()
    assert not watch.check(-1.0, lambda: aborts.append(1)), "once"


def test_a_backend_that_always_aborts_does_not_hold_its_callers_for_ever(engine: Engine) -> None:
    """An abort that nobody asked for is tried again a few times, and is an error then."""
    model, hand = load(engine)

    def abort() -> None:
        hand.context.abort()
        hand.faults.in_step = abort

    hand.faults.in_step = abort
    stream = model.infer(LONG, response_tokens=3)
    hand.turns(100)
    with pytest.raises(DecodeAborted):
        told(stream)
    hand.faults.in_step = hand.context.abort
    again = model.infer(LONG, response_tokens=3)
    hand.turns(100)
    assert len(told(again).generated) == 3


# ------------------------------------------------------------------------- answers


def test_whoever_leaves_badly_is_answered_once(engine: Engine) -> None:
    """A backend that raises while a cancelled request is put away does not answer it again."""
    model, hand = load(engine, policy={"prefill_chunk_size": 16})
    stream = model.infer(LONG, response_tokens=3)
    hand.turns_of(2)
    stream.cancel()
    with capture_logs():
        _break_once(hand.context, "drop")
        hand.turns()
    assert [type(end) for end in ends(stream)] == [Done]


def test_a_reset_ends_nobody_else(engine: Engine) -> None:
    """A session that was reset as its turn ended has no hold on who got its sequence then."""
    model, hand = load(engine, context_opts={"n_seq_max": 1})
    first = model.infer(LONG, session_id="s", response_tokens=2)
    hand.turns()
    turn = [*told(first).context_tokens, 65]
    second = model.infer(turn, session_id="s", response_tokens=2)
    other = model.infer("somebody else", response_tokens=8)
    [request] = [r for r in hand.worker._unfinished if r.id == second.request_id]
    hand.until(lambda: request.phase is Phase.CLOSING)
    session = hand.worker._sessions.remove("s")  # what a reset does first, on its own thread
    assert session is not None
    hand.until(lambda: request.phase is Phase.ENDED)
    hand.runner.inbox.post(lambda runner: runner.reset_session(session))
    hand.turns()
    assert len(told(second).generated) == 2
    assert len(told(other).generated) == 8


@pytest.mark.parametrize("late", ["end", "reset"])
def test_news_of_a_session_that_comes_late(engine: Engine, late: str) -> None:
    """What is left to do for an old session is not done to a new one in its sequence."""
    model, hand = load(engine, context_opts={"n_seq_max": 1})
    first = model.infer(LONG, session_id="old", response_tokens=2)
    hand.turns()
    done = told(first)
    session = hand.worker._sessions.remove("old")
    assert session is not None
    second = model.infer([*done.context_tokens, 66], session_id="new", response_tokens=2)
    hand.turns()
    done = told(second)
    if late == "end":
        hand.runner.end_session(session)
    else:
        hand.runner.reset_session(session)
    assert model.info().pinned_idle_seqs == 1
    third = model.infer([*done.context_tokens, 67], session_id="new", response_tokens=2)
    hand.turns()
    assert told(third).cache_hit_kind == "sticky"


@pytest.mark.parametrize("kv_class", KV_CLASSES)
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_who_ends_while_its_state_is_read(kv_class: str, how: str) -> None:
    """What the sequence holds already is its context, and stays of use."""
    held = HeldTier()
    with by_hand(), engine_with({"held": held}) as engine:
        model, hand = load(engine, kv_class=kv_class, tier=["held"])
        first = model.infer(LONG, session_id="s", response_tokens=3)
        hand.turns()
        done = told(first)
        assert engine.cache.flush(10)
        held.reads.clear()
        hand.reads_held = True
        # The whole context is at hand, and the logits at its end are read.
        stream = model.continue_session([], session_id="s", response_tokens=3)
        hand.turn()
        [request] = hand.worker._unfinished
        assert request.phase is Phase.LOADING
        assert request.computed == done.committed_tokens
        if how == "cancel":
            stream.cancel()
        else:
            request.deadline = 0.0  # type: ignore[misc]
        hand.turn()
        held.reads.set()
        hand.reads_held = False
        hand.turns()
        if how == "cancel":
            ended: Completion | None = told(stream)
        else:
            with pytest.raises(TimeoutExceeded) as caught:
                told(stream)
            ended = caught.value.partial
        assert ended is not None
        assert ended.context_tokens == done.context_tokens
        assert ended.committed_tokens == done.committed_tokens
        again = model.continue_session([65], session_id="s", response_tokens=3)
        hand.turns()
        assert told(again).cache_hit_kind == "continuation"
        hand.checks()


def test_a_plugin_that_wants_to_leave_ends_its_request_alone() -> None:
    """``SystemExit`` from a stream processor is an error like any other."""

    class Leaving:
        def __init__(self, request: ProcessorRequest) -> None:
            self._outlet = request.outlet

        def feed(self, token: int, data: bytes, channel: Channel) -> None:
            raise SystemExit(3)

        def flush(self) -> None:
            return

        def finish(self) -> None:
            return

    class Plugin:
        leaves = True

        @hookimpl
        def erllama_stream_processors(self) -> list[StreamProcessorProvider]:
            def make(request: ProcessorRequest) -> Leaving | None:
                return Leaving(request) if self.leaves else None

            return [StreamProcessorProvider("leaving", "", make)]

    plugin = Plugin()
    host = PluginHost()
    host.register(plugin)
    with capture_logs() as logs, Engine(plugins=host) as engine:
        model = engine.load_model(backend="stub", processors=["leaving"])
        with pytest.raises(PluginFailed):
            model.complete(LONG, response_tokens=3)
        assert not [entry for entry in logs if entry["event"] == "context.lost"]
        plugin.leaves = False
        assert len(model.complete(LONG, response_tokens=3).generated) == 3


def test_time_in_the_queue_is_told_of_who_never_left_it(engine: Engine) -> None:
    """A request that ran out of time while it waited has waited all that time."""
    model, hand = load(engine, context_opts={"n_seq_max": 1})
    running = model.infer(LONG, response_tokens=5)
    waiting = model.infer(LONG, response_tokens=5, timeout_s=0.0)
    hand.turns()
    assert len(told(running).generated) == 5
    with pytest.raises(TimeoutExceeded) as caught:
        told(waiting)
    assert caught.value.stats.queue_s > 0.0


# ------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_an_answer_is_no_reason_to_fail_the_others(
    engine: Engine, kv_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells run out just when a request is answered whose last token is not computed yet."""
    monkeypatch.setattr(admission, "_HEADROOM", 8)
    model, hand = load(engine, kv_class=kv_class, context_opts={"n_ctx": 112, "n_seq_max": 2})
    # 16 tokens each; after 40 more all cells are taken, and each wants one more.
    first = model.infer("a bell for the m", response_tokens=60)
    second = model.infer("b bell for the n", response_tokens=41)
    hand.turns()
    for stream, prompt, count in (
        (first, "a bell for the m", 60),
        (second, "b bell for the n", 41),
    ):
        assert told(stream).generated == alone(kv_class, prompt, count)
    hand.checks()


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_who_waits_for_a_read_gives_its_cells_when_there_are_no_others(kv_class: str) -> None:
    """Its context is at hand, its logits are not; others need the cells, and later it goes on."""
    held = HeldTier()
    with by_hand(), engine_with({"held": held}) as engine:
        model, hand = load(
            engine,
            kv_class=kv_class,
            tier=["held"],
            context_opts={"n_ctx": 160, "n_seq_max": 2},
        )
        first = model.infer(LONG[:60], session_id="s", response_tokens=3)
        hand.turns()
        before = told(first)
        assert engine.cache.flush(10)
        other = model.infer("they need more and more", response_tokens=120)
        hand.turns_of(2)
        held.reads.clear()
        hand.reads_held = True
        again = model.continue_session([], session_id="s", response_tokens=3)
        hand.turns()
        assert len(told(other).generated) == 120
        assert not ends(again)
        held.reads.set()
        hand.reads_held = False
        hand.turns()
        assert told(again).generated == alone(kv_class, before.context_tokens, 3)


def test_those_that_gave_way_come_back_in_their_order() -> None:
    """However many wait again, who came first is first."""

    def request(order: int) -> Request:
        nothing: Any = None
        made = Request(
            order,
            Prompt([1]),
            RequestOptions(),
            context_size=9,
            new_sampler=lambda _: nothing,
            pipeline=nothing,
        )
        made.order = order
        return made

    roster = Roster()
    new, (one, two, three) = request(0), map(request, (1, 2, 3))
    roster.active.extend((one, two, three))
    roster.enter(new)
    for gives_way in (two, three, one):
        roster.suspend(gives_way)
    assert list(roster.waiting) == [one, two, three, new]
    assert not roster.active


@pytest.mark.parametrize("unified", [True, False])
def test_residents_that_share_cells_are_bounded_too(engine: Engine, *, unified: bool) -> None:
    """What several of them hold together counts once, and counts."""
    model, hand = load(
        engine,
        context_opts={
            "n_ctx": 1024,
            "n_seq_max": 4,
            "kv_unified": unified,
            "resident_cells_max": 60,
        },
    )
    streams = [model.infer(f"{LONG}{n}", response_tokens=2) for n in range(4)]
    hand.turns()
    for stream in streams:
        told(stream)
    pool = hand.runner.pool
    held = sum(map(len, (set(s.cells) for s in hand.context._sequences)))
    if unified:
        held = len(set().union(*(s.cells for s in hand.context._sequences)))
    assert held <= 60
    assert pool.held <= 60
    hand.checks()


# ---------------------------------------------------------------------- shared prefill


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
@pytest.mark.parametrize("unified", [True, False])
def test_a_share_that_raises_is_computed_instead(
    engine: Engine, kv_class: str, *, unified: bool
) -> None:
    """A backend's mistake while a prefix is shared costs time, and ends nobody."""
    model, hand = load(
        engine, kv_class=kv_class, tier=[], context_opts={"n_seq_max": 3, "kv_unified": unified}
    )
    streams = [model.infer(f"{LONG}{n}", response_tokens=4) for n in range(3)]
    with capture_logs() as logs:
        _break_once(hand.context, "share")
        hand.turns()
    assert [entry["event"] for entry in logs].count("share.refused") == 1
    for number, stream in enumerate(streams):
        assert stream.result().generated == alone(kv_class, f"{LONG}{number}", 4)
    hand.checks()


@pytest.mark.parametrize("kv_class", ["span", "checkpoint"])
def test_who_is_left_by_a_failing_leader_shares_nothing_that_is_gone(
    engine: Engine, kv_class: str
) -> None:
    """A step fails of a leader and of a third one, whose state its follower would begin with."""
    model, hand = load(
        engine,
        kv_class=kv_class,
        tier=[],
        context_opts={"n_seq_max": 3},
        policy={"prefill_chunk_size": 8},
    )
    leader = model.infer(f"{LONG}leads", response_tokens=4)
    follower = model.infer(f"{LONG}follows", response_tokens=4)
    third = model.infer(f"{LONG[:20]}{LONG[::-1]}", response_tokens=4)
    hand.turns_of(2)
    assert [r.phase.name for r in hand.runner.roster.active] == [
        "PREFILLING",
        "FOLLOWING",
        "PREFILLING",
    ]
    hand.faults.fail_step = True
    with capture_logs() as logs:
        hand.turns()
    assert not [entry for entry in logs if entry["event"] == "share.refused"]
    for stream in (leader, third):
        assert [type(end).__name__ for end in ends(stream)] == ["DecodeFailed"]
    assert told(follower).generated == alone(kv_class, f"{LONG}follows", 4)
    hand.checks()


# ------------------------------------------------------------------------------- saves


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_context_whose_beginning_was_evicted_is_saved_whole(
    engine: Engine, kv_class: str
) -> None:
    """Everything is evicted while a reply grows; what is saved at its end can be restored."""
    model, hand = load(engine, kv_class=kv_class)
    stream = model.infer(LONG, response_tokens=50)
    hand.until(lambda: generated(hand, stream) == 30)
    assert engine.cache.flush(10)
    assert kv_class == "whole" or engine.cache.gc().rows > 0
    engine.cache.gc()
    hand.turns()
    done = stream.result()
    assert engine.cache.flush(10)
    again = model.infer([*done.context_tokens, 65], response_tokens=1)
    hand.turns()
    assert again.result().cache_delta.read == done.committed_tokens


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_resident_whose_state_was_evicted_is_saved_again(engine: Engine, kv_class: str) -> None:
    """Its cells are taken when nothing of it is stored any more: it is, from then on."""
    model, hand = load(
        engine, kv_class=kv_class, context_opts={"n_seq_max": 1, "resident_cells_max": 999}
    )
    first = model.infer(LONG, response_tokens=5)
    hand.turns()
    done = told(first)
    assert engine.cache.flush(10)
    engine.cache.gc()
    for prompt in ("somebody else altogether", [*done.context_tokens, 65]):
        stream = model.infer(prompt, response_tokens=1)
        hand.turns()
    assert told(stream).cache_delta.read == done.committed_tokens


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_what_found_no_room_is_saved_at_the_latest_when_the_model_is_closed(kv_class: str) -> None:
    """A finished context that is still in its cells then is not lost."""
    held = HeldTier()
    options: dict[str, Any] = {"kv_class": kv_class, "tier": ["held"]}
    with by_hand(), engine_with({"held": held}, cache={"max_inflight_bytes": 1500}) as engine:
        model, hand = load(
            engine, **options, context_opts={"n_seq_max": 1, "resident_cells_max": 999}
        )
        held.writes.clear()
        stream = model.infer(LONG, response_tokens=50)
        hand.turns()
        done = told(stream)
        assert engine.cache.counters().saves_dropped > 0
        held.writes.set()
    with engine_with({"held": held}) as engine:
        model = load_stub(engine, **options)
        again = model.complete([*done.context_tokens, 65], response_tokens=1)
        assert again.cache_delta.read == done.committed_tokens


@pytest.mark.parametrize("kv_class", ["checkpoint", "whole"])
def test_state_that_an_abort_took_is_no_hit(engine: Engine, kv_class: str) -> None:
    """Who starts again for another's abort has read what it read at first, and counts once."""
    model, hand = load(engine, kv_class=kv_class, policy={"prefill_chunk_size": 32})
    stream = model.infer(LONG * 2, response_tokens=4)
    hand.turns_of(3)
    hand.faults.in_step = hand.context.abort
    hand.turns()
    done = told(stream)
    assert (done.cache_hit_kind, done.cache_delta.read) == ("cold", 0)
    assert done.generated == alone(kv_class, LONG * 2, 4)
    counters = engine.cache.counters()
    assert counters.misses + counters.hits_longest_prefix + counters.hits_exact == 1


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_sticky_turn_that_gives_way_was_sticky(engine: Engine, kv_class: str) -> None:
    """What a request found when it began is told at its end, whatever happened meanwhile."""
    model, hand = load(engine, kv_class=kv_class, context_opts={"n_ctx": 200, "n_seq_max": 2})
    first = model.infer("a bell for the moon", session_id="s", response_tokens=5)
    hand.turns()
    before = told(first)
    other = model.infer("b bell for the sun", response_tokens=150)
    hand.turns_of(3)
    turn = model.continue_session([65], session_id="s", response_tokens=100)
    hand.turns()
    assert hand.runner.stepper.preemptions > 0
    assert len(told(other).generated) == 150
    done = told(turn)
    assert (done.cache_hit_kind, done.cache_delta.read) == ("continuation", before.committed_tokens)
    reset = model.infer(LONG, session_id="s", response_tokens=100)
    hand.turns_of(2)
    assert hand.during(lambda: model.reset_session("s"))
    with pytest.raises(EngineReset):
        told(reset)

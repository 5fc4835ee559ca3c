"""LoRA adapters on the stub: a change is a barrier, and other adapters are another model."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from erllama_backend_stub import StubModel, StubOptions, gate
from erllama_core import AdapterInfo, Completion, Engine, Model, PluginHost, load_config
from erllama_core.errors import (
    AdapterLoadError,
    AdapterNotFound,
    AdapterTimeout,
    AlreadyLoaded,
    ConfigError,
    DecodeFailed,
    DecodeTimeout,
    EngineClosed,
    ModelLoadError,
    NotSupported,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.backend import BackendRequest
from erllama_core.providers import BackendProvider
from held_tier import HeldTier, engine_with
from stub_engine import KV_CLASSES, load_stub, make_engine
from waiting import wait_until

PROMPT = "An old clockmaker repairs the same clock every autumn, and never says why. " * 2
CELLS = (True, False)
ROOM = {"n_ctx": 4096, "n_seq_max": 4}

Adapter = dict[str, Any]
"""An entry of a model's ``adapters``."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], Path]:
    """``files(name)``: an adapter of its own under each name."""

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.adapter"
        path.write_bytes(b"stub adapter\n" + name.encode())
        return path

    return make


def fresh(
    prompt: Any, *adapters: Path | Adapter, kv_class: str = "span", **options: Any
) -> Completion:
    """What a model says that was loaded with these adapters and never computed anything else."""
    with make_engine() as engine:
        model = load_stub(
            engine, tier=[], kv_class=kv_class, context_opts={"n_ctx": 4096}, adapters=adapters
        )
        return model.complete(prompt, **options)


def says(done: Completion, *adapters: Path | Adapter, kv_class: str = "span") -> bool:
    """Whether it is the reply of a fresh model with these adapters to the very same tokens."""
    prompt = done.context_tokens[: done.stats.prompt_tokens]
    alone = fresh(prompt, *adapters, kv_class=kv_class, response_tokens=len(done.generated))
    return done.generated == alone.generated


class InThread:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.value: Any = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._call()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(20)
        assert self.is_over
        if self.error is not None:
            raise self.error
        return self.value


def changes_asked(model: Model) -> int:
    """Changes of adapters that wait for their barrier."""
    return len(model._worker._adapters._changes)


# -------------------------------------------------------------------- identity


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_other_adapters_are_another_model(
    engine: Engine, files: Callable[[str], Path], kv_class: str, unified: bool
) -> None:
    """Each set of adapters says what a fresh model with it says, and reuses its own state only."""
    model = load_stub(engine, kv_class=kv_class, context_opts={**ROOM, "kv_unified": unified})
    a, b = files("a"), files("b")

    def ask() -> Completion:
        done = model.complete(PROMPT, response_tokens=12)
        engine.flush()
        return done

    bare = ask()
    assert says(bare, kv_class=kv_class)
    assert model.load_adapter(a).name == "a"
    with_a = ask()
    assert (with_a.cache_hit_kind, with_a.cache_delta.read) == ("cold", 0)
    assert says(with_a, a, kv_class=kv_class)
    assert with_a.generated != bare.generated
    model.load_adapter(b, name="second", scale=0.5)
    with_both = ask()
    assert with_both.cache_delta.read == 0
    assert says(with_both, a, {"path": b, "scale": 0.5}, kv_class=kv_class)
    model.set_adapter_scale("second", -2)
    rescaled = ask()
    assert rescaled.cache_delta.read == 0
    assert says(rescaled, a, {"path": b, "scale": -2.0}, kv_class=kv_class)
    assert len({d.generated for d in (bare, with_a, with_both, rescaled)}) == 4
    # Back the way it came: every set finds what was stored under it.
    model.set_adapter_scale("second", 0.5)
    again = ask()
    assert (again.cache_hit_kind, again.generated) == ("exact", with_both.generated)
    model.unload_adapter("second")
    again = ask()
    assert (again.cache_hit_kind, again.generated) == ("exact", with_a.generated)
    model.unload_adapter("a")
    again = ask()
    assert (again.cache_hit_kind, again.generated) == ("exact", bare.generated)


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_cells_of_other_adapters_are_never_shared(
    engine: Engine, files: Callable[[str], Path], kv_class: str, unified: bool
) -> None:
    """Residents and pins of before are of no use, and are saved for when their adapters return."""
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={**ROOM, "kv_unified": unified, "resident_cells_max": 4096},
        policy={"continued_interval": 0},
    )
    path = files("a")
    first = model.complete(PROMPT, session_id="s", response_tokens=9)
    other = model.complete("Somebody else asks something else altogether.", response_tokens=9)
    engine.flush()
    assert model.info().pinned_idle_seqs == 1
    model.load_adapter(path)
    assert model.info().pinned_idle_seqs == 0
    assert model.info().available_seqs == 4
    turn = model.continue_session([65, 66], session_id="s", response_tokens=9).result()
    assert turn.context_tokens[: first.committed_tokens] == first.context_tokens
    assert (turn.cache_hit_kind, turn.cache_delta.read) == ("cold", 0)
    assert says(turn, path, kv_class=kv_class)
    sticky = model.complete([*turn.context_tokens, 65], session_id="s", response_tokens=5)
    assert (sticky.cache_hit_kind, sticky.cache_delta.read) == ("sticky", turn.committed_tokens)
    assert says(sticky, path, kv_class=kv_class)
    model.unload_adapter("a")
    for before in (first, other):
        back = model.complete([*before.context_tokens, 67], response_tokens=5)
        assert back.cache_delta.read == before.committed_tokens
        assert says(back, kv_class=kv_class)


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_scale_of_zero_is_no_adapter(
    engine: Engine, files: Callable[[str], Path], kv_class: str
) -> None:
    """It shares the state of the bare model, and changing to it waits for nobody."""
    model = load_stub(engine, kv_class=kv_class, decode_us=2000.0)
    bare = model.complete(PROMPT, response_tokens=2)
    engine.flush()
    running = model.infer("Who waits for whom?", response_tokens=900)
    running.next_event(10)
    model.load_adapter(files("a"), scale=0)
    assert model.queue_depth() == 1
    running.cancel()
    assert says(running.result(), kv_class=kv_class)
    assert [(one.name, one.scale) for one in model.list_adapters()] == [("a", 0.0)]
    done = model.complete(PROMPT, response_tokens=2)
    assert (done.cache_hit_kind, done.generated) == ("exact", bare.generated)
    model.set_adapter_scale("a", 1e-60)  # as a 32-bit float it is 0 too
    assert model.complete(PROMPT, response_tokens=2).cache_hit_kind == "exact"
    model.unload_adapter("a")
    assert model.list_adapters() == []


def test_names_and_order_of_adapters_do_not_matter(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """State is shared by whoever has the same files at the same scales."""
    a, b = files("a"), files("b")
    one = load_stub(engine, "one", adapters=[{"path": a, "scale": 0.1}, b])
    first = one.complete(PROMPT, response_tokens=4)
    engine.flush()
    two = load_stub(
        engine, "two", adapters=[{"path": b, "name": "x"}, {"path": a, "name": "y", "scale": 0.1}]
    )
    second = two.complete(PROMPT, response_tokens=4)
    assert (second.cache_hit_kind, second.generated) == ("exact", first.generated)
    two.set_adapter_scale("y", 0.1 + 1e-12)  # the same 32-bit float
    assert two.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"
    two.set_adapter_scale("y", 0.11)
    assert two.complete(PROMPT, response_tokens=4).cache_hit_kind == "cold"


def test_the_same_file_twice_is_not_the_file_once(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """An adapter counts as often as it is loaded."""
    path = files("a")
    model = load_stub(engine, adapters=[path])
    once = model.complete(PROMPT, response_tokens=8)
    model.load_adapter(path, name="again")
    twice = model.complete(PROMPT, response_tokens=8)
    assert twice.cache_hit_kind == "cold"
    assert twice.generated != once.generated


def test_a_salt_stays_apart_under_adapters(engine: Engine, files: Callable[[str], Path]) -> None:
    """Salt and adapters each make another namespace, and together a third."""
    model = load_stub(engine)
    for _ in range(2):
        for salt in ("x", None):
            done = model.complete(PROMPT, cache_salt=salt, response_tokens=4)
            assert done.cache_hit_kind == "cold"
            engine.flush()
        if not model.list_adapters():
            model.load_adapter(files("a"))
    model.unload_adapter("a")
    for salt in ("x", None):
        done = model.complete(PROMPT, cache_salt=salt, response_tokens=4)
        assert done.cache_hit_kind == "exact"


def test_why_speaks_of_the_adapters_in_effect(engine: Engine, files: Callable[[str], Path]) -> None:
    """What is stored under others is not promised."""
    model = load_stub(engine)
    model.complete(PROMPT, response_tokens=4)
    engine.flush()
    assert model.why(PROMPT).kind == "exact"
    model.load_adapter(files("a"))
    assert (model.why(PROMPT).kind, model.why(PROMPT).stored_tokens) == ("cold", 0)
    model.unload_adapter("a")
    assert model.why(PROMPT).kind == "exact"


def test_state_is_found_again_after_a_restart(tmp_path: Path, files: Callable[[str], Path]) -> None:
    """The namespace is a function of files and scales, in whichever process."""
    root, path = tmp_path / "root", files("a")
    with make_engine(root) as engine:
        model = load_stub(engine, tier=["disk"])
        model.load_adapter(path, scale=0.25)
        first = model.complete(PROMPT, response_tokens=4)
    with make_engine(root) as engine:
        model = load_stub(engine, tier=["disk"], adapters=[{"path": path, "scale": 0.25}])
        second = model.complete(PROMPT, response_tokens=4)
        assert (second.cache_hit_kind, second.generated) == ("exact", first.generated)
        model.unload_adapter(path.stem)
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "cold"


# ------------------------------------------------------------------ the barrier


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_running_requests_end_with_the_adapters_they_began_with(
    engine: Engine, files: Callable[[str], Path], kv_class: str, unified: bool
) -> None:
    """Those that run keep the old set, those that wait and those that come get the new one."""
    name = f"barrier-{kv_class}-{unified}"
    held = gate(name)
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_ctx": 2048, "n_seq_max": 3, "kv_unified": unified},
        faults={"hang_step": 3, "hang_gate": name},
    )
    path = files("a")
    running = [model.infer(f"{n}: {PROMPT}", response_tokens=30) for n in range(3)]
    waiting = [model.infer(f"{n}: {PROMPT}", response_tokens=10) for n in range(3)]
    assert held.wait_reached(10)
    call = InThread(lambda: model.load_adapter(path))
    wait_until(lambda: changes_asked(model) == 1)
    late = [model.infer(f"{n}: {PROMPT}", response_tokens=10) for n in range(3)]
    assert not call.is_over
    assert model.list_adapters() == []
    held.open()
    for stream in running:
        assert says(stream.result(), kv_class=kv_class)
    info = call.result()
    assert model.list_adapters() == [info]
    for stream in (*waiting, *late):
        done = stream.result()
        assert says(done, path, kv_class=kv_class)
    engine.flush()
    again = [model.complete(f"{n}: {PROMPT}", response_tokens=10) for n in range(3)]
    assert {done.cache_hit_kind for done in again} == {"exact"}


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_preempted_request_ends_before_the_barrier(
    engine: Engine, files: Callable[[str], Path], kv_class: str
) -> None:
    """Who was set aside for want of cells goes on with what it began with, and is not held up."""
    name = f"preempted-{kv_class}"
    held = gate(name)
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_ctx": 256, "n_seq_max": 4},
        faults={"hang_step": 100, "hang_gate": name},
    )
    streams = [
        model.infer(f"{n} bottles stand on the wall of the house", response_tokens=150)
        for n in range(4)
    ]
    assert held.wait_reached(20)
    unfinished = {request.id: request for request in model._worker._unfinished}
    assert any(request.order for request in model._worker._runner.roster.waiting)
    begun = [unfinished[stream.request_id].order > 0 for stream in streams]
    call = InThread(lambda: model.load_adapter(files("a")))
    wait_until(lambda: changes_asked(model) == 1)
    late = model.infer("The last one", response_tokens=5)
    held.open()
    for stream, began in zip(streams, begun, strict=True):
        adapters = [] if began else [files("a")]
        assert says(stream.result(), *adapters, kv_class=kv_class)
    call.result()
    assert says(late.result(), files("a"), kv_class=kv_class)


def test_changes_are_made_in_the_order_in_which_they_are_asked_for(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """Several barriers queue; a request between two of them runs between them, if it fits."""
    held = gate("order")
    model = load_stub(engine, faults={"hang_step": 2, "hang_gate": "order"})
    running = model.infer(PROMPT, response_tokens=3)
    assert held.wait_reached(10)
    calls = []
    steps: list[Callable[[], Any]] = [
        lambda: model.load_adapter(files("a")),
        lambda: model.load_adapter(files("b"), scale=2.0),
        lambda: model.set_adapter_scale("a", 0.5),
        lambda: model.unload_adapter("b"),
    ]
    for number, step in enumerate(steps, start=1):
        calls.append(InThread(step))
        wait_until(lambda number=number: changes_asked(model) == number)  # type: ignore[misc]
    with pytest.raises(AdapterNotFound):
        model.set_adapter_scale("b", 1.0)  # by then it will be gone
    with pytest.raises(AlreadyLoaded):
        model.load_adapter(files("a"))
    late = model.infer(PROMPT, response_tokens=6)
    held.open()
    assert says(running.result())
    for call in calls:
        call.result()
    assert [(one.name, one.scale) for one in model.list_adapters()] == [("a", 0.5)]
    assert says(late.result(), {"path": files("a"), "scale": 0.5})


def test_a_change_whose_time_is_up_changes_nothing(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """The caller is told; changes that follow are made, but those that build on it."""
    held = gate("in vain")
    model = load_stub(
        engine, context_opts={"n_seq_max": 1}, faults={"hang_step": 2, "hang_gate": "in vain"}
    )
    running = model.infer(PROMPT, response_tokens=3)
    assert held.wait_reached(10)
    first = InThread(lambda: model.load_adapter(files("a"), timeout_s=0.3))
    wait_until(lambda: changes_asked(model) == 1)
    second = InThread(lambda: model.set_adapter_scale("a", 2.0))
    third = InThread(lambda: model.load_adapter(files("b")))
    with pytest.raises(AdapterTimeout, match=r"within 0\.3 s"):
        first.result()
    with pytest.raises(TimeoutError):
        model.load_adapter(files("c"), timeout_s=0.0)
    held.open()
    assert says(running.result())
    with pytest.raises(AdapterNotFound):
        second.result()
    third.result()
    assert [one.name for one in model.list_adapters()] == ["b"]
    assert says(model.complete(PROMPT, response_tokens=4), files("b"))


def test_whoever_a_withdrawn_change_held_up_goes_on(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """A request that came after it is let in beside those that run."""
    held = gate("withdrawn")
    model = load_stub(engine, faults={"hang_step": 30, "hang_gate": "withdrawn"})
    running = model.infer(PROMPT, response_tokens=60)
    assert held.wait_reached(10)
    call = InThread(lambda: model.load_adapter(files("a"), timeout_s=0.05))
    wait_until(lambda: changes_asked(model) == 1)
    late = model.infer("Let me in", response_tokens=2)
    with pytest.raises(AdapterTimeout):
        call.result()
    held.open()
    assert says(late.result())
    assert says(running.result())


def test_a_withdrawn_change_wakes_a_worker_that_has_nothing_to_do(
    files: Callable[[str], Path],
) -> None:
    """While the only running request waits for a slow tier, whom the change held up is let in."""
    held = HeldTier()
    with engine_with({"held": held}, cache={"read_timeout_ms": 60_000}) as engine:
        model = load_stub(engine, tier=["held"])
        model.complete(PROMPT, response_tokens=4)
        engine.flush()
        held.reads.clear()
        running = model.infer(PROMPT + "and", response_tokens=4)
        assert held.asked.acquire(timeout=10)
        call = InThread(lambda: model.load_adapter(files("a"), timeout_s=0.05))
        wait_until(lambda: changes_asked(model) == 1)
        late = model.infer("Something else", response_tokens=2)
        with pytest.raises(AdapterTimeout):
            call.result()
        try:
            late.next_event(10)
        finally:
            held.reads.set()
        assert says(late.result())
        assert says(running.result())


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_what_was_not_saved_before_is_saved_at_the_barrier(
    files: Callable[[str], Path], kv_class: str
) -> None:
    """A resident whose save found no room is stored before its cells go, room or none."""
    held = HeldTier()
    with engine_with({"held": held}, cache={"max_inflight_bytes": 12_000}) as engine:
        model = load_stub(
            engine,
            tier=["held"],
            kv_class=kv_class,
            context_opts={**ROOM, "resident_cells_max": 4096},
            policy={"continued_interval": 0},
        )
        held.writes.clear()
        texts = [f"{n} {PROMPT}" for n in range(3)]
        done = [model.complete(text, response_tokens=40) for text in texts]
        assert model.settle(10)
        assert engine.cache.counters().saves_dropped > 0
        call = InThread(lambda: model.load_adapter(files("a")))
        wait_until(lambda: call.is_over or model.info().available_seqs == 4)
        held.writes.set()
        call.result()
        engine.flush()
        model.unload_adapter("a")
        for one in done:
            again = model.complete([*one.context_tokens, 65], response_tokens=2)
            assert again.cache_delta.read == one.committed_tokens


def test_waiting_requests_can_end_during_a_barrier(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """A request that waits for a barrier can be cancelled, and can run out of time."""
    held = gate("ends")
    model = load_stub(engine, faults={"hang_step": 2, "hang_gate": "ends"})
    running = model.infer(PROMPT, response_tokens=3)
    assert held.wait_reached(10)
    call = InThread(lambda: model.load_adapter(files("a")))
    wait_until(lambda: changes_asked(model) == 1)
    cancelled = model.infer(PROMPT, response_tokens=3)
    cancelled.cancel()
    overdue = model.infer(PROMPT, response_tokens=3, timeout_s=0.0)
    held.open()
    assert cancelled.result().finish_reason == "cancelled"
    with pytest.raises(TimeoutError):
        overdue.result()
    running.result()
    call.result()


@pytest.mark.parametrize("end", ["model", "engine"])
def test_closing_during_a_barrier_answers_everybody(
    engine: Engine, files: Callable[[str], Path], end: str
) -> None:
    """Running, waiting, and changes that wait: each gets EngineClosed."""
    held = gate(f"closing-{end}")
    model = load_stub(
        engine,
        context_opts={"n_seq_max": 1},
        faults={"hang_step": 2, "hang_gate": f"closing-{end}"},
    )
    running = model.infer(PROMPT, response_tokens=30)
    assert held.wait_reached(10)
    calls = [InThread(lambda n=n: model.load_adapter(files(f"a{n}"))) for n in range(3)]  # type: ignore[misc]
    wait_until(lambda: changes_asked(model) == 3)
    waiting = model.infer(PROMPT, response_tokens=3)
    closing = InThread(model.unload if end == "model" else engine.close)
    wait_until(lambda: not model._worker._accepts)
    held.open()
    closing.result()
    for stream in (running, waiting):
        with pytest.raises(EngineClosed):
            stream.result()
    for call in calls:
        with pytest.raises(EngineClosed):
            call.result()
    with pytest.raises(EngineClosed):
        model.load_adapter(files("late"))
    with pytest.raises(EngineClosed):
        model.unload_adapter("a0")


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_adapters_that_cannot_be_attached_leave_the_old_ones(
    engine: Engine, files: Callable[[str], Path], kv_class: str
) -> None:
    """The caller gets the error, and the model goes on as before."""
    model = load_stub(engine, kv_class=kv_class, faults={"fail_step": 1 + 1 + 5 + 1})
    model.load_adapter(files("a"))
    first = model.complete(PROMPT, response_tokens=5)
    assert len(first.generated) == 5
    engine.flush()
    with pytest.raises(DecodeFailed):
        model.load_adapter(files("b"))
    assert [one.name for one in model.list_adapters()] == ["a"]
    again = model.complete(PROMPT, response_tokens=5)
    assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
    model.load_adapter(files("b"))
    assert says(
        model.complete(PROMPT, response_tokens=5), files("a"), files("b"), kv_class=kv_class
    )


# ------------------------------------------------------------------- quarantine


def test_a_new_context_gets_the_adapters_of_the_one_that_was_given_up(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """After a call that does not return, requests that waited run with the adapters in effect."""
    held = gate("given up")
    model = load_stub(
        engine,
        context_opts={"n_seq_max": 1, "decode_budget_ms": 40},
        adapters=[files("a")],
        faults={"hang_step": 4, "hang_gate": "given up", "hang_deaf": True},
    )
    lost = model.infer(PROMPT, response_tokens=30)
    waiting = model.infer(PROMPT, response_tokens=5)
    assert held.wait_reached(10)
    with pytest.raises(DecodeTimeout):
        lost.result()
    waiting.next_event(10)
    assert says(waiting.result(), files("a"))
    model.load_adapter(files("b"))
    assert says(model.complete(PROMPT, response_tokens=5), files("a"), files("b"))
    held.open()


def test_a_change_that_hangs_costs_nobody_else(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """The context in which it hangs is given up; the model goes on with the adapters of before."""
    held = gate("attach hangs")
    model = load_stub(
        engine,
        context_opts={"decode_budget_ms": 40},
        adapters=[files("a")],
        faults={"hang_step": 2, "hang_gate": "attach hangs", "hang_deaf": True},
    )
    call = InThread(lambda: model.load_adapter(files("b")))
    assert held.wait_reached(10)
    waiting = model.infer(PROMPT, response_tokens=5)
    with pytest.raises(AdapterLoadError, match="lost"):
        call.result()
    assert says(waiting.result(), files("a"))
    assert [one.name for one in model.list_adapters()] == ["a"]
    model.load_adapter(files("b"))
    assert says(model.complete(PROMPT, response_tokens=5), files("a"), files("b"))
    held.open()


def test_an_interrupt_frees_nothing_that_is_being_attached(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """Ctrl-C while an adapter is attached is raised when that is over; it is in effect then."""
    held = gate("interrupted")
    came = threading.Event()
    model = load_stub(
        engine,
        adapters=[files("a")],
        faults={"hang_step": 2, "hang_gate": "interrupted", "hang_deaf": True},
    )

    def on_signal(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def interrupt() -> None:
        assert held.wait_reached(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        came.wait(10)
        held.open()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        interrupter = InThread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.load_adapter(files("b"))
        interrupter.result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [one.name for one in model.list_adapters()] == ["a", "b"]
    assert says(model.complete(PROMPT, response_tokens=5), files("a"), files("b"))
    assert not any(one.weights.is_closed for one in model._worker.adapters)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------- use


def test_what_is_known_of_an_adapter(engine: Engine, files: Callable[[str], Path]) -> None:
    """Name, file, scale and fingerprint, in the order of loading; None of it waits."""
    model = load_stub(engine, adapters=[{"path": files("a"), "scale": 2, "name": "first"}])
    info = engine.load_adapter("stub", str(files("b")), scale=0.5)
    assert isinstance(info, AdapterInfo)
    assert engine.list_adapters(model) == [model.list_adapters()[0], info]
    assert [(one.name, one.scale) for one in model.list_adapters()] == [("first", 2.0), ("b", 0.5)]
    assert info.path == str(files("b"))
    assert len(bytes.fromhex(info.fingerprint)) == 32
    engine.set_adapter_scale(model, "b", 1.5)
    assert engine.list_adapters(model)[1] == attrs.evolve(info, scale=1.5)
    engine.unload_adapter(model, "first")
    assert [one.name for one in engine.list_adapters(model)] == ["b"]


def test_mistakes_have_their_errors(
    engine: Engine, files: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each mistake names what is wrong, and changes nothing."""
    model = load_stub(engine)
    bad = tmp_path / "bad.adapter"
    bad.write_bytes(b"something else")
    with pytest.raises(AdapterLoadError, match="does not begin") as error:
        model.load_adapter(bad)
    assert isinstance(error.value, ModelLoadError)
    with pytest.raises(AdapterLoadError, match="does not exist"):
        model.load_adapter(tmp_path / "none")
    with pytest.raises(AdapterLoadError, match="is a folder"):
        model.load_adapter(tmp_path)
    with pytest.raises(AdapterLoadError):
        model.load_adapter("a\0b")
    for scale in (float("nan"), float("inf"), 1e39, -1e39):
        with pytest.raises(ValueError, match="finite"):
            model.load_adapter(files("a"), scale=scale)
    for wrong in (True, "1", None):
        with pytest.raises(TypeError, match="scale"):
            model.load_adapter(files("a"), scale=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name"):
        model.load_adapter(files("a"), name=" ")
    model.load_adapter(files("abcd"))
    with pytest.raises(AdapterNotFound, match="did you mean 'abcd'"):
        model.unload_adapter("abcde")
    with pytest.raises(AlreadyLoaded, match="abcd"):
        model.load_adapter(files("abcd"))
    with pytest.raises(LookupError):
        model.set_adapter_scale("nobody", 1.0)
    with pytest.raises(ValueError, match="finite"):
        model.set_adapter_scale("abcd", float("nan"))
    assert [one.name for one in model.list_adapters()] == ["abcd"]


def test_a_model_with_an_adapter_that_cannot_be_loaded_is_not_loaded(
    engine: Engine, files: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is left behind, and the id is free."""
    threads = threading.active_count()
    with pytest.raises(AdapterLoadError):
        load_stub(engine, adapters=[files("a"), tmp_path / "none"])
    with pytest.raises(DecodeFailed):
        load_stub(engine, adapters=[files("a")], faults={"fail_step": 1})
    assert threading.active_count() == threads
    load_stub(engine, adapters=[files("a")])


def test_adapters_in_a_configuration(files: Callable[[str], Path], tmp_path: Path) -> None:
    """A model's ``adapters`` are loaded with it, and mistakes in them are told at once."""
    table = {"path": str(files("a")), "scale": 0.5}
    config: dict[str, Any] = {"models": {"m": {"backend": "stub", "adapters": [table]}}}
    with Engine.from_config(config) as engine:
        assert [one.scale for one in engine.list_adapters("m")] == [0.5]
    twice = {"models": {"m": {"adapters": [table, {**table, "name": "a", "scale": "x"}, {}]}}}
    with pytest.raises(ConfigError) as wrong:
        load_config(twice, environ={})
    assert {problem.path for problem in wrong.value.problems} == {
        "models.m.adapters[1].scale",
        "models.m.adapters[2].path",
    }
    twice = {
        "models": {"m": {"adapters": [table, {**table, "scale": 1e39}, {**table, "name": ""}]}}
    }
    with pytest.raises(ConfigError) as wrong:
        load_config(twice, environ={})
    assert {problem.path for problem in wrong.value.problems} == {
        "models.m.adapters[1].name",
        "models.m.adapters[1].scale",
        "models.m.adapters[2].name",
    }


def test_a_backend_without_the_ability_says_so(files: Callable[[str], Path]) -> None:
    """NotSupported from the call; a model that is to be loaded with adapters is not."""

    class Bare:
        """The stub without its adapters."""

        def __init__(self, request: BackendRequest) -> None:
            self._inner = StubModel(StubOptions(), request.context, None)

        def __getattr__(self, name: str) -> Any:
            if name in {"load_adapter", "attach"}:
                raise AttributeError(name)
            return getattr(self._inner, name)

    class Plugin:
        @hookimpl
        def erllama_backends(self) -> list[BackendProvider]:
            return [BackendProvider(name="bare", summary="", factory=Bare, config=StubOptions)]

    host = PluginHost()
    host.register(Plugin())
    with Engine(plugins=host) as engine:
        model = engine.load_model(backend="bare")
        with pytest.raises(NotSupported, match="'bare' has no adapters"):
            model.load_adapter(files("a"))
        assert model.list_adapters() == []
        with pytest.raises(NotSupported):
            engine.load_model(backend="bare", adapters=[{"path": files("a")}])


def test_for_coroutines(engine: Engine, files: Callable[[str], Path]) -> None:
    """Each call has an awaitable twin."""
    model = load_stub(engine)

    async def use() -> None:
        info = await engine.aio.load_adapter(model, files("a"), name="x", scale=2.0)
        await engine.aio.set_adapter_scale(model, "x", 3.0)
        assert await engine.aio.list_adapters(model) == [attrs.evolve(info, scale=3.0)]
        await engine.aio.unload_adapter(model, "x", timeout_s=10.0)
        assert await engine.aio.list_adapters(model) == []

    asyncio.run(use())


def test_a_cancelled_task_takes_its_change_back(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """Whoever cancels a coroutine's change gets it not made, and those it held up go on."""
    held = gate("cancelled change")
    model = load_stub(
        engine,
        context_opts={"n_seq_max": 2},
        faults={"hang_step": 3, "hang_gate": "cancelled change", "hang_deaf": True},
    )
    left: list[int] = []
    loaded: list[Any] = []
    load = model._backend.load_adapter  # type: ignore[attr-defined]

    def kept(path: Path) -> Any:
        loaded.append(load(path))
        return loaded[-1]

    model._backend.load_adapter = kept  # type: ignore[attr-defined]

    async def use() -> None:
        running = await engine.aio.infer(model, PROMPT, response_tokens=20)
        assert await asyncio.to_thread(held.wait_reached, 10)
        change = asyncio.create_task(engine.aio.load_adapter(model, files("a")))
        await asyncio.to_thread(wait_until, lambda: changes_asked(model) == 1)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        left.append(changes_asked(model))
        held.open()
        await running.result_async()

    asyncio.run(use())
    assert left == [0]
    assert model.list_adapters() == []
    wait_until(lambda: loaded[0].is_closed)
    assert says(model.complete(PROMPT, response_tokens=5))


def test_a_change_that_is_taken_back_before_it_is_asked_for(
    engine: Engine, files: Callable[[str], Path]
) -> None:
    """A task that is cancelled while the file is read never changes anything."""
    model = load_stub(engine)
    reading, go_on = threading.Event(), threading.Event()
    load = model._backend.load_adapter  # type: ignore[attr-defined]

    def slowly(path: Path) -> Any:
        reading.set()
        assert go_on.wait(10)
        return load(path)

    model._backend.load_adapter = slowly  # type: ignore[attr-defined]

    async def use() -> None:
        change = asyncio.create_task(engine.aio.load_adapter(model, files("a")))
        assert await asyncio.to_thread(reading.wait, 10)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        go_on.set()

    asyncio.run(use())  # waits for the thread
    assert changes_asked(model) == 0
    assert model.list_adapters() == []


def test_adapters_that_left_are_freed(engine: Engine, files: Callable[[str], Path]) -> None:
    """Weights are closed when nothing computes with them: after leaving, failing, and closing."""
    model = load_stub(engine)
    closed: list[bool] = []

    def weights() -> list[Any]:
        return [one.weights for one in model._worker.adapters]

    model.load_adapter(files("a"))
    (a,) = weights()
    model.set_adapter_scale("a", 0.5)
    closed.append(a.is_closed)
    model.load_adapter(files("b"))
    _, b = weights()
    model.unload_adapter("a")
    closed.append(a.is_closed)
    model.load_adapter(files("c"), scale=0)
    _, c = weights()
    model.unload_adapter("c")
    closed.append(c.is_closed)
    model.unload()
    closed.append(b.is_closed)
    assert closed == [False, True, True, True]


@pytest.mark.parametrize("unified", CELLS)
@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_requests_while_adapters_change(
    engine: Engine, files: Callable[[str], Path], kv_class: str, unified: bool
) -> None:
    """Whenever a change comes, each request is computed with one set of adapters, from its first
    token to its last.
    """
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={
            "n_ctx": 512,
            "n_seq_max": 3,
            "kv_unified": unified,
            "resident_cells_max": 200,
        },
    )
    done: list[Completion] = []
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        choice = random.Random(seed)
        try:
            for number in range(12):
                text = PROMPT[: choice.randrange(20, 150)] + str(choice.randrange(3))
                session = choice.choice([None, f"{seed}"])
                done.append(
                    model.complete(
                        text, session_id=session, response_tokens=choice.randrange(8, 24)
                    )
                )
                del number
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    path = files("a")
    changes = 0
    while any(thread.is_alive() for thread in threads):
        model.load_adapter(path)
        model.set_adapter_scale("a", 0.5)
        model.unload_adapter("a")
        changes += 1
    for thread in threads:
        thread.join()
    assert not failures
    assert changes
    sets: list[list[Adapter]] = [[], [{"path": path}], [{"path": path, "scale": 0.5}]]
    answers: dict[tuple[int, ...], set[int]] = {}
    with make_engine() as other:
        fresh_ones = [
            load_stub(
                other,
                f"fresh-{number}",
                tier=[],
                kv_class=kv_class,
                context_opts={"n_ctx": 512},
                adapters=adapters,
            )
            for number, adapters in enumerate(sets)
        ]
        for one in done:
            prompt = one.context_tokens[: one.stats.prompt_tokens]
            fits = {
                number
                for number, alone in enumerate(fresh_ones)
                if alone.complete(prompt, response_tokens=len(one.generated)).generated
                == one.generated
            }
            assert len(fits) == 1
            answers.setdefault(tuple(prompt), set()).update(fits)
    assert len(set().union(*answers.values())) > 1

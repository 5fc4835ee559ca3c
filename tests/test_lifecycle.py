"""Models are loaded, unloaded and loaded again while requests run: everybody is answered, and
nothing is left behind.
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from erllama_core import Completion, Engine, Model, Stream
from erllama_core.errors import (
    AlreadyLoaded,
    ConfigError,
    DecodeFailed,
    EngineClosed,
    ErllamaError,
    ModelLoadError,
    ModelNotFound,
)
from stub_engine import load_stub, make_engine
from tiny_gguf import write_tiny_gguf, write_tiny_lora

PROMPT = "Nothing of it remained but the chair by the window, and the light. " * 3
LONG = 400
"""Tokens of a reply that will not be over before something happens to it."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


class House:
    """Loads models in every way that a test knows, also in ways that fail."""

    def __init__(self, load: Callable[..., Model], failing: list[Callable[[], Any]]) -> None:
        self.load = load
        self.failing = failing
        self.adapter: Path


@pytest.fixture
def stub(engine: Engine, tmp_path: Path) -> House:
    adapter = tmp_path / "a.adapter"
    adapter.write_bytes(b"stub adapter\n")

    def load(**options: Any) -> Model:
        # A slow step, so that what is to be cut short still runs.
        return load_stub(engine, "one", decode_us=200.0, context_opts={"n_seq_max": 2}, **options)

    def with_wrong_context() -> Model:
        return engine.load_model("one", backend="stub", context_opts={"n_ctx": 0})

    house = House(
        load,
        [
            lambda: load(faults={"fail_load": True}),
            lambda: load(adapters=[adapter], faults={"fail_step": 1}),
            lambda: load(adapters=[adapter, tmp_path / "none"]),
            with_wrong_context,
        ],
    )
    house.adapter = adapter
    return house


@pytest.fixture
def llama(engine: Engine, tmp_path: Path) -> House:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    adapter = write_tiny_lora(tmp_path / "lora.gguf")
    misfit = write_tiny_lora(tmp_path / "misfit.gguf", layers=5)
    no_numbers = write_tiny_lora(tmp_path / "nan.gguf", fill=float("nan"))
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:400_000])

    def load(path: Path = path, *, adapters: tuple[Path, ...] = (), **context: Any) -> Model:
        return engine.load_model(
            "one",
            backend="llama",
            model_path=str(path),
            context_opts={"n_ctx": 1024, "n_seq_max": 2, "n_threads": 1, **context},
            policy={"boundary_align_tokens": 64},
            adapters=[{"path": str(one)} for one in adapters],
        )

    house = House(
        load,
        [
            lambda: load(short),
            lambda: load(adapter),
            lambda: load(type_k="q9"),
            lambda: load(adapters=(adapter, misfit)),
            lambda: load(adapters=(no_numbers,)),
            lambda: load(type_k="iq4_nl", type_v="iq4_nl", flash_attn=False),
        ],
    )
    house.adapter = adapter
    return house


@pytest.fixture(params=["stub", "llama"])
def house(request: pytest.FixtureRequest) -> House:
    made: House = request.getfixturevalue(request.param)
    return made


def answer(stream: Stream) -> Completion | ErllamaError:
    """What a request comes to; its end must be there, or come by itself."""
    try:
        return stream.result()
    except ErllamaError as error:
        return error


def test_unloading_answers_whoever_runs_and_waits(engine: Engine, house: House) -> None:
    """Running, waiting and late requests get EngineClosed; the id is free for another model."""
    model = house.load()
    streams = [model.infer(f"{n} {PROMPT}", response_tokens=LONG) for n in range(5)]
    streams[0].next_event(10)
    engine.unload("one")
    for stream in streams:
        assert isinstance(answer(stream), EngineClosed)
    with pytest.raises(EngineClosed):
        model.infer(PROMPT)
    with pytest.raises(ModelNotFound):
        engine.complete("one", PROMPT)
    engine.unload("one")
    model.unload()
    again = house.load()
    assert again.complete(PROMPT, response_tokens=3).generated
    with pytest.raises(AlreadyLoaded):
        house.load()


def test_loading_the_same_again_finds_what_was_saved(engine: Engine, house: House) -> None:
    """What an unloaded model had computed, of finished requests and of running ones, is reused."""
    model = house.load()
    done = model.complete(PROMPT, response_tokens=8)
    running = model.infer("Another: " + PROMPT, response_tokens=LONG)
    for _ in range(3):
        running.next_event(10)
    model.unload()
    assert isinstance(answer(running), EngineClosed)
    again = house.load()
    more = again.complete([*done.context_tokens, 40], response_tokens=2)
    assert more.cache_delta.read == done.committed_tokens
    cut_short = again.complete("Another: " + PROMPT, response_tokens=2)
    assert cut_short.cache_delta.read >= cut_short.stats.prompt_tokens - 1


def test_loads_that_fail_leave_nothing_behind(engine: Engine, house: House) -> None:
    """No thread, no id, and no model: the next load works."""
    threads = threading.active_count()
    for fail in house.failing:
        with pytest.raises((ModelLoadError, ConfigError, DecodeFailed)):
            fail()
        assert threading.active_count() == threads
        assert engine.models() == []
    assert house.load().complete(PROMPT, response_tokens=2).generated


def test_one_id_from_many_threads(engine: Engine, house: House) -> None:
    """Loads, unloads and requests of one id at once: each call succeeds or says why not."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        choice = random.Random(seed)
        try:
            for _ in range(8):
                try:
                    what = choice.randrange(4)
                    if what == 0:
                        house.load()
                    elif what == 1:
                        engine.unload("one")
                    else:
                        engine.complete("one", PROMPT, response_tokens=4)
                except (AlreadyLoaded, ModelNotFound, EngineClosed):
                    continue
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    engine.unload("one")
    house.load()
    assert engine.complete("one", PROMPT, response_tokens=4).generated


def test_closing_the_engine_while_models_load(house: House, engine: Engine) -> None:
    """A load that the end of the engine overtakes raises EngineClosed, and its model is freed."""
    failures: list[BaseException] = []
    opened: list[Model] = []

    def work() -> None:
        try:
            while True:
                opened.append(house.load())
                engine.unload("one")
        except (AlreadyLoaded, EngineClosed):
            return
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not opened:
        thread.join(0.001)
    engine.close()
    thread.join()
    assert not failures
    assert engine.models() == []


# ------------------------------------------------------------------------ cycles


def cycle(engine: Engine, house: House, number: int) -> weakref.ref[Model]:
    """One life of a model, of five kinds; everybody who asked it for something is answered."""
    if number % 5 == 4:
        fail = house.failing[number // 5 % len(house.failing)]
        with pytest.raises((ModelLoadError, ConfigError, DecodeFailed)):
            fail()
    model = house.load(adapters=(house.adapter,) if number % 5 == 3 else ())
    streams = []
    if number % 5 == 0:
        streams = [model.infer(PROMPT, response_tokens=2)]
        streams[0].result()
    elif number % 5 == 1:  # cut off as it runs, and as it waits
        streams = [model.infer(f"{n} {PROMPT}", response_tokens=LONG) for n in range(4)]
        streams[0].next_event(10)
    elif number % 5 == 2:  # cancelled before, and at the very moment
        streams = [model.infer(PROMPT, response_tokens=LONG) for _ in range(3)]
        streams[0].next_event(10)
        streams[0].cancel()
        threading.Thread(target=streams[1].cancel).start()
    elif number % 5 == 3:
        streams = [model.infer(PROMPT, session_id="s", response_tokens=2)]
        answer(streams[0])
        model.unload_adapter(house.adapter.stem)
    engine.unload("one")
    ends = [answer(stream) for stream in streams]
    assert all(isinstance(end, Completion | EngineClosed) for end in ends)
    return weakref.ref(model)


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def run_cycles(engine: Engine, house: House, warm_up: int, count: int, most_bytes: int) -> None:
    lives = [cycle(engine, house, number) for number in range(warm_up)]
    engine.flush()
    gc.collect()
    process = psutil.Process()
    before = (threading.active_count(), descriptors())
    rss = process.memory_info().rss
    lives += [cycle(engine, house, number) for number in range(count)]
    engine.flush()
    gc.collect()
    assert (threading.active_count(), descriptors()) == before
    assert [life() for life in lives if life() is not None] == []
    assert process.memory_info().rss - rss < most_bytes


def test_many_lives(engine: Engine, house: House) -> None:
    """Dozens of loads and unloads, also such as fail, leave no thread, descriptor or model."""
    run_cycles(engine, house, warm_up=15, count=60, most_bytes=32 << 20)


@pytest.mark.soak
def test_a_thousand_lives(engine: Engine, house: House) -> None:
    """A thousand leave what a hundred leave: memory does not grow with them.

    A tiny model with its context takes 30 MB, so that a life in a hundred would show.
    """
    run_cycles(engine, house, warm_up=100, count=1000, most_bytes=64 << 20)

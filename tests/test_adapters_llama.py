"""LoRA adapters of a real llama.cpp context, through the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from erllama_core import Completion, Engine, Model
from erllama_core.errors import AdapterLoadError
from stub_engine import make_engine
from tiny_gguf import LLAMA_SHAPES, write_tiny_gguf, write_tiny_lora

PROMPT = "The keeper of the lamp climbed the stairs each evening, and counted them. " * 4
CELLS = (True, False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "base.gguf")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [
        write_tiny_lora(folder / f"lora-{seed}.gguf", seed=seed, targets=tuple(LLAMA_SHAPES))
        for seed in range(2)
    ]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


def load(engine: Engine, base: Path, *, unified: bool = True, **options: Any) -> Model:
    return engine.load_model(
        backend="llama",
        model_path=str(base),
        context_opts={
            "n_ctx": 1024,
            "n_threads": 1,
            "flash_attn": False,
            "n_seq_max": 2,
            "kv_unified": unified,
        },
        policy={"boundary_align_tokens": 64, "cost_gate": "off"},
        **options,
    )


def ask(model: Model, **options: Any) -> Completion:
    done = model.complete(PROMPT, response_tokens=16, **options)
    assert model.settle(10)
    return done


@pytest.mark.parametrize("unified", CELLS)
def test_stored_state_is_never_restored_under_other_adapters(
    engine: Engine, base: Path, loras: list[Path], unified: bool
) -> None:
    """Each set of adapters computes its own, says its own, and finds its own again."""
    model = load(engine, base, unified=unified)
    first, second = loras
    steps: list[tuple[Callable[[], Any], int]] = [
        (lambda: None, 0),
        (lambda: model.load_adapter(first), 1),
        (lambda: model.load_adapter(second, scale=0.5), 2),
        (lambda: model.set_adapter_scale("lora-0", 2.0), 3),
        (lambda: model.set_adapter_scale("lora-0", 1.0), 2),
        (lambda: model.set_adapter_scale("lora-1", 0.0), 1),
        (lambda: model.unload_adapter("lora-0"), 0),
        (lambda: model.unload_adapter("lora-1"), 0),
    ]
    said: dict[int, Completion] = {}
    for change, state in steps:
        change()
        done = ask(model, session_id="s")
        if state in said:
            assert done.cache_hit_kind in {"exact", "sticky"}
            assert done.generated == said[state].generated
        else:
            assert (done.cache_hit_kind, done.cache_delta.read) == ("cold", 0)
            said[state] = done
    assert len({done.generated for done in said.values()}) == len(said) == 4


def test_a_model_loaded_with_adapters_is_the_same(
    base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """State that one engine stored serves the next, whichever way the adapters came."""
    with make_engine(tmp_path) as engine:
        model = load(engine, base, tier=["disk"])
        model.load_adapter(loras[0], scale=0.5)
        first = ask(model)
    with make_engine(tmp_path) as engine:
        adapters = [{"path": str(loras[0]), "scale": 0.5, "name": "other"}]
        model = load(engine, base, tier=["disk"], adapters=adapters)
        again = ask(model)
        assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
        model.unload_adapter("other")
        assert ask(model).cache_hit_kind == "cold"


def test_an_adapter_that_does_not_fit_changes_nothing(
    engine: Engine, base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """Refused by its file, or by what it computes, and the model goes on as before."""
    model = load(engine, base, adapters=[{"path": str(loras[0])}])
    before = ask(model)
    for options in ({"layers": 5}, {"fill": float("nan")}):
        with pytest.raises(AdapterLoadError):
            model.load_adapter(write_tiny_lora(tmp_path / "bad.gguf", **options))
    with pytest.raises(AdapterLoadError):
        model.set_adapter_scale("lora-0", 3e38)
    again = ask(model)
    assert again.cache_hit_kind == "exact"
    assert again.generated == before.generated
    assert [(one.name, one.scale) for one in model.list_adapters()] == [("lora-0", 1.0)]


def test_requests_while_adapters_change(engine: Engine, base: Path, loras: list[Path]) -> None:
    """No request is lost or mixed up, and what each set says stays what it says."""
    model = load(engine, base)
    bare = ask(model, cache_salt="alone")
    model.load_adapter(loras[0])
    adapted = ask(model, cache_salt="alone")
    model.unload_adapter("lora-0")
    done: list[Completion] = []

    def work() -> None:
        done.extend(model.complete(PROMPT, response_tokens=16) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model.load_adapter(loras[0])
        model.unload_adapter("lora-0")
    for thread in threads:
        thread.join()
    assert len(done) == 60
    assert {one.generated for one in done} <= {bare.generated, adapted.generated}

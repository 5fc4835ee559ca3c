"""Six things that must work with any GGUF model: ``ERLLAMA_TEST_MODEL=... pytest -m real_model``.

Without that variable the demo model is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erllama_core import Engine, Model
from stub_engine import make_engine

pytestmark = pytest.mark.real_model

TEXT = "The keeper of the lamp climbed the stairs each evening, and counted them as he went. "
PROMPT = TEXT * 6


def load(engine: Engine, path: Path, model_id: str = "any", **options: Any) -> Model:
    return engine.load_model(
        model_id,
        model_path=str(path),
        tier=["ram", "disk"],
        context_opts={"n_ctx": 1024, "n_seq_max": 2, "resident_cells_max": 0},
        **options,
    )


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with make_engine(tmp_path / "kvc") as engine:
        yield engine


def test_a_cold_prompt_is_computed_and_saved(engine: Engine, demo_model_path: Path) -> None:
    """The first time nothing is reused, and all of it is handed to the cache."""
    model = load(engine, demo_model_path)
    done = model.complete(PROMPT, response_tokens=8)
    assert (done.cache_hit_kind, done.cache_delta.read) == ("cold", 0)
    assert done.cache_delta.created == done.committed_tokens == len(done.context_tokens)
    engine.flush()
    assert engine.cache.counters().saves_finish > 0


def test_a_restart_is_warm(tmp_path: Path, demo_model_path: Path) -> None:
    """Another engine on the same folder answers the same, and computes nothing of the prompt."""
    replies = []
    for _ in range(2):
        with make_engine(tmp_path) as engine:
            model = load(engine, demo_model_path)
            engine.cache.wait_scanned()
            replies.append(model.complete(PROMPT, response_tokens=8))
    assert [reply.cache_hit_kind for reply in replies] == ["cold", "exact"]
    assert replies[0].generated == replies[1].generated


def test_a_turn_goes_on_from_its_parent(engine: Engine, demo_model_path: Path) -> None:
    """With ``parent_key`` the next turn reads all that the turn before left behind."""
    model = load(engine, demo_model_path)
    first = model.complete(PROMPT, response_tokens=8)
    engine.flush()
    more = [*first.context_tokens, *model.tokenize(" And then?", add_bos=False)]
    second = model.complete(more, parent_key=first.finish_key, response_tokens=8)
    assert second.cache_hit_kind == "partial"
    assert second.cache_delta.read >= first.committed_tokens - 1
    assert engine.cache.counters().hits_resume == 1


def test_the_longest_prefix_is_found(engine: Engine, demo_model_path: Path) -> None:
    """A longer prompt goes on from a shorter one without being told."""
    model = load(engine, demo_model_path)
    warm = model.prefill_only(PROMPT)
    engine.flush()
    tokens = [*model.tokenize(PROMPT), *model.tokenize(" What did he count?", add_bos=False)]
    done = model.complete(tokens, response_tokens=8)
    assert done.cache_hit_kind == "partial"
    assert done.cache_delta.read >= warm.committed_tokens - 1
    assert engine.cache.counters().hits_longest_prefix == 1


def test_what_was_evicted_is_computed_again(engine: Engine, demo_model_path: Path) -> None:
    """After everything is gone the answer is the same, from the start."""
    model = load(engine, demo_model_path)
    before = model.complete(PROMPT, response_tokens=8)
    engine.flush()
    assert engine.cache.gc().rows > 0
    after = model.complete(PROMPT, response_tokens=8)
    assert (after.cache_hit_kind, after.generated) == ("cold", before.generated)


def test_two_models_at_once(engine: Engine, demo_model_path: Path) -> None:
    """Two models share the cache, compute at the same time, and read only what is their own."""
    one = load(engine, demo_model_path, "one")
    other = load(engine, demo_model_path, "other", ctx_params_hash="another")
    streams = [model.infer(PROMPT, response_tokens=8) for model in (one, other)]
    replies = [stream.result() for stream in streams]
    assert replies[0].generated == replies[1].generated
    assert [reply.cache_hit_kind for reply in replies] == ["cold", "cold"]
    engine.flush()
    assert one.complete(PROMPT, response_tokens=8).cache_hit_kind == "exact"
    assert other.complete(PROMPT, response_tokens=8).cache_hit_kind == "exact"

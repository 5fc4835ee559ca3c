"""Stored state that is not numbers: found at once, thrown away, and of no harm to anybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erllama_backend_llama import logits
from erllama_backend_llama.context import LlamaContext
from erllama_core import Completion, Engine, Model
from erllama_core.errors import NotNumbers
from erllama_core.interfaces.backend import RangeExport
from recomputed import off_by
from stub_engine import make_engine
from tiny_gguf import Arch, write_tiny_gguf

BAD = [40 + 7 * at % 80 for at in range(100)]
GOOD = [45 + 11 * at % 70 for at in range(90)]
SESSION = [50 + 3 * at % 60 for at in range(80)]
Spoil = Callable[[memoryview], None]


def spoil_floats(into: memoryview) -> None:
    """Some of the last numbers of a recurrent state, before what says that nothing follows."""
    into[-216:-200] = np.full(4, np.nan, dtype="<f4").tobytes()


def spoil_cells(into: memoryview) -> None:
    """Some of the last layer's V, in half precision, before what an empty rest ends with."""
    into[-2248:-200] = b"\xff" * 2048


@contextmanager
def saving(what: str, spoil: Spoil) -> Iterator[None]:
    """Whatever is saved meanwhile is damaged before its checksum is made."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "snapshot":
            export = LlamaContext.export_snapshot

            def export_snapshot(self: LlamaContext, seq: int, into: memoryview) -> None:
                export(self, seq, into)
                spoil(into)

            patch.setattr(LlamaContext, "export_snapshot", export_snapshot)
        else:
            ranges_of = LlamaContext.export_ranges

            def export_ranges(self: LlamaContext, seq: int, ranges: Sequence[RangeExport]) -> None:
                ranges_of(self, seq, ranges)
                for item in ranges:
                    if item.into.nbytes > 4096:
                        spoil(item.into)

            patch.setattr(LlamaContext, "export_ranges", export_ranges)
        yield


Kind = tuple[Arch, dict[str, Any], dict[str, Any], str, Spoil]
POISONS: list[tuple[Arch, dict[str, Any], str, Spoil]] = [
    ("llama", {}, "ranges", spoil_cells),
    ("gemma3", {}, "ranges", spoil_cells),
    ("mamba", {}, "snapshot", spoil_floats),
    ("lfm2", {}, "ranges", spoil_cells),
    ("lfm2", {"hybrid_window": 32}, "snapshot", spoil_floats),
    ("qwen35", {}, "ranges", spoil_cells),
    ("qwen35", {}, "snapshot", spoil_floats),
]
CONTEXTS: list[dict[str, Any]] = [{}, {"flash_attn": True}, {"kv_unified": False}]
KINDS: list[Kind] = [
    (arch, weights, opts, what, spoil)
    for arch, weights, what, spoil in POISONS
    for opts in CONTEXTS
]
KINDS += [("gemma3", {}, {"swa_full": False}, what, spoil_cells) for what in ("ranges", "snapshot")]


def load(engine: Engine, path: Path, context_opts: dict[str, Any]) -> Model:
    opts = {
        "n_ctx": 1024,
        "n_seq_max": 4,
        "n_threads": 1,
        "flash_attn": False,
        "resident_cells_max": 0,
    }
    return engine.load_model(
        backend="llama",
        model_path=str(path),
        context_opts=opts | context_opts,
        tier=["ram"],
        policy={"cost_gate": "off", "min_tokens": 8, "cold_min_tokens": 8},
    )


def check(model: Model, done: Completion) -> None:
    """What was said is about what the same tokens give when they are computed anew."""
    assert off_by(model, done) < 0.2


@pytest.mark.parametrize(("arch", "weights", "context_opts", "what", "spoil"), KINDS)
def test_stored_nan_is_thrown_away_and_everybody_goes_on(
    arch: Arch,
    weights: dict[str, Any],
    context_opts: dict[str, Any],
    what: str,
    spoil: Spoil,
    tmp_path: Path,
) -> None:
    """The request that reads it computes instead; a reply beside it and a session's idle cells
    are no worse off; and what is stored in its place is sound.
    """
    path = write_tiny_gguf(tmp_path / "model.gguf", arch, says="text", **weights)
    with make_engine() as engine:
        model = load(engine, path, context_opts)
        with saving(what, spoil):
            first = model.complete(BAD, response_tokens=4)
            assert model.settle(20)
            assert engine.flush(20)
        kept = model.complete(SESSION, response_tokens=4, session_id="s")
        assert model.settle(20)
        running = model.infer(GOOD, response_tokens=150)
        assert running.next_event(20) is not None
        again = model.complete(BAD, response_tokens=4)
        assert (again.cache_hit_kind, again.cache_delta.read) == ("cold", 0)
        assert again.generated == first.generated
        assert engine.cache.counters().state_rejected == 1
        beside = running.result()
        assert len(beside.generated) == 150
        more = model.continue_session([41, 42], session_id="s", response_tokens=4).result()
        assert more.context_tokens[: len(kept.context_tokens)] == kept.context_tokens
        assert model.settle(20)
        for done in (again, beside, more):
            check(model, done)
        for _ in range(2):  # the first stores what stands at its end once more
            last = model.complete(BAD, response_tokens=4)
        assert (last.cache_hit_kind, last.generated[0]) == ("exact", first.generated[0])
        assert engine.cache.counters().state_rejected == 1


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_idle_cells_that_were_only_restored_are_suspected_too(arch: Arch, tmp_path: Path) -> None:
    """A session that was filled by an exact hit has never been computed with."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch, says="text")
    what, spoil = ("ranges", spoil_cells) if arch == "llama" else ("snapshot", spoil_floats)
    with make_engine() as engine:
        model = load(engine, path, {})
        with saving(what, spoil):
            model.prefill_only(BAD)
            assert model.settle(20)
            assert engine.flush(20)
        begun = model.complete(BAD, response_tokens=1, session_id="s")
        assert model.settle(20)
        more = model.continue_session([41, 42], session_id="s", response_tokens=4).result()
        assert more.context_tokens[: len(begun.context_tokens)] == begun.context_tokens
        assert engine.cache.counters().state_rejected == 1
        check(model, more)


def test_idle_cells_that_spoil_another_request_are_given_up(tmp_path: Path) -> None:
    """Whoever computes first beside restored NaN does not fail for it."""
    path = write_tiny_gguf(tmp_path / "model.gguf", "lfm2", says="text")
    with make_engine() as engine:
        model = load(engine, path, {"resident_cells_max": 1024})
        with saving("ranges", spoil_cells):
            model.prefill_only(BAD)
            assert model.settle(20)
            assert engine.flush(20)
        model._worker.drop_residents()
        assert model.prefill_only(BAD).cache_hit_kind == "exact"
        assert model.settle(20)
        done = model.complete(GOOD, response_tokens=4)
        assert done.cache_hit_kind == "cold"
        assert engine.cache.counters().state_rejected == 1
        assert model.prefill_only(BAD).cache_hit_kind == "cold"
        check(model, done)


@pytest.mark.parametrize("context_opts", [{}, {"kv_unified": False}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_nan_that_was_computed_fails_its_request_alone(
    arch: Arch, context_opts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no stored state can be the cause the caller is told, and the model goes on."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch)
    with make_engine() as engine:
        model = load(engine, path, context_opts)
        kept = model.complete(SESSION, response_tokens=4, session_id="s")
        assert model.settle(20)
        with monkeypatch.context() as patch:
            patch.setattr(logits, "largest", lambda rows: [-1] * len(rows))
            with pytest.raises(NotNumbers, match="not numbers"):
                model.complete(GOOD, response_tokens=4)
        more = model.continue_session([41, 42], session_id="s", response_tokens=4).result()
        assert more.context_tokens[: len(kept.context_tokens)] == kept.context_tokens
        assert model.complete(GOOD, response_tokens=4).cache_hit_kind == "cold"
        assert engine.cache.counters().state_rejected == 0

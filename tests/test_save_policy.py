"""The save policy: what of a prompt is saved when, saves that are waited for, and what is said."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_backend_stub.faults import gate
from erllama_core import Engine, Explanation, Model, SavePolicy, load_config
from erllama_core.errors import ConfigError, EngineClosed
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "Only what stays the same from turn to turn is worth a block of its own."
ALIGN = 32


# ---------------------------------------------------------------------- boundaries


@given(
    st.integers(1, 400),
    st.integers(0, 100),
    st.integers(1, 64),
    st.none() | st.integers(1, 300),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_where_a_cold_prompt_is_saved_to(
    prompt: int, trim: int, align: int, longest: int | None, cold_min: int, least: int
) -> None:
    """To its end, or to the end of a whole block; never into what is trimmed, or too far."""
    policy = SavePolicy(
        min_tokens=least,
        cold_min_tokens=cold_min,
        cold_max_tokens=longest,
        boundary_trim_tokens=trim,
    )
    boundary = policy.cold_boundary(prompt, align)
    allowed = min(max(0, prompt - trim), longest or prompt)
    if prompt < max(cold_min, least):
        assert boundary == 0
    elif allowed == prompt:
        assert boundary == prompt
    else:
        assert allowed - align < boundary <= allowed
        assert boundary % align == 0


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_the_end_of_a_prompt_is_trimmed(kv_class: str) -> None:
    """boundary_trim_tokens: cold saves end with a block before them, finish saves do not."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class, policy={"boundary_trim_tokens": 8})
        first = model.complete(PROMPT, response_tokens=4)
        engine.flush()
        rows = [row for row in engine.cache.dump() if row.save_reason == "cold"]
        ends = [ALIGN, 2 * ALIGN][: (len(PROMPT) - 8) // ALIGN]
        assert sorted(row.end for row in rows if row.kind == "kv") == ends
        # Where a cold save ends another prompt may end, too.
        others = [] if kv_class == "span" else [("logits", ends[-1]), ("snapshot", ends[-1])]
        assert sorted((row.kind, row.end) for row in rows if row.kind != "kv") == others
        again = model.complete(first.context_tokens, response_tokens=4)
        assert again.cache_delta.read >= first.committed_tokens - 1
        plain = load_stub(engine, "plain", tier=[], kv_class=kv_class)
        expected = plain.complete(first.context_tokens, response_tokens=4)
        assert again.generated == expected.generated


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"boundary_trim_tokens": -1}, "boundary_trim_tokens"),
        ({"evict_save_timeout_ms": -1}, "evict_save_timeout_ms"),
        ({"cost_gate": "on"}, "cost_gate"),
        (
            {"boundary_trim_tokens": 1, "cold_max_tokens": 100, "boundary_align_tokens": 128},
            "cold_max_tokens",
        ),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], field: str) -> None:
    """Each at the section that gives it, and at the model whose policy makes it so."""
    with pytest.raises(ConfigError) as of_all:
        load_config({"cache": values}, environ={})
    assert [problem.path for problem in of_all.value.problems] == [f"cache.{field}"]
    with pytest.raises(ConfigError) as of_one:
        load_config({"models": {"m": {"policy": values}}}, environ={})
    assert [problem.path for problem in of_one.value.problems] == [f"models.m.policy.{field}"]


def test_a_block_that_fits_below_cold_max_tokens_is_no_contradiction() -> None:
    """Trimmed prompts that are saved in part are fine, and so is a short one that is not."""
    for values in (
        {"boundary_trim_tokens": 1, "cold_max_tokens": 128, "boundary_align_tokens": 128},
        {"boundary_trim_tokens": 0, "cold_max_tokens": 100, "boundary_align_tokens": 128},
        {"boundary_trim_tokens": 10_000},
    ):
        load_config({"cache": values}, environ={})


# -------------------------------------------------------------- saves that wait


class HeldTier:
    """A disk whose writes wait, from when it is asked to, until they are let go."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.free = threading.Event()
        tier = engine.cache.catalog.store("disk").tier
        put = tier.put

        def held(*arguments: Any, **options: Any) -> None:
            self.reached.set()
            assert self.free.wait(30)
            put(*arguments, **options)

        monkeypatch.setattr(tier, "put", held)


def held_model(engine: Engine, name: str, timeout_ms: int) -> Model:
    return load_stub(
        engine,
        tier=["disk"],
        faults={"hang_step": 20, "hang_gate": name},
        policy={"evict_save_timeout_ms": timeout_ms, "cold_min_tokens": 1024},
    )


@pytest.mark.parametrize("timeout_ms", [0, 60_000])
def test_closing_waits_until_running_requests_are_saved(
    timeout_ms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unload returns when the shutdown save is written, or the time is over."""
    step = gate(f"shutdown {timeout_ms}")
    with make_engine(tmp_path) as engine:
        model = held_model(engine, f"shutdown {timeout_ms}", timeout_ms)
        stream = model.infer(PROMPT, response_tokens=900)
        assert step.wait_reached(10)
        tier = HeldTier(engine, monkeypatch)
        closing = threading.Thread(target=model.unload)
        closing.start()
        while model._worker._accepts:  # the step may go on once the worker knows
            closing.join(0.001)
        step.open()
        assert tier.reached.wait(10)
        if timeout_ms:
            closing.join(0.2)
            assert closing.is_alive(), "it waits for the writer"
            tier.free.set()
        closing.join(10)
        assert not closing.is_alive()
        rows = [row for row in engine.cache.dump() if row.save_reason == "shutdown"]
        assert bool(rows) is bool(timeout_ms)
        tier.free.set()
        with pytest.raises(EngineClosed):
            stream.result()


@pytest.mark.parametrize("timeout_ms", [0, 60_000])
def test_saving_live_state_waits_until_it_is_written(
    timeout_ms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True when it is in the tier; False, and the save goes on, when the time is over."""
    step = gate(f"evict {timeout_ms} ms")
    with make_engine(tmp_path) as engine:
        model = held_model(engine, f"evict {timeout_ms} ms", timeout_ms)
        stream = model.infer(PROMPT, response_tokens=60)
        assert step.wait_reached(10)
        tier = HeldTier(engine, monkeypatch)
        answers: list[bool] = []
        saving = threading.Thread(target=lambda: answers.append(model._worker.save_live()))
        saving.start()
        if timeout_ms:
            step.open()
            assert tier.reached.wait(10)
            saving.join(0.2)
            assert saving.is_alive(), "it waits for the writer"
            tier.free.set()
        saving.join(10)
        assert answers == [bool(timeout_ms)]
        if timeout_ms:
            assert [row for row in engine.cache.dump() if row.save_reason == "evict"]
        step.open()
        tier.free.set()
        assert len(stream.result().generated) == 60


# ------------------------------------------------------------------ what is said


def saving(model: Model, prompt: str = PROMPT, n: int = 2) -> str | None:
    told = model.complete(prompt, response_tokens=n, explain=True).stats.explain
    assert isinstance(told, Explanation)
    return told.saving


def test_an_explanation_says_what_is_not_saved() -> None:
    """No tier, a context or a prompt that is too short, and the policy's bounds."""
    with make_engine() as engine:
        assert saving(load_stub(engine, "all")) is None
        assert load_stub(engine, "asked").why(PROMPT).saving is None

        nowhere = load_stub(engine, "nowhere", tier=[])
        assert "no tier" in str(saving(nowhere))
        assert "no tier" in str(nowhere.why(PROMPT).saving)

        long = load_stub(engine, "long", policy={"min_tokens": 200})
        assert f"{len(PROMPT) + 2} tokens are less than min_tokens (200)" in str(saving(long))
        assert f"{len(PROMPT)} tokens are less" in str(long.why(PROMPT).saving)

        late = load_stub(engine, "late", policy={"cold_min_tokens": 100})
        assert str(saving(late)).startswith(f"0 of the prompt's {len(PROMPT)} tokens are saved")
        assert "cold_min_tokens (100)" in str(saving(late))
        reply = load_stub(engine, "reply", policy={"min_tokens": len(PROMPT) + 1})
        assert "shorter than min_tokens" in str(saving(reply))

        part = load_stub(engine, "part", policy={"boundary_trim_tokens": 8})
        assert str(saving(part)).startswith(f"32 of the prompt's {len(PROMPT)} tokens")
        assert "boundary_trim_tokens 8" in str(saving(part))


def test_an_explanation_says_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes in flight beyond their bound: the drop is told in the request's own explanation."""
    with make_engine(tmp_path, cache={"max_inflight_bytes": 100}) as engine:
        model = load_stub(engine, tier=["disk"])
        tier = HeldTier(engine, monkeypatch)
        told = saving(model)
        tier.free.set()
        assert "max_inflight_bytes" in str(told)
        assert engine.cache.counters().saves_dropped > 0

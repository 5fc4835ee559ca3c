"""The cost gate: what is clearly sooner computed than restored is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_core import Engine, Explanation, Model
from erllama_core.cache.gate import (
    LATELY_NS,
    MARGIN,
    PROBE_EVERY,
    WORTH_S,
    CostGate,
    Line,
    Portion,
    Rate,
    ReadCosts,
    Stage,
    stages,
    worthwhile,
)
from erllama_core.interfaces.backend import CostPrior
from held_tier import HeldTier, engine_with
from stub_engine import KV_CLASSES, load_stub, make_engine
from tiny_gguf import write_tiny_gguf
from waiting import wait_until

PROMPT = "The keeper wrote down each evening what the lamp had burned"
DECLARED_US = 1000.0
"""What the stub says a token takes. No step here is long enough to be measured."""

SECONDS = st.floats(0.0, 10.0)
PORTIONS = st.lists(
    st.builds(
        Portion,
        st.integers(1, 300),
        st.integers(0, 10**8),
        st.lists(SECONDS, max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=8,
)
RATES = st.floats(0.0, 0.01)
READERS = st.integers(1, 4)


def restores(portions: list[Portion], readers: int = 2) -> list[Stage]:
    return stages(portions, Line(0.0, 1e-9), readers)


# ------------------------------------------------------------------ the decision


@given(PORTIONS, RATES, READERS, st.integers(0, 7), st.integers(1, 1000))
def test_more_tokens_for_the_same_bytes_never_close_the_gate(
    portions: list[Portion], rate: float, readers: int, which: int, more: int
) -> None:
    """A portion that holds more tokens, all else alike, is never a reason to restore less."""
    kept = worthwhile(restores(portions, readers), rate)
    grown = list(portions)
    which %= len(grown)
    grown[which] = Portion(grown[which].tokens + more, grown[which].n_bytes, grown[which].reads_s)
    assert worthwhile(restores(grown, readers), rate) >= kept


@given(PORTIONS, RATES, RATES, READERS)
def test_slower_computing_never_closes_the_gate(
    portions: list[Portion], one: float, other: float, readers: int
) -> None:
    """What is restored where computing is quick is restored where it is slow."""
    slow, quick = max(one, other), min(one, other)
    there = restores(portions, readers)
    assert worthwhile(there, slow) >= worthwhile(there, quick)


@given(PORTIONS, RATES, READERS)
def test_what_is_withheld_is_clearly_sooner_computed(
    portions: list[Portion], rate: float, readers: int
) -> None:
    """Only then, and what is kept has no end of which that is true."""
    there = restores(portions, readers)
    kept = worthwhile(there, rate)

    def gain(first: int, last: int) -> float:
        before = there[first - 1] if first else Stage(0, 0.0)
        tokens = there[last - 1].tokens - before.tokens
        return there[last - 1].restore_s - before.restore_s - MARGIN * tokens * rate

    if kept < len(there):
        assert gain(kept, len(there)) > WORTH_S
    for first in range(kept):
        assert gain(first, kept) <= WORTH_S + 1e-9


@given(PORTIONS, READERS)
def test_longer_restores_never_cost_less(portions: list[Portion], readers: int) -> None:
    """Stages grow, and reads that run together take no less than the longest of them."""
    there = restores(portions, readers)
    assert [stage.restore_s for stage in there] == sorted(stage.restore_s for stage in there)
    reads = [seconds for portion in portions for seconds in portion.reads_s]
    assert there[-1].restore_s >= max(reads, default=0.0)


def test_memory_is_restored_where_the_disk_is_not() -> None:
    """Of a cheap beginning and a dear end the beginning is restored."""
    portions = [Portion(256, 10**6), Portion(256, 10**6), Portion(256, 10**6, (5.0,))]
    assert worthwhile(restores(portions), 0.001) == 2
    assert worthwhile(restores(portions), 0.1) == 3


# -------------------------------------------------------------- the measurements


@given(st.lists(st.floats(0.9, 1.1), min_size=9, max_size=9), st.integers(0, 8), SECONDS)
def test_one_outlier_changes_little(usual: list[float], place: int, odd: float) -> None:
    """Nine measurements, one of them as far off as it likes: the median is one of the rest."""
    measured = [*usual[:place], 1e6 * odd, *usual[place + 1 :]]
    rate, line = Rate(5.0), Line(5.0, 5.0)
    for seconds in measured:
        rate.observe(10, 10 * seconds)
        line.observe(10, 10 * seconds)
    assert 0.9 <= rate.value <= 1.1 + 1e-9
    assert line.seconds(10) <= 11.0 + 1e-6


@given(
    st.lists(st.tuples(st.integers(1, 10**9), SECONDS), max_size=20),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)
def test_a_larger_read_is_never_expected_to_be_sooner(
    measured: list[tuple[int, float]], one: int, other: int
) -> None:
    """Whatever was measured, the line rises."""
    line = Line(0.001, 1e-9)
    for size, seconds in measured:
        line.observe(size, seconds)
    assert 0 <= line.seconds(min(one, other)) <= line.seconds(max(one, other))


def test_a_prior_holds_until_three_were_measured() -> None:
    """Two measurements could both be odd; the third replaces the guess."""
    rate, line = Rate(1.0), Line(1.0, 0.0)
    for _ in range(2):
        rate.observe(1, 9.0)
        line.observe(1, 9.0)
        rate.observe(1, 0.0)  # a clock that stood still says nothing
    assert (rate.value, line.seconds(1)) == (1.0, 1.0)
    rate.observe(1, 9.0)
    line.observe(1, 9.0)
    assert (rate.value, line.seconds(1)) == (9.0, 9.0)


def test_reads_of_what_was_used_lately_are_measured_apart() -> None:
    """A disk that is slow for cold objects does not make warm ones dear."""
    reads = ReadCosts()
    lately, before = reads.line(0, LATELY_NS - 1), reads.line(0, LATELY_NS)
    warm = lately.seconds(1000)
    for _ in range(9):
        before.observe(1000, 3.0)
    assert reads.line(5, 6).seconds(1000) == warm
    assert reads.line(5, 5 + LATELY_NS).seconds(1000) == pytest.approx(3.0)


def test_short_steps_say_nothing_of_tokens() -> None:
    """A step of running replies costs what a step costs; only long ones are a rate."""
    gate = CostGate(CostPrior(compute_s_per_token=0.001, import_s_per_byte=0.0), 1)
    for _ in range(9):
        gate.observe_step(4, 4.0)
    portions = [Portion(100, 0)]
    assert gate.judge(portions).estimate.compute_s == pytest.approx(0.1)
    for _ in range(9):
        gate.observe_step(100, 1.0)
    assert gate.judge(portions).estimate.compute_s == pytest.approx(1.0)


@pytest.mark.parametrize("field", ["compute_s_per_token", "import_s_per_byte"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_prior_is_a_duration(field: str, value: float) -> None:
    """A backend that declares nonsense is told so."""
    with pytest.raises(ValueError, match=field):
        CostPrior(**{"compute_s_per_token": 1.0, "import_s_per_byte": 1.0, field: value})


# -------------------------------------------------------------------- the engine


class Stopwatch:
    """Shows ``read_s`` more whenever it is looked at: what one read takes on one thread."""

    def __init__(self, engine: Engine, read_s: float) -> None:
        self.read_s = read_s
        self._now = 0.0
        engine.cache.catalog.stopwatch = self

    def __call__(self) -> float:
        self._now += self.read_s
        return self._now


def gated_engine(root: Path) -> Engine:
    return make_engine(root, cache={"loader_threads": 1})


def gated_stub(engine: Engine, model_id: str = "stub", **options: Any) -> Model:
    defaults = {"tier": ["disk"], "declared_us_per_token": DECLARED_US}
    return load_stub(engine, model_id, **{**defaults, **options})


def explained(model: Model, prompt: list[int], **options: Any) -> Explanation:
    done = model.complete(prompt, response_tokens=1, explain=True, **options)
    assert done.stats.explain is not None
    return done.stats.explain


def longer(context: tuple[int, ...], number: int) -> list[int]:
    """A prompt that goes on from a stored context, and parts from all others there."""
    return [*context, number, *b" and so on"]


def close_gate(model: Model, context: tuple[int, ...]) -> None:
    """Three slow restores are measured."""
    for number in range(3):
        assert explained(model, longer(context, number)).reused_tokens == len(context)


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_slow_tier_is_computed_around_until_it_is_quick(kv_class: str, tmp_path: Path) -> None:
    """The gate closes after measured slow reads, says so, and opens when probes were quick."""
    with gated_engine(tmp_path) as engine:
        model = gated_stub(engine, kv_class=kv_class)
        plain = load_stub(engine, "plain", tier=[], kv_class=kv_class)
        context = model.complete(PROMPT, response_tokens=4).context_tokens
        engine.flush()
        watch = Stopwatch(engine, 5.0)
        close_gate(model, context)
        assert engine.cache.counters().gated == 0

        prompt = longer(context, 3)
        why = model.why(prompt)
        told = explained(model, prompt)
        for explanation in (why, told):
            assert (explanation.kind, explanation.reused_tokens) == ("cold", 0)
            assert explanation.reason.startswith("the cost gate: ")
            assert explanation.gate is not None
            assert explanation.gate.withheld_tokens == len(context)
            assert explanation.gate.restore_s >= 5.0
            assert explanation.gate.compute_s == pytest.approx(len(context) * DECLARED_US / 1e6)
        assert engine.cache.counters().gated == 1, "asking counts nothing"
        prompt = longer(context, 4)
        gated = model.complete(prompt, response_tokens=4)
        assert gated.generated == plain.complete(prompt, response_tokens=4).generated
        assert gated.cache_hit_kind == "cold"

        watch.read_s = 1e-6
        read = []
        for number in range(5, 5 + 6 * PROBE_EVERY):
            read.append(explained(model, longer(context, number)).reused_tokens)
            engine.flush()
        assert read[0] == 0
        assert 0 < sum(n > 0 for n in read[: 2 * PROBE_EVERY]) <= 2, "one in so many goes through"
        assert read[-1] == len(context), "and teaches the gate to open"


def test_exact_hits_and_parent_keys_are_exempt(tmp_path: Path) -> None:
    """However slow the tier, the same prompt and a turn that names its parent are restored."""
    with gated_engine(tmp_path) as engine:
        model = gated_stub(engine)
        first = model.complete(PROMPT, response_tokens=4)
        engine.flush()
        Stopwatch(engine, 5.0)
        close_gate(model, first.context_tokens)
        assert explained(model, longer(first.context_tokens, 3)).reused_tokens == 0
        named = explained(model, longer(first.context_tokens, 4), parent_key=first.finish_key)
        assert (named.reused_tokens, named.gate) == (first.committed_tokens, None)
        exact = explained(model, list(PROMPT.encode()))
        assert (exact.kind, exact.gate) == ("exact", None)
        assert engine.cache.counters().gated == 1


def test_the_part_in_memory_is_restored(tmp_path: Path) -> None:
    """A prompt of which RAM has the beginning and a slow disk the rest restores the beginning."""
    with gated_engine(tmp_path) as engine:
        on_disk = gated_stub(engine, "on_disk")
        context = on_disk.complete(PROMPT, response_tokens=4).context_tokens
        gated_stub(engine, "in_ram", tier=["ram"]).complete(context[:40], response_tokens=1)
        engine.flush()
        Stopwatch(engine, 5.0)
        close_gate(on_disk, context)
        both = gated_stub(engine, "both", tier=["ram", "disk"])
        told = explained(both, longer(context, 3))
        assert (told.kind, told.reused_tokens, told.tiers) == ("partial", 32, ("ram",))
        assert told.gate is not None
        assert told.gate.withheld_tokens == len(context) - 32


def test_a_live_sequence_is_used_where_the_rest_is_withheld(tmp_path: Path) -> None:
    """What the gate keeps back is no reason to leave a shorter resident alone."""
    with gated_engine(tmp_path) as engine:
        writer = gated_stub(engine, "writer")
        context = writer.complete(PROMPT, response_tokens=4).context_tokens
        engine.flush()
        Stopwatch(engine, 5.0)
        close_gate(writer, context)
        model = gated_stub(engine, "reader", context_opts={"resident_cells_max": 1024})
        assert explained(model, list(context[:40])).reused_tokens == 0
        told = explained(model, longer(context, 4))
        assert (told.reused_tokens, told.tiers) == (40, ("resident",))
        assert told.gate is not None
        assert told.gate.withheld_tokens == len(context)


def test_reads_that_were_given_up_are_measured_too() -> None:
    """A tier whose every read comes too late closes the gate like any slow one."""
    held = HeldTier()
    settings = {"loader_threads": 1, "read_timeout_ms": 20}
    with engine_with({"held": held}, cache=settings) as engine:
        model = gated_stub(engine, tier=["held"])
        contexts = [
            model.complete(f"{number} {PROMPT}", response_tokens=4).context_tokens
            for number in range(8)
        ]
        engine.flush()
        Stopwatch(engine, 5.0)
        store = engine.cache.catalog.store("held")
        gated_at = []
        for number, context in enumerate(contexts):
            held.reads.clear()
            assert explained(model, longer(context, 0)).reused_tokens == 0
            held.reads.set()
            wait_until(
                lambda: (
                    not store.rests_until_s and not any(row.refcount for row in engine.cache.dump())
                )
            )
            if engine.cache.counters().gated:
                gated_at.append(number)
        # Later than at the fourth where a read had not begun when it was given up.
        assert gated_at
        assert gated_at[0] >= 3


@pytest.mark.parametrize(
    "options", [{"declared_us_per_token": None}, {"policy": {"cost_gate": "off"}}]
)
def test_without_a_gate_everything_is_restored(options: dict[str, Any], tmp_path: Path) -> None:
    """A backend that declares nothing, or cost_gate off: the slowest tier is read."""
    with gated_engine(tmp_path) as engine:
        model = gated_stub(engine, **options)
        context = model.complete(PROMPT, response_tokens=4).context_tokens
        engine.flush()
        Stopwatch(engine, 5.0)
        close_gate(model, context)
        told = explained(model, longer(context, 3))
        assert (told.reused_tokens, told.gate) == (len(context), None)
        assert engine.cache.counters().gated == 0


def test_the_gate_stays_open_for_a_tiny_real_model(tmp_path: Path) -> None:
    """Differences of milliseconds are no reason to compute: a restart restores from disk."""
    write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    restart_restores(tmp_path / "tiny.gguf", tmp_path / "root", PROMPT * 4)


@pytest.mark.real_model
def test_the_gate_stays_open_for_a_real_model(demo_model_path: Path, tmp_path: Path) -> None:
    """Where computing a token takes milliseconds, a new process restores from disk."""
    estimate = restart_restores(demo_model_path, tmp_path, PROMPT * 16)
    assert MARGIN * estimate.restore_s < estimate.compute_s


def restart_restores(weights: Path, root: Path, prompt: str) -> Any:
    options: dict[str, Any] = {
        "backend": "llama",
        "model_path": str(weights),
        "context_opts": {"n_ctx": 1024},
        "tier": ["disk"],
        "policy": {"boundary_align_tokens": 64},
    }
    with make_engine(root) as engine:
        first = engine.load_model(**options).complete(prompt, response_tokens=2)
    with make_engine(root) as engine:
        model = engine.load_model(**options)
        told = explained(model, [*first.context_tokens, *first.context_tokens[1:9]])
        assert told.reused_tokens == first.committed_tokens
        assert engine.cache.counters().gated == 0
        assert told.gate is not None
        assert told.gate.withheld_tokens == 0
        return told.gate

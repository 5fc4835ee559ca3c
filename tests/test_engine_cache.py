"""Requests against the cache: whatever is reused, the output is the cold one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.faults import gate
from erllama_core import CacheDelta, Completion, Engine, Model
from erllama_core.interfaces.backend import RangeExport
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "The lamp was lit for the first time in the autumn of the year, and the town came to see."
CELLS = (True, False)


@pytest.fixture(params=KV_CLASSES)
def kv_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cold(prompt: str, kv_class: str, **options: Any) -> Completion:
    """The reply of an engine that has nothing stored and stores nothing."""
    with make_engine() as engine:
        return load_stub(engine, tier=[], kv_class=kv_class).complete(prompt, **options)


@pytest.mark.parametrize("unified", CELLS)
def test_the_table_of_hits(kv_class: str, unified: bool) -> None:
    """Kind, read and created are those of the prompt: cold, exact and partial."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class, context_opts={"kv_unified": unified})
        n = len(PROMPT)
        first = model.complete(PROMPT, response_tokens=10)
        assert (first.cache_hit_kind, first.cache_delta) == ("cold", CacheDelta(0, n + 10))
        again = model.complete(PROMPT, response_tokens=10)
        assert (again.cache_hit_kind, again.cache_delta) == ("exact", CacheDelta(n, 10))
        assert again.generated == first.generated
        longer = model.complete([*first.context_tokens, 65, 66], response_tokens=10)
        assert longer.cache_hit_kind == "partial"
        assert longer.cache_delta == CacheDelta(n + 10, 2 + 10)
        assert longer.committed_tokens == len(longer.context_tokens) == n + 10 + 2 + 10
        counters = engine.cache.counters()
        assert (counters.misses, counters.hits_exact, counters.hits_longest_prefix) == (1, 1, 1)
        assert counters.state_rejected == counters.corrupt == counters.saves_dropped == 0


def test_an_exact_hit_computes_nothing_before_the_first_token(kv_class: str) -> None:
    """The first token of an exact hit is sampled from stored logits: no step runs."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class, faults={"fail_step": 3})
        first = model.complete(PROMPT, response_tokens=1)  # steps: the prompt, the reply
        engine.flush()
        stream = model.infer(PROMPT, response_tokens=1)
        again = stream.result()  # the third step fails, after the answer
        assert again.generated == first.generated
        assert again.stats.prefill_s == 0.0


def test_a_branch_is_cut_inside_a_block() -> None:
    """A span model reuses a prompt to the very token where another one leaves it."""
    with make_engine() as engine:
        model = load_stub(engine)
        model.complete(PROMPT, response_tokens=4)
        branch = PROMPT[:45] + "????"
        completion = model.complete(branch, response_tokens=12)
        assert completion.cache_delta.read == 45
        assert completion.generated == cold(branch, "span", response_tokens=12).generated


def test_a_new_process_finds_what_the_last_one_saved(kv_class: str, tmp_path: Path) -> None:
    """After a restart the same prompt is an exact hit from disk."""
    with make_engine(tmp_path) as engine:
        first = load_stub(engine, tier=["ram", "disk"], kv_class=kv_class).complete(
            PROMPT, response_tokens=10
        )
    with make_engine(tmp_path) as engine:
        model = load_stub(engine, tier=["ram", "disk"], kv_class=kv_class)
        again = model.complete(PROMPT, response_tokens=10)
        assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
        assert again.stats.restored_bytes > 0
        assert engine.cache.counters().tier_hits == {
            "disk": engine.cache.counters().tier_hits["disk"]
        }
        engine.flush()
        model.complete(PROMPT, response_tokens=10)
        assert engine.cache.counters().tier_hits["ram"] > 0, "what was read is kept in RAM"


def test_sampling_from_a_mark_draws_what_the_logits_drew(kv_class: str) -> None:
    """With one seed, a cold and a restored request sample the same tokens."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.2}
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class)
        first = model.complete(PROMPT, response_tokens=20, **options)
        again = model.complete(PROMPT, response_tokens=20, **options)
        assert again.cache_hit_kind == "exact"
        assert again.generated == first.generated
        other = model.complete(PROMPT, response_tokens=20, **{**options, "seed": 8})
        assert other.generated != first.generated


def test_what_is_too_short_is_not_saved() -> None:
    """Below min_tokens nothing is stored, and the result says so."""
    with make_engine() as engine:
        model = load_stub(engine, policy={"min_tokens": 64})
        short = model.complete("abc", response_tokens=4)
        assert (short.finish_key, short.cache_delta) == (None, CacheDelta(0, 0))
        engine.flush()
        assert engine.cache.dump() == []


def test_the_finish_key_names_the_whole_context(kv_class: str) -> None:
    """finish_key is the key of prompt and reply, and its objects are in the tier."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class)
        done = model.complete(PROMPT, response_tokens=10)
        assert engine.flush(10)
        rows = [row for row in engine.cache.dump() if row.key == done.finish_key]
        kinds = {"span": {"kv"}, "checkpoint": {"kv", "snapshot"}, "whole": {"kv", "snapshot"}}
        assert {row.kind for row in rows} == kinds[kv_class] | {"logits"}
        assert {row.end for row in rows} == {len(PROMPT) + 10}


def test_salts_and_models_share_nothing() -> None:
    """Another cache_salt, other weights or another class of state never hits."""
    with make_engine() as engine:
        one = load_stub(engine, "one")
        two = load_stub(engine, "two", weights="other")
        one.complete(PROMPT, response_tokens=4)
        assert one.complete(PROMPT, response_tokens=4, cache_salt="a").cache_delta.read == 0
        assert one.complete(PROMPT, response_tokens=4, cache_salt="b").cache_delta.read == 0
        assert one.complete(PROMPT, response_tokens=4, cache_salt="a").cache_hit_kind == "exact"
        assert two.complete(PROMPT, response_tokens=4).cache_hit_kind == "cold"


def test_a_long_reply_is_saved_while_it_grows() -> None:
    """Every continued_interval tokens of a reply are findable before it has ended."""
    with make_engine() as engine:
        model = load_stub(engine, policy={"continued_interval": 64})
        model.complete(PROMPT, response_tokens=300)
        engine.flush()
        assert engine.cache.counters().saves_continued >= 4


def test_a_prompt_is_not_saved_beyond_cold_max_tokens() -> None:
    """cold_max_tokens bounds what is saved while the prompt is computed."""
    with make_engine() as engine:
        model = load_stub(engine, policy={"cold_max_tokens": 40})
        stream = model.infer(PROMPT, response_tokens=1)
        stream.result()
        engine.flush()
        cold_rows = [r for r in engine.cache.dump() if r.save_reason == "cold"]
        assert max(row.end for row in cold_rows) <= 40


def test_a_small_tier_evicts_and_goes_on(kv_class: str) -> None:
    """A tier that holds a fraction of what is saved never stops a request."""
    tiers = [{"name": "ram", "kind": "ram", "quota_bytes": 40_000}]
    with make_engine(tiers=tiers) as engine:
        model = load_stub(engine, kv_class=kv_class)
        for number in range(12):
            prompt = f"{number:03d} " + PROMPT
            done = model.complete(prompt, response_tokens=8)
            assert done.generated == cold(prompt, kv_class, response_tokens=8).generated
        engine.flush()
        assert engine.cache.counters().evictions > 0
        assert sum(row.size_bytes for row in engine.cache.dump()) <= 40_000


TURN = st.tuples(
    st.integers(0, 3), st.integers(1, 90), st.text("ab", max_size=12), st.integers(1, 6)
)


@settings(max_examples=40)
@given(
    st.lists(TURN, min_size=2, max_size=8),
    st.sampled_from(KV_CLASSES),
    st.booleans(),
    st.integers(3, 40),
)
def test_any_history_gives_the_cold_output(
    turns: list[tuple[int, int, str, int]], kv_class: str, unified: bool, chunk: int
) -> None:
    """Prompts that extend, repeat, cut and branch earlier contexts: output is the cold one."""
    with make_engine() as engine:
        context_opts = {"kv_unified": unified}
        policy = {"prefill_chunk_size": chunk}
        model = load_stub(engine, kv_class=kv_class, context_opts=context_opts, policy=policy)
        plain = load_stub(engine, "plain", tier=[], kv_class=kv_class)
        contexts: list[list[int]] = [list(PROMPT.encode())]
        for which, keep, tail, n in turns:
            prompt = contexts[which % len(contexts)][:keep] + list(tail.encode())
            warm = model.complete(prompt, response_tokens=n)
            assert warm.generated == plain.complete(prompt, response_tokens=n).generated
            contexts.append(list(warm.context_tokens))
        counters = engine.cache.counters()
        assert counters.state_rejected == counters.corrupt == 0


@pytest.mark.parametrize("unified", CELLS)
def test_whole_exports_are_few(unified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where any export costs the whole sequence, a prompt in slices is exported once, at its end;
    otherwise as it passes blocks. What is stored is the same.
    """
    exports: list[list[tuple[int, int]]] = []
    plain = StubContext.export_ranges

    def counting(self: StubContext, seq: int, ranges: Sequence[RangeExport]) -> None:
        exports.append([(item.start, item.end) for item in ranges])
        plain(self, seq, ranges)

    monkeypatch.setattr(StubContext, "export_ranges", counting)
    with make_engine() as engine:
        model = load_stub(
            engine, context_opts={"kv_unified": unified}, policy={"prefill_chunk_size": 64}
        )
        prompt = PROMPT.encode() * 3
        model.complete(list(prompt), response_tokens=1)
        engine.flush()
        blocks = {(row.start, row.end) for row in engine.cache.dump() if row.kind == "kv"}
    at_prompt_end = [blocks for blocks in exports if blocks[-1][1] <= len(prompt)]
    assert (len(at_prompt_end) == 1) is not unified
    assert at_prompt_end[0][0] == (0, 32)
    assert {end for _, end in blocks} >= set(range(32, len(prompt), 32))


def chat(model: Model, engine: Engine) -> list[int]:
    reads = []
    context: list[int] = []
    for turn in range(4):
        context += list(f"turn {turn}: tell me more about the town. ".encode())
        done = model.complete(context, response_tokens=16)
        reads.append(done.cache_delta.read)
        context = list(done.context_tokens)
        engine.flush()
    return reads


def test_a_conversation_reads_every_earlier_turn(kv_class: str) -> None:
    """Each turn reuses the whole context that the turn before left behind."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class)
        step = len("turn 0: tell me more about the town. ") + 16
        assert chat(model, engine) == [0, step, 2 * step, 3 * step]


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_live_state_can_be_saved_at_any_time(kv_class: str) -> None:
    """A save of running sequences: they go on, and what they had is found by others."""
    held = gate(f"evict {kv_class}")
    faults = {"hang_step": 40, "hang_gate": f"evict {kv_class}"}
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class, faults=faults)
        stream = model.infer(PROMPT, response_tokens=60)
        assert held.wait_reached(10)
        saving = threading.Thread(target=model._worker.save_live)
        saving.start()
        held.open()
        saving.join(30)
        done = stream.result()
        assert done.generated == cold(PROMPT, kv_class, response_tokens=60).generated
        engine.flush()
        rows = [row for row in engine.cache.dump() if row.save_reason == "evict"]
        assert max(row.end for row in rows) >= len(PROMPT) + 38

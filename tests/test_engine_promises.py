"""What docs/serving.md and the patterns promise of many requests, a test for each promise.

All on the stub, in every class of state and with both kinds of cells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from erllama_backend_stub.faults import gate
from erllama_core import CacheDelta, Completion, Engine, Model, PluginHost, load_config
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.telemetry import RequestFinished
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "A promise is worth as much as the test that would notice when it is broken. " * 2
N = len(PROMPT)
CELLS = (True, False)

pytestmark = [
    pytest.mark.parametrize("unified", CELLS, ids=["unified", "separate"]),
    pytest.mark.parametrize("kv_class", KV_CLASSES),
]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


def alone(prompt: str, kv_class: str, unified: bool, **options: Any) -> Completion:
    """What an engine says that stores nothing and has nothing else to do."""
    with make_engine() as engine:
        context_opts = {"kv_unified": unified}
        model = load_stub(engine, tier=[], kv_class=kv_class, context_opts=context_opts)
        return model.complete(prompt, **options)


def busy_model(engine: Engine, kv_class: str, unified: bool, name: str) -> Model:
    """One sequence, whose second step waits for the gate."""
    return load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_seq_max": 1, "kv_unified": unified},
        faults={"hang_step": 2, "hang_gate": name},
    )


class Finished:
    """A listener that keeps the order in which requests ended."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @hookimpl
    def erllama_request_finished(self, event: RequestFinished) -> None:
        self.ids.append(event.request_id)


def test_requests_that_wait_are_served_in_the_order_in_which_they_came(
    kv_class: str, unified: bool
) -> None:
    """First in, first out: neither the shortest nor the one that is stored jumps the queue."""
    name = f"fifo-{kv_class}-{unified}"
    held, told, host = gate(name), Finished(), PluginHost()
    host.register(told)
    with Engine(load_config({}, environ={}), plugins=host) as engine:
        model = busy_model(engine, kv_class, unified, name)
        streams = [model.infer(PROMPT, response_tokens=3)]
        assert held.wait_reached(10)
        prompts = ["short", PROMPT * 2, PROMPT, "brief", PROMPT + "!", "x"]
        streams += [model.infer(prompt, response_tokens=3) for prompt in prompts]
        assert model.pending_len() == len(prompts)
        held.open()
        for stream in streams:
            stream.result()
    assert told.ids == [stream.request_id for stream in streams]


def test_a_complete_while_another_streams_is_queued(
    engine: Engine, kv_class: str, unified: bool
) -> None:
    """With one sequence a blocking call waits for the stream to end, and is right then."""
    name = f"queued-{kv_class}-{unified}"
    held = gate(name)
    model = busy_model(engine, kv_class, unified, name)
    stream = model.infer(PROMPT, response_tokens=5)
    assert held.wait_reached(10)
    answers: list[Completion] = []
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        answers.append(model.complete("somebody else", response_tokens=4))

    caller = threading.Thread(target=ask)
    caller.start()
    assert asked.wait(10)
    assert not answers
    held.open()
    caller.join(30)
    streamed = stream.result()
    (answer,) = answers
    assert streamed.generated == alone(PROMPT, kv_class, unified, response_tokens=5).generated
    assert (
        answer.generated == alone("somebody else", kv_class, unified, response_tokens=4).generated
    )


@pytest.mark.parametrize("chunk", [7, 32, 100])
def test_a_prefill_in_slices_equals_one_in_a_piece(
    engine: Engine, kv_class: str, unified: bool, chunk: int
) -> None:
    """Reply, context and what is reused afterwards do not depend on the slices."""
    context_opts = {"kv_unified": unified}
    whole = load_stub(engine, "whole", tier=[], kv_class=kv_class, context_opts=context_opts)
    sliced = load_stub(
        engine,
        "sliced",
        kv_class=kv_class,
        context_opts=context_opts,
        policy={"prefill_chunk_size": chunk},
    )
    expected = whole.complete(PROMPT, response_tokens=12)
    done = sliced.complete(PROMPT, response_tokens=12)
    assert (done.generated, done.context_tokens) == (expected.generated, expected.context_tokens)
    again = sliced.complete(PROMPT, response_tokens=12)
    assert (again.cache_hit_kind, again.cache_delta) == ("exact", CacheDelta(N, 12))
    assert again.generated == expected.generated


def test_the_table_of_pattern_17(engine: Engine, kv_class: str, unified: bool) -> None:
    """Row by row: cold, partial, exact, and a save that min_tokens suppresses."""
    context_opts = {"kv_unified": unified}
    model = load_stub(engine, kv_class=kv_class, context_opts=context_opts)

    cold = model.complete(PROMPT, response_tokens=10)
    assert (cold.cache_hit_kind, cold.cache_delta) == ("cold", CacheDelta(0, N + 10))

    longer = model.complete([*cold.context_tokens, 65, 66], response_tokens=10)
    committed = longer.committed_tokens
    assert committed == N + 10 + 2 + 10
    assert longer.cache_hit_kind == "partial"
    assert longer.cache_delta == CacheDelta(N + 10, committed - (N + 10))

    exact = model.complete(PROMPT, response_tokens=6)
    assert (exact.cache_hit_kind, exact.cache_delta) == ("exact", CacheDelta(N, 6))

    # The same weights under a policy that saves nothing so short: it still reads.
    picky = load_stub(
        engine,
        "picky",
        kv_class=kv_class,
        context_opts=context_opts,
        policy={"min_tokens": 10_000, "cold_min_tokens": 10_000},
    )
    unsaved = picky.complete(PROMPT, response_tokens=6)
    assert (unsaved.cache_hit_kind, unsaved.cache_delta) == ("exact", CacheDelta(N, 0))
    assert unsaved.finish_key is None
    new = picky.complete("Nobody has asked this before.", response_tokens=6)
    assert (new.cache_hit_kind, new.cache_delta) == ("cold", CacheDelta(0, 0))
    assert new.finish_key is None


def test_the_arithmetic_of_pattern_14(engine: Engine, kv_class: str, unified: bool) -> None:
    """A continuation reads prompt and completion of the turn before, and adds what it adds."""
    model = load_stub(engine, kv_class=kv_class, context_opts={"kv_unified": unified})
    first = model.complete(PROMPT, session_id="conversation", response_tokens=11)
    prior = first.stats.prompt_tokens + first.stats.completion_tokens
    assert prior == first.committed_tokens == len(first.context_tokens) == N + 11
    suffix = model.tokenize("and now?")
    second = model.continue_session(suffix, session_id="conversation", response_tokens=7).result()
    assert second.cache_hit_kind == "continuation"
    assert second.cache_delta == CacheDelta(prior, len(suffix) + second.stats.completion_tokens)
    assert second.committed_tokens == len(second.context_tokens) == prior + len(suffix) + 7
    assert second.context_tokens[prior : prior + len(suffix)] == tuple(suffix)


def test_another_session_shares_a_common_prefix_and_no_more(
    engine: Engine, kv_class: str, unified: bool
) -> None:
    """What two sessions have in common may be reused; what one of them said is its own."""
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_seq_max": 3, "kv_unified": unified, "resident_cells_max": 512},
    )
    ann = model.complete(PROMPT + "I am Ann.", session_id="ann", response_tokens=8)
    bob = model.complete(PROMPT + "I am Bob.", session_id="bob", response_tokens=8)
    assert bob.cache_delta.read <= N + len("I am ")
    expected = alone(PROMPT + "I am Bob.", kv_class, unified, response_tokens=8)
    assert bob.generated == expected.generated
    more = model.continue_session([65], session_id="ann", response_tokens=8).result()
    assert more.cache_delta.read == ann.committed_tokens
    assert more.context_tokens[: ann.committed_tokens] == ann.context_tokens


def test_every_way_out_gives_the_sequence_back(
    engine: Engine, kv_class: str, unified: bool
) -> None:
    """Finished, failed, cancelled, out of time: the next request has the sequence."""
    model = load_stub(
        engine,
        kv_class=kv_class,
        context_opts={"n_seq_max": 1, "kv_unified": unified},
        faults={"fail_step": 3},
    )
    model.complete(PROMPT, response_tokens=1)  # steps 1 and 2
    with pytest.raises(Exception, match="step"):
        model.complete("this one fails", response_tokens=4)
    with model.infer(PROMPT * 2, response_tokens=50) as stream:
        stream.cancel()
    done = model.complete(PROMPT + "at last", response_tokens=5)
    expected = alone(PROMPT + "at last", kv_class, unified, response_tokens=5)
    assert done.generated == expected.generated
    assert engine.flush(10)
    assert (model.info().available_seqs, model.pending_len()) == (1, 0)

"""What a router asks: answered while a step blocks the worker, and for unknown ids."""

from __future__ import annotations

from erllama_backend_stub.faults import gate
from erllama_core import CacheHit
from stub_engine import load_stub, make_engine

PROMPT = "A router that looks for the least loaded model must not wait for any of them."


def test_observation_does_not_wait_for_the_worker() -> None:
    """phase, pending_len, last_cache_hit and model_info while a step hangs."""
    held = gate("observe")
    with make_engine() as engine:
        model = load_stub(
            engine,
            context_opts={"n_seq_max": 1},
            faults={"hang_step": 2, "hang_gate": "observe"},
        )
        assert (engine.phase("stub"), engine.last_cache_hit("stub")) == ("idle", None)
        running = model.infer(PROMPT, response_tokens=4)
        assert held.wait_reached(10)
        waiting = [model.infer(PROMPT, response_tokens=4) for _ in range(2)]
        assert engine.phase("stub") == "generating"
        assert engine.last_cache_hit(model) == CacheHit("cold", 0)
        info = engine.model_info("stub")
        assert (info.status, info.available_seqs, info.n_seq_max) == ("generating", 0, 1)
        held.open()
        for stream in (running, *waiting):
            stream.result()
        assert engine.last_cache_hit("stub") == CacheHit("exact", len(PROMPT))
        assert engine.flush()
        assert (engine.phase("stub"), engine.pending_len("stub")) == ("idle", 0)


def test_unknown_ids_are_idle() -> None:
    """A model that is not loaded has no phase, no queue and no hit, and that is no error."""
    with make_engine() as engine:
        assert engine.phase("nobody") == "idle"
        assert engine.pending_len("nobody") == 0
        assert engine.last_cache_hit("nobody") is None


def test_a_model_that_was_unloaded_is_not_its_successor() -> None:
    """What is asked of it is not answered for another model under its id."""
    with make_engine() as engine:
        before = load_stub(engine)
        before.complete("a prompt", response_tokens=2)
        before.unload()
        after = load_stub(engine)
        after.complete("another prompt", response_tokens=2)
        assert engine.last_cache_hit(after) is not None
        assert engine.last_cache_hit(before) is None

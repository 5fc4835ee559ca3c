"""The awaitable twins."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from erllama_backend_stub.faults import gate
from erllama_core import AsyncEngine, Cache, Engine, TextDelta
from erllama_core.engine.aio import AsyncCache
from erllama_core.errors import PromptTooLong
from stub_engine import load_stub, make_engine

PROMPT = "The awaitable twin of every blocking call has the same name."


def test_the_twins_give_what_the_calls_give() -> None:
    """complete, infer, tokenize and embed through engine.aio."""

    async def run() -> None:
        with make_engine() as engine:
            model = load_stub(engine)
            expected = model.complete(PROMPT, response_tokens=8)
            done = await engine.aio.complete("stub", PROMPT, response_tokens=8)
            assert done.generated == expected.generated
            stream = await engine.aio.infer(model, PROMPT, response_tokens=8)
            text = "".join([e.text async for e in stream if isinstance(e, TextDelta)])
            assert text == expected.reply
            assert await engine.aio.tokenize("stub", "ab") == [97, 98]
            assert await engine.aio.embed("stub", "ab") == model.embed("ab")
            with pytest.raises(PromptTooLong):
                await engine.aio.complete(model, "x" * 5000)
            assert await engine.aio.flush(10)
            await engine.aio.unload(model)
            assert engine.models() == []
            assert (await engine.aio.pressure.force_check()).checks == 1

    asyncio.run(run())


def test_many_tasks_share_one_model() -> None:
    """Twenty tasks at once, each with its own reply."""

    async def run() -> None:
        with make_engine() as engine:
            model = load_stub(engine, context_opts={"n_ctx": 2000, "n_seq_max": 4})
            plain = load_stub(engine, "plain", tier=[])
            prompts = [f"{number}: {PROMPT}" for number in range(20)]
            done = await asyncio.gather(
                *(engine.aio.complete(model, prompt, response_tokens=6) for prompt in prompts)
            )
            for prompt, completion in zip(prompts, done, strict=True):
                expected = plain.complete(prompt, response_tokens=6)
                assert completion.generated == expected.generated

    asyncio.run(run())


def test_cancelling_the_task_cancels_the_request() -> None:
    """A cancelled await frees the sequence for the next request."""

    async def run() -> None:
        with make_engine() as engine:
            held = gate("async")
            model = load_stub(
                engine,
                context_opts={"n_ctx": 1_000_000, "n_seq_max": 1},
                faults={"hang_step": 3, "hang_gate": "async"},
            )
            task = asyncio.create_task(engine.aio.complete(model, PROMPT))
            assert await asyncio.to_thread(held.wait_reached, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            held.open()
            done = await engine.aio.complete(model, "next", response_tokens=2)
            assert len(done.generated) == 2

    asyncio.run(run())


def test_the_cache_for_coroutines() -> None:
    """What blocks of the cache has a twin that gives what the call gives."""
    at_once = {"any_lasts", "can_change_quota", "counters", "held_bytes", "memory", "pins"}
    at_once |= {"tier_names"}
    # An engine's own business.
    internal = {"close", "discover", "disown", "fetch", "free_memory", "free_pages"}
    internal |= {"is_scanned", "named_objects", "when_scanned"}
    public = {name for name, value in vars(Cache).items() if callable(value) and name[0] != "_"}
    twins = public - at_once - internal
    assert twins == {name for name in vars(AsyncCache) if name[0] != "_"}
    for name in twins:
        expected = inspect.signature(getattr(Cache, name)).parameters
        assert list(inspect.signature(getattr(AsyncCache, name)).parameters) == list(expected)

    async def run() -> None:
        with make_engine() as engine:
            cache = engine.aio.cache
            done = load_stub(engine).complete(PROMPT, response_tokens=8)
            assert await cache.flush(10)
            assert await cache.wait_scanned(10)
            assert done.finish_key is not None
            assert await cache.pin(done.finish_key) is not None
            assert engine.cache.pins().keys() == {done.finish_key}
            assert await cache.evict_bytes(1) is not None
            await cache.unpin(done.finish_key)
            assert len(await cache.dump()) == len(engine.cache.dump()) > 0
            assert await cache.usage() == engine.cache.usage()
            await cache.gc()
            assert await cache.dump() == []

    asyncio.run(run())


def test_every_blocking_call_has_a_twin() -> None:
    """What engine.aio lacks of the engine's methods waits for nothing."""
    at_once = {
        "cancel",
        "detokenize",
        "end_session",
        "from_config",
        "last_cache_hit",
        "model",
        "model_info",
        "models",
        "phase",
        "pending_len",
        "queue_depth",
        "verify_thinking",
        "why",
    }
    methods = {name for name in dir(Engine) if callable(getattr(Engine, name))}
    public = {name for name in methods if not name.startswith("_")}
    assert public - set(vars(AsyncEngine)) == at_once
    for name in public - at_once:
        expected = list(inspect.signature(getattr(Engine, name)).parameters)
        if name != "apply_chat_template":  # its keywords pass through
            assert list(inspect.signature(getattr(AsyncEngine, name)).parameters) == expected


def test_cancelling_a_task_cancels_its_prefill() -> None:
    """A prefill whose task is cancelled leaves its sequence to others."""

    async def run() -> None:
        held = gate("twin of prefill")
        with make_engine() as engine:
            model = load_stub(engine, faults={"hang_gate": "twin of prefill", "hang_step": 1})
            task = asyncio.ensure_future(engine.aio.prefill_only(model, PROMPT))
            assert await asyncio.to_thread(held.wait_reached, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            held.open()
            assert await asyncio.to_thread(model.settle, 10)
            done = await engine.aio.complete(model, PROMPT, response_tokens=2)
            assert len(done.generated) == 2

    asyncio.run(run())

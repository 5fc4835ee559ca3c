"""Notifications: what plugins are told, and that nobody waits for them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_core import Engine, PluginHost, load_config
from erllama_core.errors import EngineReset, PluginFailed
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.telemetry import (
    CacheEvent,
    ModelLoaded,
    Notification,
    RequestFinished,
)
from erllama_core.telemetry import Listener, Notifier
from stub_engine import load_stub

PROMPT = "What listeners are told comes in the order in which it happened. "


class Told:
    """A plugin that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Notification] = []
        self.threads: set[str] = set()

    def _keep(self, event: Notification) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread().name)

    @hookimpl
    def erllama_model_loaded(self, event: ModelLoaded) -> None:
        self._keep(event)

    @hookimpl
    def erllama_request_finished(self, event: RequestFinished) -> None:
        self._keep(event)

    @hookimpl
    def erllama_cache_event(self, event: CacheEvent) -> None:
        self._keep(event)


def engine_with(*plugins: object, **config: Any) -> Engine:
    host = PluginHost()
    for plugin in plugins:
        host.register(plugin)
    return Engine(load_config(config, environ={}), plugins=host)


def test_listeners_are_told_of_a_models_life() -> None:
    """Loading, every answer, and every stored object is told, on a thread of its own."""
    told = Told()
    with engine_with(told) as engine:
        model = load_stub(engine)
        done = model.complete(PROMPT, response_tokens=4)
        engine.flush()
        engine.cache.gc()
    loaded, *rest = told.events
    assert isinstance(loaded, ModelLoaded)
    assert (loaded.model.id, loaded.seconds > 0) == ("stub", True)
    (finished,) = (event for event in rest if isinstance(event, RequestFinished))
    assert (finished.model_id, finished.stats, finished.error) == ("stub", done.stats, None)
    objects = [event for event in rest if isinstance(event, CacheEvent)]
    stored = {(e.kind, e.key, e.size_bytes) for e in objects if e.action == "stored"}
    evicted = {(e.kind, e.key, e.size_bytes) for e in objects if e.action == "evicted"}
    assert done.finish_key in {key for _, key, _ in stored}
    assert stored >= evicted
    assert evicted
    assert {e.tier for e in objects} == {"ram"}
    assert {e.save_reason for e in objects} <= {"cold", "finish"}
    assert told.threads == {"erllama-notifier"}


def test_an_error_is_told_with_what_it_was() -> None:
    """A request that ends with an error is told too, once."""
    told = Told()
    with engine_with(told) as engine:
        model = load_stub(engine, decode_us=5000)
        stream = model.infer(PROMPT, session_id="a", response_tokens=900)
        stream.next_event(10)
        model.reset_session("a")
        with pytest.raises(EngineReset):
            stream.result()
    (finished,) = (event for event in told.events if isinstance(event, RequestFinished))
    assert finished.request_id == stream.request_id
    assert isinstance(finished.error, EngineReset)
    assert finished.stats is None


def test_a_listener_that_raises_disturbs_nobody() -> None:
    """It is logged once; requests and the other listeners go on, and it is called again."""

    class Raises:
        calls = 0

        @hookimpl
        def erllama_request_finished(self) -> None:  # a listener may leave the argument out
            self.calls += 1
            raise ValueError("not today")

    raises, told = Raises(), Told()
    with capture_logs() as logs, engine_with(told, raises) as engine:
        model = load_stub(engine)
        for _ in range(3):
            model.complete(PROMPT, response_tokens=2)
    assert raises.calls == 3
    assert sum(isinstance(event, RequestFinished) for event in told.events) == 3
    (line,) = (one for one in logs if one["event"] == "listener.raised")
    assert (line["plugin"], line["hook"]) == (
        Raises.__qualname__,
        "erllama_request_finished",
    )


def test_a_listener_that_hangs_holds_up_no_request() -> None:
    """Requests are answered while a listener blocks; what it missed is counted."""
    go_on = threading.Event()
    notifier = Notifier(
        {"erllama_cache_event": [Listener("slow", lambda _: go_on.wait())]}, max_waiting=2
    )
    event = CacheEvent(
        action="stored",
        tier="ram",
        kind="kv",
        key=b"k" * 32,  # type: ignore[arg-type]
        size_bytes=1,
        save_reason="cold",
    )
    for _ in range(6):
        notifier.tell(event)
    assert notifier.dropped >= 3  # one is being told, two wait
    with capture_logs() as logs:
        notifier.close(timeout_s=0.01)
    assert [line["event"] for line in logs] == ["notifier.left_behind"]
    go_on.set()
    notifier.close()
    assert "erllama-notifier" not in {thread.name for thread in threading.enumerate()}


def test_nobody_listens() -> None:
    """Without listeners there is no thread, and the cache puts no event together."""
    with engine_with() as engine:
        assert engine.cache.catalog.on_event is None
        assert "erllama-notifier" not in {thread.name for thread in threading.enumerate()}


def test_listeners_are_listed() -> None:
    """A plugin that only listens has a row that says to what."""
    host = PluginHost(discover=False)
    host.register(Told(), name="metrics")
    (row,) = (row for row in host.listing() if row.name == "metrics")
    assert (row.kind, row.state) == ("listener", "ok")
    assert "erllama_model_loaded, erllama_request_finished, erllama_cache_event" in row.summary


def test_a_listener_with_a_wrong_signature_is_refused() -> None:
    """An argument that the hook does not have is told when the plugin is registered."""

    class Wrong:
        @hookimpl
        def erllama_model_loaded(self, model: object) -> None:
            raise AssertionError

    host = PluginHost(discover=False)
    with pytest.raises(PluginFailed, match="model"):
        host.register(Wrong())

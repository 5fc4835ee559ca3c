"""Loading, closing, logging: what must not leak, block or raise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from erllama_backend_llama import native
from erllama_core.errors import EngineClosed
from erllama_core.interfaces.backend import Row, SamplingParams

Load = Callable[..., Any]
Tiny = Callable[..., Path]


def test_loading_and_closing_does_not_grow(load: Load, tiny: Tiny) -> None:
    """A hundred loads leave less behind than two contexts are large."""
    path = tiny("llama")

    def once() -> None:
        model = load(path, n_ctx=4096)
        context = model.open_context()
        sampler = model.new_sampler(SamplingParams(temperature=1.0), b"")
        assert context.n_ctx == 4096
        sampler.close()
        model.close()

    for _ in range(10):
        once()
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(100):
        once()
    # 4,096 cells of 2,060 bytes, and as much again in compute buffers and weights.
    assert process.memory_info().rss - before < 2 * 4096 * 2060


def test_close_is_idempotent_and_needs_no_context(load: Load, tiny: Tiny) -> None:
    """Weights can be freed with the context open, closed, or never opened; and twice."""
    never = load(tiny("llama"))
    never.close()
    never.close()
    with pytest.raises(EngineClosed):
        never.open_context()
    still = load(tiny("llama"))
    context = still.open_context()
    still.close()
    with pytest.raises(EngineClosed):
        context.step([])
    context.close()


def test_a_second_context_takes_the_place_of_one_that_was_given_up(load: Load, tiny: Tiny) -> None:
    """It is opened beside the first, which may be closed later, or with the model."""
    model = load(tiny("llama"))
    first = model.open_context()
    second = model.open_context()
    for context in (first, second):
        context.step([Row(0, 0, bytes(8), logits=True)])
    assert first.mark(0, None) == second.mark(0, None)
    first.close()
    second.step([Row(0, 2, bytes(4), logits=True)])
    model.close()
    with pytest.raises(EngineClosed):
        second.step([])


def test_models_load_on_many_threads_at_once(load: Load, tiny: Tiny) -> None:
    """Starting llama.cpp and loading are safe from several threads."""
    path, models = tiny("llama"), []

    def work() -> None:
        model = load(path)
        model.open_context()
        models.append(model)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4


def test_native_lines_are_collected_per_thread() -> None:
    """Warnings and errors of this thread are collected, in whole lines; those of others, and
    mere information, are not.
    """
    receive = native._LOG.receive
    with native.collect_log() as lines:
        receive(2, b"information\n", None)
        receive(4, b"first ", None)
        receive(5, b"half\n", None)
        other = threading.Thread(target=receive, args=(4, b"another thread\n", None))
        other.start()
        other.join()
        with native.collect_log() as inner:
            receive(3, b"inner\n", None)
        receive(3, b"second\nthird\n", None)
        receive(1, b"debug\n", None)
    receive(4, b"after\n", None)
    assert lines == [(4, "first half"), (3, "second"), (3, "third")]
    assert inner == [(3, "inner")]
    assert native.reason(lines) == "first half", "a warning before a failure is not its reason"
    assert native.reason(lines[1:]) == "second; third"
    assert native.reason([]) is None


def test_native_lines_go_to_the_log_at_debug() -> None:
    """What llama.cpp says is logged at debug, whatever its own severity."""
    with capture_logs() as logs:
        native._LOG.receive(4, b"it broke \xff\n", None)
    assert [(e["event"], e["log_level"], e["severity"]) for e in logs] == [
        ("llama.native", "debug", "error")
    ]


def test_the_log_callback_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that fails must not throw through llama.cpp's frames."""

    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(native.log, "debug", explode, raising=False)
    native._LOG.receive(4, b"line\n", None)
    native._LOG.receive(4, None, None)

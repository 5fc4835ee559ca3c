"""The log: how it is written, and that nothing of a prompt, a reply or a key is ever in it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog

from erllama_core import Engine, PluginHost
from erllama_core.config import LoggingConfig
from erllama_core.errors import (
    ConfigError,
    ErllamaError,
    PluginFailed,
    PromptTooLong,
    TierError,
    TimeoutExceeded,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.log import get_logger, log_unexpected, told
from erllama_core.interfaces.stream import Channel, ProcessorRequest
from erllama_core.interfaces.telemetry import RequestFinished
from erllama_core.logs import configure_logging, logging_is_ours, reconfigure_logging
from erllama_core.providers import StreamProcessorProvider

MARKER = "XYZZYplugh"
"""In every prompt, reply and key of the scenario."""

log = get_logger("test")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def logged(settings: LoggingConfig) -> io.StringIO:
    written = io.StringIO()
    configure_logging(settings, written)
    return written


# ----------------------------------------------------------------------- writing


def test_json_lines() -> None:
    """One object for each event, with its level, its logger, its time and its fields."""
    written = logged(LoggingConfig(level="info", format="json"))
    log.info("something.happened", bytes=5, where=Path("/x"))
    log.debug("too.low")
    (line,) = written.getvalue().splitlines()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry.pop("timestamp"))
    where = entry.pop("where")
    assert "/x" in where
    assert entry == {
        "event": "something.happened",
        "level": "info",
        "logger": "test",
        "bytes": 5,
    }


def test_text_lines() -> None:
    """A line for a person, without colours where there is no terminal."""
    written = logged(LoggingConfig(level="warning", format="text"))
    log.info("too.low")
    log.warning("something.happened", bytes=5)
    (line,) = written.getvalue().splitlines()
    assert "[warning  ] something.happened" in line
    assert "bytes=5" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("terminal", [True, False])
def test_auto_is_text_on_a_terminal_alone(terminal: bool) -> None:
    """Elsewhere a program reads it."""
    written = io.StringIO()
    written.isatty = lambda: terminal  # type: ignore[method-assign]
    configure_logging(LoggingConfig(), written)
    log.warning("something.happened")
    assert written.getvalue().startswith("{") is not terminal
    assert ("\x1b[" in written.getvalue()) is terminal


def _fail(secret: str) -> None:
    try:
        raise ValueError("no good" if secret else "")
    except ValueError:
        log.exception("something.raised")


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_show_no_variables(form: Any) -> None:
    """A traceback has code and places, and no values, which could be anything."""
    written = logged(LoggingConfig(format=form))
    _fail(MARKER)
    assert "no good" in written.getvalue()
    assert MARKER not in written.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_stream_that_is_gone(error: Exception) -> None:
    """Logging raises nothing, whatever became of the stream."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise error

    configure_logging(LoggingConfig(), Gone())
    log.error("something.happened")
    configure_logging(LoggingConfig(), None)


def test_importing_configures_nothing() -> None:
    """Until an application says otherwise, warnings and errors alone go to standard error."""
    program = (
        "import structlog\n"
        "import erllama_core, erllama_core.logs\n"
        "from erllama_core.interfaces.log import get_logger\n"
        "assert not structlog.is_configured()\n"
        "get_logger('x').info('too.low')\n"
        "get_logger('x').warning('seen')\n"
        "assert not structlog.is_configured()\n"
        "assert not erllama_core.logs.logging_is_ours()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b""
    assert b"seen" in done.stderr
    assert b"too.low" not in done.stderr


def test_another_configuration_is_left_alone() -> None:
    """What an application has configured by itself is not changed by other settings."""
    logged(LoggingConfig())
    assert logging_is_ours()
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(io.StringIO()))
    before = structlog.get_config()
    assert not logging_is_ours()
    assert not reconfigure_logging(LoggingConfig(level="debug"))
    assert structlog.get_config() == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TierError("the disk\nis full"), "TierError: the disk is full"),
        (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
        (ValueError("the prompt is: hello"), "ValueError"),
        (PluginFailed("it raised ValueError('the prompt is: hello')"), "PluginFailed"),
        (KeyError("hello"), "KeyError"),
        (ErllamaError(), "ErllamaError"),
    ],
)
def test_what_is_told_of_an_exception(error: Exception, line: str) -> None:
    """What this project or the system says; of others' exceptions the type alone."""
    assert told(error) == line


def test_an_unexpected_exception() -> None:
    """Where it was raised is logged as an error, what it says at debug."""
    written = logged(LoggingConfig(level="debug", format="json"))
    try:
        {"": 0}["the prompt"]
    except KeyError as error:
        log_unexpected(log, "it.raised", error, model="m")
    shown, detail = (json.loads(line) for line in written.getvalue().splitlines())
    assert (shown["event"], shown["level"], shown["error"]) == ("it.raised", "error", "KeyError")
    assert shown["model"] == "m"
    (place,) = shown["raised_at"]
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+ test_an_unexpected_exception", place)
    assert "the prompt" not in json.dumps(shown)
    assert (detail["level"], detail["of"]) == ("debug", "it.raised")
    assert "KeyError: 'the prompt'" in detail["exception"]


# ---------------------------------------------------------------------- secrecy


@attrs.frozen
class _Options:
    when: str = "feed"


class _Leaky:
    """A processor that complains of what it was given, in full."""

    def __init__(self, request: ProcessorRequest) -> None:
        self._when: str = request.options.when
        self._prompt = request.prompt.text
        self._out = request.outlet

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        if self._when == "feed":
            raise ValueError(f"after {self._prompt!r} came {data!r}")
        self._out.send(token, data, channel)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if self._when == "finish":
            raise RuntimeError(f"cannot end {self._prompt!r}")


class _Plugin:
    @hookimpl
    def erllama_stream_processors(self) -> list[StreamProcessorProvider]:
        return [StreamProcessorProvider("leaky", "x", _Leaky, config=_Options)]

    @hookimpl
    def erllama_request_finished(self, event: RequestFinished) -> None:
        raise LookupError(f"{MARKER} {event}")


def _scenario(tmp_path: Path) -> None:
    """Whatever can happen to requests of an engine, with the marker in all that is said."""
    key = tmp_path / "key"
    key.write_text(f"{MARKER}-{'k' * 40}")
    key.chmod(0o644)
    model = {
        "backend": "stub",
        "context_opts": {"n_ctx": 512, "n_seq_max": 2},
        "policy": {"min_tokens": 8, "cold_min_tokens": 8, "boundary_align_tokens": 32},
        "tier": ["ram", "disk"],
    }
    markers = {
        "thinking_markers": {"start": "<think>", "end": "</think>"},
        "tool_call_markers": {"start": "<tool_call>", "end": "</tool_call>"},
    }
    script = [f"<think>{MARKER}</think>{MARKER}<tool_call>{MARKER}</tool_call>"]
    failing = {"fail_step": 3, "fail_import": 1}
    table: dict[str, Any] = {
        "engine": {"thinking_signing_key_file": str(key)},
        "tiers": [{"name": "disk", "kind": "disk", "root": str(tmp_path / "kvc")}],
        "models": {
            "fine": {**model, **markers, "model_opts": {"script": script}},
            "fails": {**model, "model_opts": {"faults": failing}},
            "leaky": {**model, "processors": ["leaky"], "processor_opts": {"leaky": {}}},
            "finishes": {
                **model,
                "processors": ["leaky"],
                "processor_opts": {"leaky": {"when": "finish"}},
            },
        },
    }
    host = PluginHost()
    host.register(_Plugin())
    chat = [{"role": "user", "content": f"What is {MARKER}?"}]
    long = f"{MARKER} " * 20
    with Engine.from_config(table, plugins=host) as engine:
        prompt = engine.apply_chat_template("fine", chat)
        done = engine.complete("fine", prompt, thinking=True, explain=True)
        assert done.thinking == done.reply == MARKER
        engine.flush()
        engine.complete("fine", prompt, thinking=True, session_id=MARKER, cache_salt=MARKER)
        engine.complete("fine", long, stop_sequences=[MARKER], response_tokens=4)
        with engine.infer("fine", long + "more", response_tokens=100) as stream:
            stream.next_event(timeout_s=10)
        with pytest.raises(TimeoutExceeded):
            engine.complete("fine", long + "late", timeout_s=1e-6)
        with pytest.raises(PromptTooLong):
            engine.complete("fine", long * 9)
        engine.why("fine", prompt)
        for _ in range(4):  # a step fails, and so does an import
            with contextlib.suppress(ErllamaError):
                engine.complete("fails", long, response_tokens=3)
            engine.flush()
        for name in ("leaky", "finishes"):
            with pytest.raises(PluginFailed, match=MARKER):
                engine.complete(name, long, response_tokens=3)
        for row in engine.cache.dump():
            if row.tier == "disk":  # damaged, while the engine runs
                Path(row.location).write_bytes(MARKER.encode() * 10)
        engine.cache.evict_bytes(1 << 30, ["ram"])
        engine.complete("fine", prompt, response_tokens=2)
        table["models"]["fine"]["policy"] = {"min_tokens": 9, "boundary_align_tokens": 32}
        engine.reload()
        with pytest.raises(ConfigError):
            engine.reload({"engine": {"thinking_signing_key_env": MARKER}})
        stream = engine.infer("fails", long, response_tokens=400)
        engine.unload("fails")
        with contextlib.suppress(ErllamaError):
            stream.result()


def _forms(marker: str) -> list[str]:
    """A text in the ways in which it could be written down."""
    tokens = list(marker.encode())
    return [
        marker,
        marker.encode().hex(),
        str(tokens)[1:-1],
        "".join(f"\\x{t:02x}" for t in tokens),
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_whole_scenario_logs_no_content(tmp_path: Path, form: Any) -> None:
    """At info and above nothing of prompts, replies and keys is written, in any form."""
    written = logged(LoggingConfig(level="info", format=form))
    _scenario(tmp_path)
    text = written.getvalue()
    for event in (
        "request.finished",
        "request.failed",
        "plugin.raised",
        "step.failed",
        "restore.refused",
        "object.corrupt",
        "listener.raised",
        "config.questionable",
        "config.reloaded",
        "config.reload_refused",
        "model.loaded",
        "model.unloaded",
    ):
        assert event in text, event
    for way in _forms(MARKER):
        assert way not in text, next(line for line in text.splitlines() if way in line)


def test_the_scenario_would_show_content(tmp_path: Path) -> None:
    """At debug there is some: the scenario does bring it to where things are logged."""
    written = logged(LoggingConfig(level="debug", format="json"))
    _scenario(tmp_path)
    assert MARKER in written.getvalue()


def test_events_of_a_request_name_it(tmp_path: Path) -> None:
    """Each event of a request has its id, which its stream has too, and its model."""
    written = logged(LoggingConfig(level="debug", format="json"))
    _scenario(tmp_path)
    events = [json.loads(line) for line in written.getvalue().splitlines()]
    for entry in events:
        if entry["event"].startswith("request.") or "request" in entry:
            assert isinstance(entry["request"], int)
            assert entry["model"] in {"fine", "fails", "leaky", "finishes"}
    finished = [entry for entry in events if entry["event"] == "request.finished"]
    assert finished[0]["reason"] == "stop"
    assert finished[0]["cache_hit"] == "cold"
    ids = [entry["request"] for entry in events if entry["event"].startswith("request.f")]
    assert len(set(ids)) == len(ids)

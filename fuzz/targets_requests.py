"""Requests: prompts and options as a service would hand them on, unlooked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from target import Run, Target
from targets_chat import parsed

from erllama_core import Engine, Prompt
from erllama_core.errors import ErllamaError, RequestError, SessionError

_REFUSALS = (RequestError, SessionError, TypeError, ValueError)
"""What docs/requests.md and the methods say."""


@contextmanager
def _requests() -> Iterator[Run]:
    with Engine() as engine:
        model = engine.load_model(
            "stub",
            backend="stub",
            context_opts={"n_ctx": 96, "n_seq_max": 2},
            thinking_markers={"start": "<think>", "end": "</think>"},
            tool_call_markers={"start": "<tool_call>", "end": "</tool_call>"},
        )
        healthy = model.complete("Hello", response_tokens=2).generated

        def run(data: bytes) -> None:
            given = parsed(data)
            if not isinstance(given, dict):
                return
            prompt, options = given.get("prompt"), given.get("options", {})
            if not isinstance(options, dict):
                return
            if isinstance(given.get("key"), str):
                options["parent_key"] = given["key"].encode("utf-8", "replace")
            options = {"response_tokens": 3, **options}
            if not isinstance(options["response_tokens"], int) or options["response_tokens"] > 8:
                options["response_tokens"] = 8
            with suppress(*_REFUSALS):
                _ask(model, given.get("do"), prompt, options)
            assert model.complete("Hello", response_tokens=2).generated == healthy

        yield run


def _ask(model: Any, what: object, prompt: Any, options: dict[str, Any]) -> None:
    if what == "tokens":
        with suppress(ErllamaError):
            model.detokenize(prompt)
        assert list(Prompt(prompt)) == list(prompt)
    elif what == "continue":
        options.setdefault("session_id", "s")
        model.complete("Hello", response_tokens=2, session_id="s")
        model.continue_session(prompt, **options).result()
    elif what == "embed":
        model.embed(prompt)
    elif what == "replay":
        done = model.complete("Hello", response_tokens=2)
        model.put_replay(prompt, done)
        model.get_replay(prompt)
    else:
        model.complete(prompt, **options)


TARGETS = (
    Target(
        name="request",
        open=_requests,
        is_json=True,
        words=(
            *(b'"prompt":', b'"options":{', b'"seed":', b'"temperature":', b'"json_schema":'),
            *(
                b'"grammar":"root ::= [a-z]+"',
                b'"stop_sequences":["',
                b'"session_id":',
                b"4294967296",
            ),
            *(b'"logprobs":', b'"timeout_s":0', b'"thinking":true', b"-1", b"1e400", b'"\\ud800"'),
        ),
        seconds=10.0,
        base_bytes=64 << 20,
        factor=2000,
        quick_runs=60,
    ),
)

"""Chats: templates out of model files, and messages out of requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from target import Run, Target

from erllama_core import Engine
from erllama_core.errors import InvalidPrompt, TemplateError
from erllama_core.model import replay
from erllama_core.model.chat import render_chat

TEMPLATE = """
{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.content is string -%}{{- m.content | trim -}}
{%- elif m.content is iterable -%}
    {%- for part in m.content if part.text -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
    {{- '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <|im_end|> kind."},
    {"role": "user", "content": "Hello \U0001f600"},
    {"role": "assistant", "content": "Hi.", "tool_calls": [{"id": "a", "function": {"x": 1}}]},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]


def text_of(data: bytes) -> str:
    """Data as text; of what is not UTF-8, each byte a lone surrogate or none at all."""
    return data.decode("utf-8", "surrogateescape" if len(data) % 2 else "replace")


def parsed(data: bytes) -> Any:
    """What data is as JSON, lone surrogates and all; None when it is none."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


@contextmanager
def _stub(**options: Any) -> Iterator[Any]:
    with Engine() as engine:
        yield engine.load_model(
            "stub", backend="stub", context_opts={"n_ctx": 4096}, policy={}, **options
        )


@contextmanager
def _templates() -> Iterator[Run]:
    with _stub() as model:
        vocabulary = model._backend.vocabulary

        def run(data: bytes) -> None:
            with suppress(TemplateError, InvalidPrompt):
                prompt = render_chat(vocabulary, text_of(data), CHAT, tools=[{"name": "look"}])
                assert prompt.text is not None

        yield run


@contextmanager
def _messages() -> Iterator[Run]:
    with _stub(chat_template=TEMPLATE) as model:
        done = model.complete("Hello", response_tokens=3)
        model.put_replay("a", done)

        def run(data: bytes) -> None:
            given = parsed(data)
            if not isinstance(given, dict):
                return
            messages = given.get("messages", [])
            if not isinstance(messages, list):
                return
            with suppress(TemplateError, InvalidPrompt):
                prompt = model.apply_chat_template(
                    messages, tools=given.get("tools"), documents=given.get("documents")
                )
                model.detokenize(prompt)
            for message in messages:
                if isinstance(message, dict):
                    assert all(isinstance(name, str) for name in replay.ids_of(message))
                    assert isinstance(replay.text_of(message), str)

        yield run


TARGETS = (
    Target(
        name="template",
        open=_templates,
        words=(
            *(b"{{ ", b" }}", b"{% ", b" %}", b"{%- for m in messages -%}", b"{% endfor %}"),
            *(b"{% if ", b"{% endif %}", b"{% set x = ", b"{% macro f(a) %}", b"{% endmacro %}"),
            *(b"{% call ", b"{% filter ", b"{% raw %}", b"{% block a %}", b"{% include 'a' %}"),
            *(b"{% import 'a' as a %}", b"{% extends 'a' %}", b"| tojson", b"| join", b"| map("),
            *(b"| indent(", b"| replace(", b"| format(", b"| batch(", b"| slice(", b"| sort"),
            *(b"'%99999999d' % 1", b"range(999999999)", b"'a' * 99999999", b"2 ** 99999", b"~ x"),
            *(b".__class__", b"|attr('__init__')", b"cycler(", b"namespace(", b"joiner(", b"("),
            *(b"messages", b"loop(", b"recursive", b"strftime_now('", b"raise_exception(", b"["),
            *(b".format(", b".__mro__", b"[::-1]", b"is defined", b" not ", b"-", b"dict(", b"."),
        ),
        seconds=12.0,
        # The budget of characters; a string has up to four bytes for each.
        base_bytes=320 << 20,
        factor=4000,
    ),
    Target(
        name="messages",
        open=_messages,
        is_json=True,
        words=(
            *(b'{"role":"user","content":', b'"tool_calls":[', b'"<|im_start|>"', b"[", b"{", b"]"),
            *(
                b'"\\ud800"',
                b"null",
                b'"id":',
                b'"signature":"',
                b'"replay":["a"]',
                b'"text":',
                b"}",
            ),
        ),
        seconds=12.0,
        base_bytes=320 << 20,
        factor=4000,
    ),
)

"""Chat templates: the Jinja dialect that models ship their prompt format in.

The dialect is that of Hugging Face's ``apply_chat_template`` (transformers,
``utils/chat_template_utils.py``), which is what the authors of templates test against.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from erllama_core.errors import TemplateError


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(jinja2.TemplateError):
    """The template called ``raise_exception``."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template; thread-safe. Raises TemplateError with the line of a mistake.

    A template arrives inside a model file, so it runs in Jinja's sandbox.
    """
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is broken in line {error.lineno}: {error.message}"
        ) from error


def render_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that the template makes of ``variables``. Raises TemplateError."""
    try:
        return template.render(variables)
    except _Refused as error:
        raise TemplateError(f"the chat template refused the messages: {error}") from error
    except Exception as error:
        # A template is a program over the caller's values: what it raises is not ours to list.
        raise TemplateError(
            f"the chat template failed on these messages: {type(error).__name__}: {error}"
        ) from error

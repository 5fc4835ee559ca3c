"""Chat templates: the Jinja dialect that models ship their prompt format in.

The dialect is that of Hugging Face's ``apply_chat_template`` (transformers,
``utils/chat_template_utils.py``), which is what the authors of templates test against. Left out
are filters and functions of Jinja's that write HTML or nonsense, which no prompt has a use for:
``lipsum``, ``pprint``, ``striptags``, ``urlencode``, ``urlize``, ``wordwrap``, ``xmlattr``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import jinja2

from erllama_core.errors import TemplateError
from erllama_core.model.template_budget import TooMuch
from erllama_core.model.template_filters import Refused, check_pattern, refuse
from erllama_core.model.template_sandbox import ChatEnvironment, render

MAX_TEMPLATE_CHARACTERS: Final = 1 << 17
"""The longest in use have some 30,000."""


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(check_pattern(pattern))


@functools.cache
def _environment() -> ChatEnvironment:
    return ChatEnvironment({"raise_exception": refuse, "strftime_now": _strftime_now})


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template; thread-safe. Raises TemplateError with the line of a mistake.

    A template arrives inside a model file, so it runs in a sandbox.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError(
            f"the chat template has {len(source)} characters; {MAX_TEMPLATE_CHARACTERS} at most"
        )
    try:
        return _environment().compile_metered(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is broken in line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:
        # Nesting too deep for Jinja or for Python, numbers with too many digits.
        raise TemplateError(
            f"the chat template cannot be compiled: {type(error).__name__}: {error}"
        ) from error


def render_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that the template makes of ``variables``. Raises TemplateError."""
    try:
        return render(template, variables)
    except Refused as error:
        raise TemplateError(f"the chat template refused the messages: {error}") from error
    except TooMuch as error:
        raise TemplateError(f"the chat template was stopped: {error}") from error
    except Exception as error:
        # A template is a program over the caller's values: what it raises is not ours to list.
        raise TemplateError(
            f"the chat template failed on these messages: {type(error).__name__}: {error}"
        ) from error

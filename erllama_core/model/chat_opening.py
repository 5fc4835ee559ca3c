"""Where a rendered chat ends and the tokens begin that open the reply."""

from __future__ import annotations

from collections.abc import Callable

from erllama_core.errors import TemplateError
from erllama_core.prompt import Prompt


def with_opening(prompt: Prompt, closed: Callable[[], Prompt]) -> Prompt:
    """A rendered chat that says how many of its tokens open the reply.

    ``closed`` renders the same chat without them. Where that is no beginning of the prompt, or
    the template refuses, nothing is said. Models that cannot rewind keep their state there, as
    the next turn may open or render the reply otherwise.
    """
    try:
        before = closed()
    except TemplateError:
        return prompt
    opening_tokens = len(prompt) - len(before)
    if opening_tokens <= 0 or not prompt.packed.startswith(before.packed):
        return prompt
    return Prompt.from_packed(prompt.packed, prompt.text, opening_tokens=opening_tokens)

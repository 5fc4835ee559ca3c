"""Noticing templates that are not append-only.

A chat is found in the cache as far as its prompt begins like the one before. Some templates say
earlier turns differently once there are later ones: they drop what was thought, or move the
tools to the last question. Then every turn computes again what follows the first difference, and
nothing but a slow reply would tell.

So a chat is rendered again as it was when the model was last asked, and as it was when the model
had just answered: what it says now must begin with both. That is done once for each shape of
chat, and no more once a difference was found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from erllama_core.errors import TemplateError
from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.model")

_MAX_SHAPES: Final = 64
_LATEST: Final = 6
"""Messages that the shape of a chat goes by, and what there is at the beginning."""
_END_CHARACTERS: Final = 32
"""By which the end of a content is found again."""

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Messages, and whether a reply is asked for, to text."""


class AppendOnlyCheck:
    """Warns once for one loaded model. Thread-safe."""

    def __init__(self, model_id: str) -> None:
        self._model_id: Final = model_id
        self._lock: Final = threading.Lock()
        self._seen: Final[set[object]] = set()
        self._done = False
        """A difference was found, or enough shapes were looked at."""
        self._warned = False

    def look(
        self,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        render: Render,
        variables: Mapping[str, Any],
    ) -> None:
        """Check a chat that was rendered to ``text``, unless one like it was checked before."""
        if self._done:
            return
        place = _last_answered(messages)
        if place is None:
            return
        shape = _shape(messages, variables)
        with self._lock:
            if shape in self._seen:
                return
            self._seen.add(shape)
            self._done = len(self._seen) >= _MAX_SHAPES
        try:
            found = _difference(messages, place, text, render)
        except TemplateError:
            return  # it may refuse a chat that stops there
        if found is not None:
            self._warn(*found, messages)

    def _warn(self, place: int, at: int, messages: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = self._done = True
        log.warning(
            "chat.not_append_only",
            model=self._model_id,
            message=place,
            role=messages[place]["role"],
            of_messages=len(messages),
            at_character=at,
            advice="the template renders this message differently once the chat goes on, so each "
            "turn computes again what follows it; keep the model's turns with put_replay, change "
            "the template with chat_template, or give it the variables that leave turns alone",
        )


def _last_answered(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """The last reply that something follows."""
    for place in range(len(messages) - 2, 0, -1):
        if messages[place]["role"] == "assistant":
            return place
    return None


def _shape(messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> object:
    return (
        *(_outline(message) for message in (messages[0], *messages[-_LATEST:])),
        tuple(sorted(name for name, value in variables.items() if value is not None)),
    )


def _outline(message: Mapping[str, Any]) -> object:
    content = message.get("content")
    thinks = isinstance(content, str) and "</think" in content
    return message["role"], thinks, tuple(sorted(name for name in message if message[name]))


def _difference(
    messages: Sequence[Mapping[str, Any]], place: int, text: str, render: Render
) -> tuple[int, int] | None:
    """The message that is said differently now, and the character from which on the text is."""
    asked = render(messages[:place], True)
    at = _common(asked, text)
    if at == len(asked):
        # What a template adds behind the last message of all is not of that message.
        answered = render(messages[: place + 1], False)
        at = _common(answered, text)
        if at >= _end_of_content(answered, messages[place]):
            return None
    return _message_at(messages, place, text, render), at


def _end_of_content(text: str, message: Mapping[str, Any]) -> int:
    """Where the content of the last message ends; 0 when that cannot be told."""
    content = message.get("content")
    end = content.strip()[-_END_CHARACTERS:] if isinstance(content, str) else ""
    found = text.rfind(end) if end else -1
    return 0 if found < 0 else found + len(end)


def _message_at(
    messages: Sequence[Mapping[str, Any]], place: int, text: str, render: Render
) -> int:
    """The first message with which the chat up to it no longer begins the text."""
    low, high = 0, place
    while low < high:
        middle = (low + high) // 2
        try:
            begins = text.startswith(render(messages[: middle + 1], False))
        except TemplateError:
            begins = True
        if begins:
            low = middle + 1
        else:
            high = middle
    return high


def _common(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    low, high = 0, min(len(one), len(other)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if other.startswith(one[low:middle], low):
            low = middle
        else:
            high = middle
    return low

"""The texts that mark parts of a model's reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

END_OF_GENERATION: Final = "$eos"
"""As a tool call's end marker: the end of generation ends it."""


@attrs.frozen(kw_only=True)
class ThinkingMarkers:
    """The texts around a model's thinking."""

    start: str
    end: str

    def texts(self) -> Mapping[str, str]:
        """The markers that are looked for, by field."""
        return {"start": self.start, "end": self.end}

    def problems(self) -> list[tuple[str, str]]:
        """A field and what is wrong with it, for each mistake."""
        return _problems(self.texts())


@attrs.frozen(kw_only=True)
class ToolCallMarkers:
    """The texts around a model's tool calls, and around free text within them."""

    start: str
    end: str
    """``"$eos"``: the end of generation."""
    payload_start: str | None = None
    payload_end: str | None = None

    def texts(self) -> Mapping[str, str]:
        """The markers that are looked for, by field."""
        named = {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}
        return {
            name: text
            for name, text in named.items()
            if text is not None and (name, text) != ("end", END_OF_GENERATION)
        }

    def problems(self) -> list[tuple[str, str]]:
        """A field and what is wrong with it, for each mistake."""
        found = _problems(self.texts())
        if (self.payload_start is None) != (self.payload_end is None):
            missing = "payload_start" if self.payload_start is None else "payload_end"
            found.append((missing, "missing; the two payload markers come together"))
        return found


def _problems(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    first: dict[str, str] = {}
    for name, text in texts.items():
        if not text:
            found.append((name, "empty"))
        elif not _is_unicode(text):
            found.append((name, "not valid Unicode: it has a lone surrogate"))
        elif first.setdefault(text, name) != name:
            found.append((name, f"{text!r} is {first[text]} too; markers must differ"))
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

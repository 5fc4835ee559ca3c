r"""Control tokens that were typed: how a chat's contents are kept from steering the model.

A rendered chat is one string, in which ``<|im_end|>`` written by the template and the same
characters typed by a user look alike. To tell them apart a chat is rendered a second time,
with every character of the contents that could begin or end a control token replaced by a
*stand-in*: a private-use character that occurs nowhere else. Control tokens found in that
second text begin and end with characters of the template (or of an assistant's turn).

One character stands for one, so lengths, slices, splits at white space and loops come out the
same in both renderings, and a position in one is the same position in the other. Replacing
single characters rather than whole control tokens matters: ``<|im_`` and ``end|>`` from two
messages, ``<|im_\nend|>`` with the line break removed, or ``<|IM_END|>`` in lower case must
not make a token either.

Covered is whatever moves, cuts, joins, repeats, drops or changes the case of characters. A
template that *computes* new characters from contents (by decoding HTML entities, or using a
content as a format string), or that writes a control token's outer characters itself around a
part of a content, has written the token itself. Roles are the template's words, and trusted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from erllama_core.errors import TemplateError

_STAND_INS: Final = range(0x100000, 0x10FFFE)
"""Unicode's supplementary private use area B."""

_BODY_KEYS: Final = frozenset({"content", "text"})
"""Where what somebody wrote is kept; other strings of a message can be words of a format."""

_WORD_KEY: Final = "type"
"""Where a message keeps a word that templates compare; mapping keys are treated like it."""


@attrs.frozen
class Occurrence:
    """A control token in a text: characters [start, end)."""

    start: int
    end: int
    token: int


@attrs.frozen(eq=False)
class ControlSyntax:
    """The texts of a vocabulary's control tokens, ready to be searched for."""

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    """Any control token; the longest where several begin."""
    folded: tuple[str, ...]
    """The texts in lower case."""
    outer: frozenset[str]
    """Characters that begin or end a control token."""
    heads: frozenset[str]
    """Proper prefixes, in lower case."""
    tails: frozenset[str]
    """Proper suffixes, in lower case."""

    def find(self, text: str) -> list[Occurrence]:
        """The control tokens in ``text``, in order."""
        return [
            Occurrence(match.start(), match.end(), self.ids[match.group()])
            for match in self.pattern.finditer(text)
        ]

    def touches(self, text: str) -> bool:
        """Whether an edge of ``text`` could be a part of a control token around the edge."""
        text = text.strip().lower()
        longest = range(1, min(len(text), max(map(len, self.folded), default=0)) + 1)
        return any(text[-n:] in self.heads or text[:n] in self.tails for n in longest)

    def inside(self, text: str) -> bool:
        """Whether all of ``text`` is an inner part of a control token."""
        text = text.strip().lower()
        return bool(text) and any(text in control[1:-1] for control in self.folded)

    def spelled_in(self, text: str) -> bool:
        """Whether ``text`` holds a whole control token, in any case."""
        text = text.lower()
        return any(control in text for control in self.folded)

    def within(self, alphabet: Iterable[str]) -> bool:
        """Whether some control token has no other characters than these, in any case."""
        reach = set().union(*map(_cases, alphabet))
        return any(reach.issuperset(text) for text in self.ids)


@functools.lru_cache(maxsize=16)
def _syntax(tokens: tuple[tuple[int, str], ...]) -> ControlSyntax:
    ids: dict[str, int] = {}
    for token, text in tokens:
        if text:
            ids.setdefault(text, token)
    longest_first = sorted(ids, key=len, reverse=True)
    folded = tuple(text.lower() for text in ids)
    return ControlSyntax(
        ids=ids,
        # Without control tokens, a pattern that matches nowhere.
        pattern=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
        folded=folded,
        outer=frozenset(character for text in ids for character in (text[0], text[-1])),
        heads=frozenset(text[:n] for text in folded for n in range(1, len(text))),
        tails=frozenset(text[n:] for text in folded for n in range(1, len(text))),
    )


def control_syntax(control_tokens: Mapping[int, str]) -> ControlSyntax:
    """The syntax of a vocabulary's control tokens; remembered. Thread-safe."""
    return _syntax(tuple(sorted(control_tokens.items())))


def _cases(character: str) -> set[str]:
    """What a change of case makes of a character, itself included."""
    return set(character + character.lower() + character.upper() + character.title())


# ---------------------------------------------------------------------- contents

MAX_DEPTH: Final = 200
"""Of lists and mappings in one another."""

Transform = Callable[[str, str | None], str]
"""Gives a string's replacement; the second argument is the key that it stands under, None at
the top, :data:`_WORD_KEY` for a key itself.
"""


def map_strings(value: Any, transform: Transform, key: str | None = None, depth: int = 0) -> Any:
    """A copy of nested mappings and lists with every string replaced, keys included.

    Raises TemplateError for what is nested too deep, or holds itself.
    """
    if isinstance(value, str):
        return transform(value, key)
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth == MAX_DEPTH:
        raise TemplateError(
            f"the messages, tools or documents are nested more than {MAX_DEPTH} deep"
        )
    if isinstance(value, Mapping):
        return {
            transform(name, _WORD_KEY) if isinstance(name, str) else name: map_strings(
                item, transform, name if isinstance(name, str) else None, depth + 1
            )
            for name, item in value.items()
        }
    return [map_strings(item, transform, key, depth + 1) for item in value]


def map_foreign(chat: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    """A copy of a chat with every string replaced that neither model nor template wrote.

    ``chat`` holds ``messages``, ``tools`` and ``documents``. An assistant's messages stay as
    they are, and so do the roles of all others.
    """

    def keep_role(text: str, key: str | None) -> str:
        return text if key == "role" else transform(text, key)

    return {
        "messages": [
            message if message["role"] == "assistant" else map_strings(message, keep_role)
            for message in chat["messages"]
        ],
        "tools": map_strings(chat["tools"], transform),
        "documents": map_strings(chat["documents"], transform),
    }


@attrs.frozen
class Guard:
    """A replacement of characters by stand-ins, and back."""

    syntax: ControlSyntax
    outer: Mapping[int, int]
    """Code points that could begin or end a control token, to their stand-ins."""
    first: Mapping[int, int]
    """The same for the first characters of contents that are an inner part of one."""

    def protect(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        """The chat with stand-ins in all that neither model nor template wrote."""
        return map_foreign(chat, self._protect)

    def _protect(self, text: str, key: str | None) -> str:
        if key == _WORD_KEY and text.isidentifier() and not self.syntax.spelled_in(text):
            # A control token can begin with a letter; templates must still find "content".
            return text
        if key in _BODY_KEYS and self.syntax.inside(text):
            at = len(text) - len(text.lstrip())
            text = text[:at] + text[at].translate(self.first) + text[at + 1 :]
        return text.translate(self.outer)

    def restore(self, text: str) -> str:
        """The text with the characters that the stand-ins stand for."""
        pairs = (*self.outer.items(), *self.first.items())
        return text.translate({stand_in: character for character, stand_in in pairs})


def guard_for(syntax: ControlSyntax, chat: Mapping[str, Any], elsewhere: str) -> Guard | None:
    """The guard that this chat needs; None when no control token can come from its contents.

    None can, however they are cut and joined, when the contents together lack a character of
    each control token, and when none could lean on text beside it. ``elsewhere`` is other text
    of the rendering, in which no stand-in may occur.
    """
    alphabet: set[str] = set()
    inner: set[str] = set()
    leaning = False

    def note(text: str, key: str | None) -> str:
        nonlocal leaning
        alphabet.update(text)
        leaning = leaning or syntax.touches(text)
        if key in _BODY_KEYS and syntax.inside(text):
            inner.add(text.strip()[0])
        return text

    map_foreign(chat, note)
    if not (leaning or inner or syntax.within(alphabet)):
        return None
    taken = alphabet.union(elsewhere)
    unused = _unused(taken)
    outer = sorted(character for character in alphabet if syntax.outer & _cases(character))
    return Guard(
        syntax=syntax,
        outer={ord(character): next(unused) for character in outer},
        first={ord(character): next(unused) for character in sorted(inner.difference(outer))},
    )


def _unused(taken: set[str]) -> Iterator[int]:
    return (code for code in _STAND_INS if chr(code) not in taken)

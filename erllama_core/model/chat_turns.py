"""Turns of the model in a chat that is rendered: put in place of what a template makes of them.

The message of such a turn is rendered with one character for a content, which occurs nowhere
else; where it comes out, the turn goes in. A template writes the beginning of a turn once when it
asks for it, and again when it shows it, not always in the same way: some open a block of thinking
in the one case alone. What counts is what the turn was drawn after, so the text before it is
made to end like the prompt did that it answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from erllama_core.interfaces.backend import Vocabulary
from erllama_core.model.chat_guard import ControlSyntax, Occurrence, map_strings
from erllama_core.results import Replay

_LAST_STAND_IN: Final = 0x10FFFD
"""The end of Unicode's private use area B, of which guards take the beginning."""
_EVIDENCE: Final = 24
"""Characters that must be alike where two texts are said to be at the same place."""
_LEAST_EVIDENCE: Final = 8
_FARTHEST: Final = 128
"""Characters by which the beginnings of a turn may differ."""


class TurnLost(Exception):
    """The template did not put a turn out, or did so more than once."""


@attrs.frozen
class Part:
    """A piece of a rendered chat, and the turn that follows it."""

    text: str
    controls: list[Occurrence] | None
    turn: Replay | None


class StandIns:
    """A chat with stand-ins for the turns that are replayed."""

    def __init__(
        self, template: str, chat: Mapping[str, Any], replays: Mapping[int, Replay]
    ) -> None:
        taken = set(template)

        def note(text: str, key: str | None) -> str:
            del key
            taken.update(text)
            return text

        map_strings(chat, note)
        code = _LAST_STAND_IN
        messages = list(chat["messages"])
        self._turns: Final[dict[str, Replay]] = {}
        for place in sorted(replays):
            while chr(code) in taken:
                code -= 1
            self._turns[chr(code)] = replays[place]
            messages[place] = {"role": messages[place]["role"], "content": chr(code)}
            code -= 1
        self.chat: Final = {**chat, "messages": messages}

    def parts(
        self,
        text: str,
        controls: list[Occurrence] | None,
        vocabulary: Vocabulary,
        syntax: ControlSyntax,
    ) -> Iterator[Part]:
        """The rendered text in pieces, a turn behind each but the last. Raises TurnLost."""
        start = 0
        for stand_in, turn in self._turns.items():
            end = text.find(stand_in)
            if end < start or text.count(stand_in) != 1:
                raise TurnLost("the template does not put every turn out once, in its order")
            part = _part(text, start, end, controls)
            yield _led_up(part, turn, vocabulary, syntax)
            start = end + 1
        yield attrs.evolve(_part(text, start, len(text), controls), turn=None)


def _part(text: str, start: int, end: int, controls: list[Occurrence] | None) -> Part:
    if controls is not None:
        controls = [
            Occurrence(one.start - start, one.end - start, one.token)
            for one in controls
            if start <= one.start and one.end <= end
        ]
    return Part(text[start:end], controls, None)


def _led_up(part: Part, turn: Replay, vocabulary: Vocabulary, syntax: ControlSyntax) -> Part:
    """The piece before a turn, ending like the prompt did that the turn answered."""
    lead = b"".join(map(vocabulary.piece, turn.prompt_end)).decode("utf-8", "replace")
    drop, added = _difference(part.text, lead)
    text = part.text[: len(part.text) - drop]
    controls = part.controls
    if controls is not None:
        controls = [one for one in controls if one.end <= len(text)]
        controls += [
            Occurrence(one.start + len(text), one.end + len(text), one.token)
            for one in syntax.find(added)
        ]
    return Part(text + added, controls, turn)


def _difference(text: str, lead: str) -> tuple[int, str]:
    """What to drop of a text's end, and what to add, so that it ends like ``lead``."""
    for distance in range(min(_FARTHEST, max(len(text), len(lead)))):
        if _ends_alike(text, lead[: len(lead) - distance]):
            return 0, lead[max(0, len(lead) - distance) :]
        if _ends_alike(text[: len(text) - distance], lead):
            return distance, ""
    return 0, ""


def _ends_alike(text: str, lead: str) -> bool:
    compared = min(_EVIDENCE, len(text), len(lead))
    return compared >= _LEAST_EVIDENCE and text.endswith(lead[-compared:])

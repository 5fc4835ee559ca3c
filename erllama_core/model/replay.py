"""Turns of a model under a caller's ids, so that they can be said again to the letter.

What a model thinks, and how it writes a tool call, is taken apart for the application, and a
template puts it together again in its own way: other spaces, other order, or nothing of it at
all. So the turn itself is kept, as the tokens that were drawn, and put in place of the message
that stands for it. The next prompt then begins with exactly what the last one ended with.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from erllama_core.cache.space import ModelSpace
from erllama_core.errors import CorruptBlock
from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.interfaces.log import get_logger
from erllama_core.prompt import pack, unpack
from erllama_core.results import Completion, Replay

log = get_logger("erllama.model")

_LENGTHS: Final = struct.Struct("<IIII")
"""Tokens before the turn, tokens of it, bytes of its text, bytes of its reply."""
_LEAD_TOKENS: Final = 64
"""What is kept of the prompt's end: enough to hold all of a generation prompt."""
_MAX_ID_CHARACTERS: Final = 1024


def encode(replay: Replay) -> bytes:
    """The payload of a stored turn, see ``docs/format.md``."""
    reply = replay.reply.encode("utf-8", "surrogatepass")
    return b"".join(
        (
            _LENGTHS.pack(
                len(replay.prompt_end), len(replay.generated), len(replay.data), len(reply)
            ),
            pack(replay.prompt_end),
            pack(replay.generated),
            replay.data,
            reply,
        )
    )


def decode(payload: bytes) -> Replay:
    """The inverse of :func:`encode`. Raises CorruptBlock."""
    if len(payload) < _LENGTHS.size:
        raise CorruptBlock("a replay is longer than that")
    n_lead, n_tokens, n_data, n_reply = _LENGTHS.unpack_from(payload)
    ends = [_LENGTHS.size]
    for length in (TOKEN_BYTES * n_lead, TOKEN_BYTES * n_tokens, n_data, n_reply):
        ends.append(ends[-1] + length)
    if ends[-1] != len(payload):
        raise CorruptBlock("the lengths of a replay contradict its size")
    lead, tokens, data, reply = (payload[start:end] for start, end in itertools.pairwise(ends))
    try:
        text = reply.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CorruptBlock("the reply of a replay is not UTF-8") from error
    return Replay(
        generated=tuple(unpack(tokens)),
        data=data,
        reply=text,
        prompt_end=tuple(unpack(lead)),
    )


class Replays:
    """The stored turns of one model. Thread-safe; calls may wait for a tier, none for long."""

    def __init__(self, space: ModelSpace, vocabulary: Vocabulary) -> None:
        self._space: Final = space
        self._vocabulary: Final = vocabulary

    def put(self, ids: str | Sequence[str], completion: Completion, salt: str | None) -> bool:
        """See :meth:`Model.put_replay`; the tokens are known to be the vocabulary's."""
        ids = _checked(ids)
        generated = completion.generated
        if not generated:
            raise ValueError("a turn in which nothing was generated cannot be replayed")
        before = completion.context_tokens[: -len(generated)]
        replay = Replay(
            generated=generated,
            data=b"".join(map(self._vocabulary.piece, generated)),
            reply=completion.reply,
            prompt_end=before[-_LEAD_TOKENS:],
        )
        namespace = self._space.namespace(salt)
        payload = encode(replay)
        kept = [self._space.named.put(namespace, name, payload) for name in ids]
        return all(kept)

    def get(self, ids: Sequence[str], salt: str | None) -> dict[str, Replay]:
        """Those turns that are stored, by their ids."""
        namespace = self._space.namespace(salt)
        found = {}
        for name, payload in self._space.named.get(namespace, ids).items():
            try:
                replay = decode(payload)
                if any(token >= self._vocabulary.n_tokens for token in replay.prompt_end):
                    raise CorruptBlock("it has tokens that the vocabulary lacks")
                if any(token >= self._vocabulary.n_tokens for token in replay.generated):
                    raise CorruptBlock("it has tokens that the vocabulary lacks")
            except CorruptBlock as error:
                log.warning("replay.corrupt", reason=error.reason)
                self._space.named.remove(namespace, name)
                continue
            found[name] = replay
        return found

    def drop(self, replay_id: str, salt: str | None) -> None:
        """Forget one."""
        self._space.named.remove(self._space.namespace(salt), replay_id)

    def of_messages(
        self, messages: Iterable[Mapping[str, Any]], salt: str | None
    ) -> dict[int, Replay]:
        """The turns that a chat's messages stand for, by the messages' places.

        A message stands for a turn when one of its ids is that turn's, and what it says, if it
        says anything, is what the turn said.
        """
        ids = {
            place: ids_of(message)
            for place, message in enumerate(messages)
            if message.get("role") == "assistant"
        }
        wanted = list(dict.fromkeys(name for names in ids.values() for name in names))
        if not wanted:
            return {}
        stored = self.get(wanted, salt)
        found = {}
        said = {place: text_of(message) for place, message in enumerate(messages) if place in ids}
        for place, names in ids.items():
            for name in names:
                replay = stored.get(name)
                if replay is not None and said[place] in {"", replay.reply.strip()}:
                    found[place] = replay
                    break
            else:
                if names:
                    log.debug(
                        "replay.missed", message=place, stored=any(n in stored for n in names)
                    )
        return found


def _checked(ids: str | Sequence[str]) -> tuple[str, ...]:
    given: tuple[Any, ...] = (ids,) if isinstance(ids, str) else tuple(ids)
    if not given:
        raise ValueError("a turn is replayed by an id; none was given")
    for name in given:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_ID_CHARACTERS:
            raise ValueError(
                f"the id of a replay is a string of 1 to {_MAX_ID_CHARACTERS} characters, "
                f"not {name!r:.100}"
            )
    return given


def ids_of(message: Mapping[str, Any]) -> list[str]:
    """The ids that an assistant's message carries, in the order in which they are tried.

    ``replay``, ours; the ``id`` of tool calls, as OpenAI has them; of the parts of a content the
    ``id`` of a ``tool_use`` and the ``signature`` of a ``thinking``, as Anthropic has them.
    """
    own = message.get("replay")
    found: list[Any] = list(own) if isinstance(own, list | tuple) else [own]
    found += [call.get("id") for call in _mappings(message.get("tool_calls"))]
    for part in _mappings(message.get("content")):
        found += [part.get("id"), part.get("signature")]
    return [name for name in found if isinstance(name, str) and 0 < len(name) <= _MAX_ID_CHARACTERS]


def text_of(message: Mapping[str, Any]) -> str:
    """What an assistant's message says as text."""
    content = message.get("content")
    if not isinstance(content, str):
        parts = [part.get("text") for part in _mappings(content)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content.strip()


def _mappings(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list | tuple):
        return []
    return [item for item in value if isinstance(item, Mapping)]

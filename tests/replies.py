"""Replies made of any tokens, through a pipeline, without a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erllama_backend_stub.vocabulary import VOCABULARY
from erllama_core import Prompt, TextDelta, ThinkingDelta, ThinkingEnd, ToolCallDelta, ToolCallEnd
from erllama_core.host import PluginHost
from erllama_core.interfaces.stream import Event, ProcessorRequest
from erllama_core.providers import NoOptions, StreamProcessorProvider
from erllama_core.signing import NoSignature
from erllama_core.stream.pipeline import Pipeline, Stage

Token = tuple[bytes, bool]
"""A token's bytes, and whether it is a control token."""

SHIPPED = ("thinking", "tool_calls", "stop_sequences", "utf8")
_HOST = PluginHost(discover=False)


class PieceVocabulary:
    """A vocabulary that has the tokens of one reply, in the order in which they are drawn."""

    n_tokens = 0
    bos = None
    add_bos = False
    end_of_generation: frozenset[int] = frozenset()

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = list(tokens)
        self.control_tokens: Mapping[int, str] = {
            number: data.decode() for number, (data, control) in enumerate(tokens) if control
        }

    def piece(self, token: int) -> bytes:
        return self._tokens[token][0]

    tokenize = detokenize = VOCABULARY.tokenize


def make_pipeline(
    tokens: Sequence[Token],
    *,
    names: Sequence[str] = SHIPPED,
    own: Mapping[str, Callable[[ProcessorRequest], Any]] | None = None,
    may_swap: bool = True,
    **request: Any,
) -> Pipeline:
    """A pipeline of the processors named; ``own``: the factories of some that are not shipped."""
    vocabulary: Any = PieceVocabulary(tokens)
    own = own or {}
    stages = [
        Stage(
            StreamProcessorProvider(name, "", own[name])
            if name in own
            else _HOST.get("processor", name),
            NoOptions(),
        )
        for name in names
    ]
    defaults = {"prompt": Prompt([0]), "vocabulary": VOCABULARY, "begin_signature": NoSignature}
    make: Any = functools.partial(ProcessorRequest, **{**defaults, **request})
    return Pipeline(vocabulary, stages, make, may_swap=may_swap)


def run(pipeline: Pipeline, n_tokens: int) -> list[Event]:
    """All events of a reply."""
    events: list[Event] = []
    for token in range(n_tokens):
        events += pipeline.feed(token)
        if pipeline.ended:
            break
    return [*events, *pipeline.finish()]


def joined(events: Sequence[Event]) -> list[tuple[str, bytes]]:
    """Events by kind, with neighbouring deltas of a kind as one; checks their text."""
    out: list[tuple[str, bytes]] = []
    texts: list[str] = []
    for event in events:
        kind = type(event).__name__
        if isinstance(event, TextDelta | ThinkingDelta):
            assert event.data, "no empty deltas"
            data, text = event.data, event.text
        else:
            assert isinstance(event, ToolCallDelta | ToolCallEnd | ThinkingEnd)
            data, text = (b"" if isinstance(event, ThinkingEnd) else event.data), ""
        if out and out[-1][0] == kind and kind.endswith("Delta"):
            out[-1] = (kind, out[-1][1] + data)
            texts[-1] += text
        else:
            out.append((kind, data))
            texts.append(text)
    for (kind, data), text in zip(out, texts, strict=True):
        if kind in {"TextDelta", "ThinkingDelta"}:
            assert text == data.decode("utf-8", "replace")
    return out

"""From sampled tokens to events, through a list of processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.stream import Channel, Segment, StreamProcessor, TextDelta


class Pipeline:
    """The processors of one request. Used by the model's worker alone."""

    def __init__(self, vocabulary: Vocabulary, processors: Sequence[StreamProcessor]) -> None:
        self._vocabulary: Final = vocabulary
        self._silent: Final = vocabulary.control_tokens
        self._processors: Final = tuple(processors)

    def feed(self, token: int) -> list[TextDelta]:
        """The events that a sampled token sets free.

        A control token has no text of its own: it steers the model, and is not of the reply.
        """
        data = b"" if token in self._silent else self._vocabulary.piece(token)
        segments: Sequence[Segment] = (Segment(Channel.TEXT, data),) if data else ()
        for processor in self._processors:
            segments = processor.feed(token, segments)
        return [_event(segment) for segment in segments]

    def flush(self) -> list[TextDelta]:
        """Generation has ended: the events of everything that was held back.

        A processor's last words still go through those behind it.
        """
        segments: Sequence[Segment] = ()
        for processor in self._processors:
            carried = processor.feed(-1, segments) if segments else ()
            segments = (*carried, *processor.flush())
        return [_event(segment) for segment in segments]


def _event(segment: Segment) -> TextDelta:
    return TextDelta(segment.data.decode("utf-8", errors="replace"), segment.data)

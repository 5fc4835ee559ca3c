"""From sampled tokens to events, through a row of processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import attrs

from erllama_core.errors import ErllamaError, PluginFailed
from erllama_core.interfaces.backend import Vocabulary
from erllama_core.interfaces.stream import (
    Channel,
    Event,
    NextSampler,
    Outlet,
    ProcessorRequest,
    StreamProcessor,
    TextDelta,
)
from erllama_core.providers import StreamProcessorProvider, check_made


class Feed(Protocol):
    """Where bytes go next."""

    def __call__(self, token: int, data: bytes, channel: Channel) -> None: ...


@attrs.frozen
class Stage:
    """A processor that a model's requests have, with its options."""

    provider: StreamProcessorProvider
    options: Any


class RequestMaker(Protocol):
    """What makes a ProcessorRequest, but for what the pipeline knows."""

    def __call__(self, *, options: Any, outlet: Outlet) -> ProcessorRequest: ...


class Pipeline:
    """The processors of one request. Used by the model's worker alone, once it is made.

    ``may_swap``: whether processors choose the sampler; with a grammar, which governs every
    token, they do not. Raises PluginFailed for a factory that raises.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stages: Sequence[Stage],
        make_request: RequestMaker,
        *,
        may_swap: bool = True,
    ) -> None:
        self._piece: Final = vocabulary.piece
        self._silent: Final = vocabulary.control_tokens
        self._may_swap: Final = may_swap
        self._out: list[Event] = []
        self._links: Final[list[_Link]] = []
        self.ended = False
        """Whether a processor has ended the request."""
        self.stop_sequence: str | None = None
        """The stop sequence that ended it."""
        self.greedy = False
        """Whether the next token is to be drawn greedily."""
        for stage in stages:
            link = _Link(self)
            processor = _make(stage, make_request(options=stage.options, outlet=link))
            if processor is not None:
                link.processor = processor
                self._links.append(link)
        following: Feed = self._deliver
        for place, link in reversed(list(enumerate(self._links))):
            link.send = following
            link.behind = tuple(self._links[place + 1 :])
            following = link.processor.feed
        self._first: Feed = following
        self.choose_sampler()

    def feed(self, token: int) -> Sequence[Event]:
        """The events that a sampled token sets free."""
        data = self._piece(token)
        if data and not self.ended:
            self._first(token, data, Channel.CONTROL if token in self._silent else Channel.TEXT)
        return self._taken_out()

    def finish(self) -> Sequence[Event]:
        """Generation has ended: the events of everything that was held back or open.

        A stop sequence may turn out to have been met then.
        """
        self._finish(self._links)
        self.ended = True
        return self._taken_out()

    def _taken_out(self) -> Sequence[Event]:
        if not self._out:
            return ()
        out, self._out = self._out, []
        return out

    def _finish(self, links: Sequence[_Link]) -> None:
        for link in links:
            if link.is_open:
                link.processor.finish()

    # -------------------------------------------------------- for the links

    def _deliver(self, token: int, data: bytes, channel: Channel) -> None:
        del token
        # A control token has no text of its own: it steers the model, and is not of the reply.
        if channel is Channel.TEXT:
            self._out.append(TextDelta(data.decode("utf-8", "replace"), data))

    def emit(self, link: _Link, event: Event) -> None:
        """See :meth:`Outlet.emit`."""
        for other in link.behind:
            other.processor.flush()
        if link.is_open:  # flushing may have met a stop sequence
            self._out.append(event)

    def end(self, link: _Link, stop_sequence: str | None) -> None:
        """See :meth:`Outlet.end`."""
        for other in self._links[: len(self._links) - len(link.behind)]:
            other.shut()
        self.ended = True
        self.stop_sequence = stop_sequence
        self._finish(link.behind)
        for other in link.behind:
            other.shut()

    def choose_sampler(self) -> None:
        """See :meth:`Outlet.use_sampler`."""
        self.greedy = self._may_swap and any(link.greedy for link in self._links)


class _Link:
    """A processor's outlet."""

    processor: StreamProcessor
    send: Feed
    """The next processor's ``feed`` itself: this is called for every token."""
    behind: Sequence[_Link] = ()

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline: Final = pipeline
        self.is_open = True
        self.greedy = False
        self.span = False

    def emit(self, event: Event) -> None:
        if self.is_open:
            self._pipeline.emit(self, event)

    def end(self, stop_sequence: str | None = None) -> None:
        if self.is_open:
            self._pipeline.end(self, stop_sequence)

    def use_sampler(self, which: NextSampler) -> None:
        self.greedy = which == "greedy"
        self._pipeline.choose_sampler()

    def hold_span(self, held: bool) -> None:
        self.span = held

    @property
    def span_behind(self) -> bool:
        return any(other.span for other in self.behind)

    def shut(self) -> None:
        """Nothing more comes through."""
        self.is_open = False
        self.send = _drop


def _drop(token: int, data: bytes, channel: Channel) -> None:
    del token, data, channel


def _make(stage: Stage, request: ProcessorRequest) -> StreamProcessor | None:
    try:
        made = stage.provider.factory(request)
        if made is not None:
            check_made(made, StreamProcessor)
    except ErllamaError:
        raise
    except Exception as error:
        raise PluginFailed(
            f"the stream processor {stage.provider.name!r} could not be made: {error!r}"
        ) from error
    return made

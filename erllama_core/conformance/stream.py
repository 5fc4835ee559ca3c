"""Whether a stream processor keeps its promises: see :mod:`erllama_core.interfaces.stream`.

A processor is tested alone in a pipeline, followed by the assembly of UTF-8, as a model has it.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import pytest
from hypothesis import strategies as st

from erllama_core.conformance.kit import ConformanceKit, random_walks
from erllama_core.interfaces.stream import (
    Channel,
    Event,
    Outlet,
    ProcessorRequest,
    StreamProcessor,
    TextDelta,
    ThinkingDelta,
)
from erllama_core.prompt import Prompt
from erllama_core.providers import NoOptions, StreamProcessorProvider
from erllama_core.stream.pipeline import Pipeline, Stage
from erllama_core.stream.utf8 import Utf8Assembly

Token = tuple[bytes, bool]
"""A token's bytes, and whether it is a control token."""

_PLAIN: Final = (b"a", b" ", b"plain text", b"\n", "é".encode(), "日本".encode(), b"<", b">")


@attrs.frozen(kw_only=True)
class ProcessorSubject:
    """A stream processor to be tested."""

    factory: Callable[[ProcessorRequest], StreamProcessor | None] = attrs.field(kw_only=False)
    """As in its provider."""
    options: Any = attrs.field(factory=NoOptions)
    """What the provider's ``config`` class makes of its table."""
    request: Mapping[str, Any] = attrs.field(factory=dict)
    """Fields of the ProcessorRequest that make it do something: markers, stop sequences."""
    pieces: Sequence[bytes] = ()
    """Texts that it looks for, whole and in parts. A reply is made of these and of others."""
    quiet_request: Mapping[str, Any] | None = None
    """Fields of a request that it has nothing to do with; None: it always has."""


class ProcessorConformance(ConformanceKit, abc.ABC):
    """Derive, and say with a fixture ``subject`` what is tested."""

    @pytest.fixture
    @abc.abstractmethod
    def subject(self) -> ProcessorSubject:
        """What is tested."""

    def test_events_do_not_depend_on_tokens(self, subject: ProcessorSubject) -> None:
        """However the same bytes are cut into tokens, the same is delivered.

        If this fails: a marker is found when it is one token, and missed when it is several.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            pieces = _draw_pieces(subject, data)
            reply = b"".join(pieces)
            alone = delivered(subject, [(bytes([byte]), False) for byte in reply])
            assert delivered(subject, [(piece, False) for piece in pieces]) == alone
            assert delivered(subject, _split(reply, data)) == alone

        walk()

    def test_text_is_never_split_within_a_character(self, subject: ProcessorSubject) -> None:
        """Every event's text is that of its bytes, and joined it is that of the whole.

        If this fails: a character at the edge of two tokens arrives as two question marks.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            events = run(subject, _split(_draw_reply(subject, data), data))
            for kind in (TextDelta, ThinkingDelta):
                deltas = [event for event in events if isinstance(event, kind)]
                joined = b"".join(event.data for event in deltas)
                assert "".join(event.text for event in deltas) == joined.decode()
                assert all(event.data for event in deltas), "no empty deltas"

        walk()

    def test_nothing_is_made_up(self, subject: ProcessorSubject) -> None:
        """What is delivered is of the reply, in its order, each byte once.

        If this fails: text comes twice, or what was held back comes after what followed it.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            reply = _draw_reply(subject, data)
            left = iter(reply)
            for kind, part in delivered(subject, _split(reply, data)):
                if kind.endswith("Delta"):
                    assert all(byte in left for byte in part), (kind, part)

        walk()

    def test_nothing_happens_where_nothing_is_asked_for(self, subject: ProcessorSubject) -> None:
        """A request that it has nothing to do with is delivered as if it were not there.

        If this fails: a model's replies change because of a processor that a request does not
        use.
        """
        quiet = subject.quiet_request
        if quiet is None:
            pytest.skip("the subject always has something to do")

        @random_walks
        def walk(data: st.DataObject) -> None:
            tokens = _split(_draw_reply(subject, data), data)
            bare = run(attrs.evolve(subject, factory=_none), tokens)
            assert run(attrs.evolve(subject, request=quiet), tokens) == bare

        walk()

    def test_requests_are_kept_apart(self, subject: ProcessorSubject) -> None:
        """Two requests whose tokens come in turns are delivered what each is alone.

        If this fails: one caller reads another caller's reply.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            one, other = (_split(_draw_reply(subject, data), data) for _ in range(2))
            events: tuple[list[Event], list[Event]] = ([], [])
            requests = [
                (make(subject, tokens), len(tokens), out)
                for tokens, out in zip((one, other), events, strict=True)
            ]
            for place in range(max(len(one), len(other))):
                for pipeline, length, out in requests:
                    if place < length and not pipeline.ended:
                        out.extend(pipeline.feed(place))
            for pipeline, _, out in requests:
                out.extend(pipeline.finish())
            assert events == (run(subject, one), run(subject, other))

        walk()

    def test_interruptions_lose_nothing(self, subject: ProcessorSubject) -> None:
        """``flush`` and ``finish`` send on what is held back; twice flushed is flushed.

        If this fails: the end of a reply is missing when it looks like a beginning of a marker.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            text = data.draw(st.lists(st.sampled_from(_PLAIN), max_size=8).map(b"".join))
            outlet = _Recorder()
            processor = subject.factory(_request(subject, outlet))
            if processor is None:
                return
            for byte in text:
                processor.feed(0, bytes([byte]), Channel.TEXT)
                if data.draw(st.booleans()):
                    processor.flush()
                    processor.flush()
            processor.finish()
            if not (outlet.ended or outlet.events):
                assert outlet.sent == text

        walk()

    def test_its_factory_delivers_nothing(self, subject: ProcessorSubject) -> None:
        """Nothing is sent, emitted or ended before a token was fed.

        If this fails: events come before the pipeline is whole, and are lost or out of order.
        """
        outlet = _Recorder()
        subject.factory(_request(subject, outlet))
        assert (outlet.sent, outlet.events, outlet.ended) == (b"", [], False)

    def test_control_tokens_pass(self, subject: ProcessorSubject) -> None:
        """The text of a control token that it does not look for stays in its channel.

        If this fails: ``<|im_end|>`` is shown to the user as text.
        """
        outlet = _Recorder()
        processor = subject.factory(_request(subject, outlet))
        if processor is None:
            return
        processor.feed(0, b"<|a control token|>", Channel.CONTROL)
        processor.finish()
        assert b"control" not in outlet.sent


def make(subject: ProcessorSubject, tokens: Sequence[Token]) -> Pipeline:
    """A pipeline whose vocabulary has the tokens of one reply, in the order of the reply."""
    stages = [
        Stage(StreamProcessorProvider("tested", "", subject.factory), subject.options),
        Stage(StreamProcessorProvider("utf8", "", Utf8Assembly.for_request), NoOptions()),
    ]
    vocabulary = _Vocabulary(tokens)
    return Pipeline(
        vocabulary, stages, lambda *, options, outlet: _request(subject, outlet, options=options)
    )


def run(subject: ProcessorSubject, tokens: Sequence[Token]) -> list[Event]:
    """All events of a reply."""
    pipeline = make(subject, tokens)
    events: list[Event] = []
    for token in range(len(tokens)):
        events += pipeline.feed(token)
        if pipeline.ended:
            break
    return [*events, *pipeline.finish()]


def delivered(subject: ProcessorSubject, tokens: Sequence[Token]) -> list[tuple[str, bytes]]:
    """What is delivered, neighbouring deltas of a kind as one."""
    out: list[tuple[str, bytes]] = []
    for event in run(subject, tokens):
        kind = type(event).__name__
        data = getattr(event, "data", b"")
        if kind.endswith("Delta") and out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + data)
        else:
            out.append((kind, data))
    return out


class _NoSignature:
    def update(self, data: bytes, /) -> None:
        del data

    def digest(self) -> bytes:
        return b""


def _request(subject: ProcessorSubject, outlet: Outlet, *, options: Any = None) -> ProcessorRequest:
    fields: dict[str, Any] = {
        "vocabulary": _Vocabulary([(b"prompt", False)]),
        "prompt": Prompt([0]),
        "begin_signature": _NoSignature,
        **subject.request,
    }
    chosen = subject.options if options is None else options
    return ProcessorRequest(options=chosen, outlet=outlet, **fields)


def _none(_: ProcessorRequest) -> StreamProcessor | None:
    return None


def _draw_reply(subject: ProcessorSubject, data: st.DataObject) -> bytes:
    return b"".join(_draw_pieces(subject, data))


def _draw_pieces(subject: ProcessorSubject, data: st.DataObject) -> list[bytes]:
    parts = [
        piece[:length]
        for piece in subject.pieces
        for length in {len(piece), max(1, len(piece) // 2)}
        if _is_text(piece[:length])
    ]
    pool = st.sampled_from([*_PLAIN, *parts])
    return data.draw(st.lists(pool, max_size=12))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(reply: bytes, data: st.DataObject) -> list[Token]:
    cuts = data.draw(st.lists(st.integers(0, len(reply)), max_size=len(reply)))
    edges = sorted({0, len(reply), *cuts})
    return [(reply[a:b], False) for a, b in itertools.pairwise(edges)]


class _Vocabulary:
    """The tokens of one reply, numbered in the order in which they are drawn."""

    bos = None
    add_bos = False
    end_of_generation: frozenset[int] = frozenset()

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = list(tokens)
        self.n_tokens = len(self._tokens)
        self.control_tokens: Mapping[int, str] = {
            number: piece.decode("utf-8", "replace")
            for number, (piece, is_control) in enumerate(tokens)
            if is_control
        }

    def piece(self, token: int) -> bytes:
        return self._tokens[token][0]

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> bytes:
        del text, add_bos, parse_special
        return bytes(4)

    def detokenize(self, tokens: bytes | memoryview) -> bytes:
        del tokens
        return b""


class _Recorder:
    """An outlet that keeps what comes through it."""

    span_behind = False

    def __init__(self) -> None:
        self.sent = b""
        self.events: list[Event] = []
        self.ended = False

    def send(self, token: int, data: bytes, channel: Channel) -> None:
        del token
        if channel is Channel.TEXT:
            self.sent += data

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def end(self, stop_sequence: str | None = None) -> None:
        del stop_sequence
        self.ended = True

    def use_sampler(self, which: str) -> None:
        del which

    def hold_span(self, held: bool) -> None:
        del held

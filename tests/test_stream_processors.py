"""Stop sequences, thinking and tool calls, whatever the tokens."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from erllama_core import Prompt, TextDelta, ThinkingDelta, ThinkingEnd, ToolCallDelta, ToolCallEnd
from erllama_core.errors import PluginFailed
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.interfaces.stream import Channel, ProcessorRequest
from erllama_core.signing import SigningKey
from replies import SHIPPED, Token, joined, make_pipeline, run

THINK = ThinkingMarkers(start="<t>", end="</t>")
CALL = ToolCallMarkers(start="<c>", end="</c>", payload_start="(", payload_end=")")
CALL_TO_END = ToolCallMarkers(start="<c>", end="$eos")

# Markers whole and in parts, text around them, characters whole and broken, control tokens.
PIECES: list[Token] = [
    *((piece, False) for piece in (b"<t>", b"</t>", b"<c>", b"</c>", b"(", b")")),
    *((piece, False) for piece in (b"<", b"/", b"t", b">", b"<t", b"c>", b"x", b"ab", b"b")),
    *((piece, False) for piece in ("é".encode(), b"\xe6\x97", b"\xff")),
    *((piece, True) for piece in (b"<t>", b"</t>", b"<c>", b"</c>", b"<|x|>", b"<")),
]


def split(pieces: Sequence[Token], cuts: Sequence[int]) -> list[Token]:
    """The same bytes in other tokens; a control token stays one."""
    tokens: list[Token] = []
    for control, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
        datas = [data for data, _ in group]
        if control:
            tokens += [(data, True) for data in datas]
            continue
        whole = b"".join(datas)
        edges = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
        tokens += [(whole[a:b], False) for a, b in itertools.pairwise(edges)]
    return tokens


def expected(
    pieces: Sequence[Token],
    stops: Sequence[bytes],
    call: ToolCallMarkers,
    think: ThinkingMarkers = THINK,
) -> list[tuple[str, bytes]]:
    """What must be delivered, found by searching the reply as a whole."""
    think_start, think_end = think.start.encode(), think.end.encode()
    call_start = call.start.encode()
    data = b"".join(piece for piece, _ in pieces)
    silent = [control for piece, control in pieces for _ in piece]
    call_end = None if call.end == "$eos" else call.end.encode()
    out: list[tuple[str, bytes]] = []

    def said(a: int, b: int) -> bytes:
        return bytes(byte for byte, quiet in zip(data[a:b], silent[a:b], strict=True) if not quiet)

    def add(kind: str, part: bytes) -> None:
        if part or kind.endswith("End"):
            out.append((kind, part))

    def first(at: int, *markers: bytes) -> tuple[int, bytes]:
        places = [(data.find(marker, at), marker) for marker in markers]
        return min((place for place in places if place[0] >= 0), default=(len(data), b""))

    at = 0
    while True:
        place, marker = first(at, think_start, call_start)
        add("TextDelta", said(at, place))
        at = place + len(marker)
        if marker == think_start:
            place, marker = first(at, think_end)
            add("ThinkingDelta", said(at, place))
            add("ThinkingEnd", b"")
            at = place + len(marker)
        while marker == call_start:
            place, marker = first(at, call_start, *([call_end] if call_end else []))
            add("ToolCallDelta", data[at:place])
            if marker or call_end is None:
                add("ToolCallEnd", data[at:place])
            at = place + len(marker)
        if not marker:
            break
    for number, (kind, part) in enumerate(out):
        found = [(part.find(stop), order) for order, stop in enumerate(stops) if stop in part]
        if kind == "TextDelta" and found:
            before = part[: min(found)[0]]
            return [*out[:number], *([(kind, before)] if before else [])]
    return out


def deliveries(tokens: Sequence[Token], **request: Any) -> list[tuple[str, bytes]]:
    return joined(run(make_pipeline(tokens, **request), len(tokens)))


@given(
    st.lists(st.sampled_from(PIECES), max_size=24),
    st.lists(st.integers(0, 200), max_size=40),
    st.lists(st.sampled_from(["ab", "b", "x(", "éx", ")ab", "bab"]), max_size=3),
    st.sampled_from([CALL, CALL_TO_END]),
)
def test_events_do_not_depend_on_tokens(
    pieces: list[Token], cuts: list[int], stops: list[str], call: ToolCallMarkers
) -> None:
    """However a reply is cut into tokens, the events are those of the reply as a whole."""
    found = deliveries(
        split(pieces, cuts),
        thinking=True,
        thinking_markers=THINK,
        tool_call_markers=call,
        stop_sequences=tuple(stops),
    )
    assert found == expected(pieces, [stop.encode() for stop in stops], call)


@given(
    st.lists(st.sampled_from([*"ab", "aa", "ab", "ba", "日", "本"]), max_size=24),
    st.lists(st.integers(0, 200), max_size=40),
    st.sampled_from([("aba", "bab"), ("日本", "本日"), ("aaa", "aa日"), ("ab", "ba"), ("b", "日")]),
    st.booleans(),
)
def test_markers_that_overlap_themselves_and_one_another(
    pieces: list[str], cuts: list[int], markers: tuple[str, str], thinks: bool
) -> None:
    """Whatever the markers' letters are, cut anywhere, even within characters."""
    never = "\N{SNOWMAN}", "\N{COMET}"
    start, end = markers if thinks else never
    think = ThinkingMarkers(start=start, end=end)
    start, end = never if thinks else markers
    call = ToolCallMarkers(start=start, end=end)
    said: list[Token] = [(piece.encode(), False) for piece in pieces]
    found = deliveries(
        split(said, cuts), thinking=True, thinking_markers=think, tool_call_markers=call
    )
    assert found == expected(said, [], call, think)


@given(st.lists(st.sampled_from(PIECES), max_size=24), st.lists(st.integers(0, 200), max_size=40))
def test_nothing_happens_where_nothing_is_asked_for(pieces: list[Token], cuts: list[int]) -> None:
    """Without stops, thinking and tool calls every event is what UTF-8 assembly alone gives."""
    tokens = split(pieces, cuts)
    bare = run(make_pipeline(tokens, names=["utf8"]), len(tokens))
    assert run(make_pipeline(tokens, thinking_markers=THINK), len(tokens)) == bare
    assert b"".join(event.data for event in bare if isinstance(event, TextDelta)) == b"".join(
        data for data, control in tokens if not control
    )


# -------------------------------------------------------------- stop sequences


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", max_size=24),
    st.lists(st.integers(0, 30), max_size=12),
)
@example(["abbb", "bb"], "abbc", [1, 2])  # one stop within the beginning of another
@example(["aabaaa", "aabb"], "aabaabb", [3])  # what begins again within itself
@example(["aaabb", "aba"], "aaaba", [4])  # a shorter end begins another
@example(["abcd", "bc"], "abcabcd", [2])  # the one that began first is not it after all
def test_the_first_stop_by_position_then_by_order(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    """The stop that begins first ends the reply; of several there, the one listed first."""
    tokens = split([(text.encode(), False)], cuts) if text else []
    pipeline = make_pipeline(tokens, stop_sequences=tuple(stops))
    events = run(pipeline, len(tokens))
    places = [(text.find(stop), number) for number, stop in enumerate(stops) if stop in text]
    place, number = min(places, default=(len(text), None))
    assert b"".join(data for _, data in joined(events)) == text[:place].encode()
    assert pipeline.stop_sequence == (None if number is None else stops[number])


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", min_size=1, max_size=24),
)
def test_no_more_is_held_back_than_may_be_a_stop(stops: list[str], text: str) -> None:
    """After each token all is delivered up to the first place where a stop may begin."""
    tokens = [(letter.encode(), False) for letter in text]
    pipeline = make_pipeline(tokens, stop_sequences=tuple(stops))
    delivered = ""
    for token in range(len(tokens)):
        for event in pipeline.feed(token):
            assert isinstance(event, TextDelta)
            delivered += event.text
        so_far = text[: token + 1]
        may_begin = [
            at
            for at in range(len(so_far))
            for stop in stops
            if stop.startswith(so_far[at:]) or so_far.startswith(stop, at)
        ]
        assert delivered == so_far[: min(may_begin, default=len(so_far))]
        if pipeline.ended:
            break


@given(
    st.lists(st.text("é日b", min_size=1, max_size=3), min_size=1, max_size=3),
    st.text("é日bx", min_size=1, max_size=16),
)
def test_characters_before_a_possible_stop_are_delivered(stops: list[str], text: str) -> None:
    """After each byte all whole characters are delivered up to where a stop may begin."""
    tokens = [(bytes([byte]), False) for byte in text.encode()]
    pipeline = make_pipeline(tokens, stop_sequences=tuple(stops))
    delivered = ""
    for token in range(len(tokens)):
        for event in pipeline.feed(token):
            assert isinstance(event, TextDelta)
            delivered += event.text
        so_far = text.encode()[: token + 1]
        may_begin = [
            at
            for at in range(len(so_far))
            for stop in (stop.encode() for stop in stops)
            if stop.startswith(so_far[at:]) or so_far.startswith(stop, at)
        ]
        free = so_far[: min(may_begin, default=len(so_far))]
        assert delivered == free.decode("utf-8", "ignore")
        if pipeline.ended:
            break


def test_a_stop_of_many_strings_is_found_in_one_pass() -> None:
    """A long list of long, overlapping stops is searched for as one, and the right one is found."""
    stops = tuple("a" * n + "b" for n in range(1, 150))
    tokens = [(b"a", False)] * 5000 + [(b"b", False)]
    pipeline = make_pipeline(tokens, stop_sequences=stops)
    events = run(pipeline, len(tokens))
    assert pipeline.stop_sequence == stops[-1]
    assert sum(len(data) for _, data in joined(events)) == 5000 - 149


def test_a_broken_character_before_a_stop_is_delivered() -> None:
    """Bytes before a stop are the reply's, also those that make no character."""
    tokens = [(b"\xe6\x97", False), (b"EN", False), (b"D!", False)]
    pipeline = make_pipeline(tokens, stop_sequences=("END",))
    (event,) = run(pipeline, 3)
    assert event == TextDelta("\ufffd", b"\xe6\x97")


def test_stops_match_in_reply_text_only() -> None:
    """A stop ends nothing in thinking, in a tool call, or across one; it may cross a silent
    control token.
    """
    request: dict[str, Any] = {
        "thinking": True,
        "thinking_markers": THINK,
        "tool_call_markers": CALL,
        "stop_sequences": ("END",),
    }
    tokens = [(b"<t>END</t>E<c>END</c>ND, E", False), (b"<|x|>", True), (b"ND!", False)]
    pipeline = make_pipeline(tokens, **request)
    assert joined(run(pipeline, 3)) == [
        ("ThinkingDelta", b"END"),
        ("ThinkingEnd", b""),
        ("TextDelta", b"E"),
        ("ToolCallDelta", b"END"),
        ("ToolCallEnd", b"END"),
        ("TextDelta", b"ND, "),
    ]
    assert pipeline.stop_sequence == "END"


# -------------------------------------------------------------------- thinking


def thoughts(
    text: str, budget: int | None, **request: Any
) -> list[TextDelta | ThinkingDelta | ThinkingEnd | ToolCallDelta | ToolCallEnd | Any]:
    tokens = [(letter.encode(), False) for letter in text]
    return run(
        make_pipeline(
            tokens,
            thinking=True,
            thinking_markers=THINK,
            thinking_budget_tokens=budget,
            **request,
        ),
        len(tokens),
    )


@pytest.mark.parametrize("budget", [1, 2, 3, 4, None])
def test_a_budget_caps_thinking_deltas(budget: int | None) -> None:
    """At the cap thinking ends; the rest of it is text, and the model's end marker is nothing."""
    found = joined(thoughts("a<t>123</t>b", budget))
    kept = b"123"[:budget]
    assert found == [
        ("TextDelta", b"a"),
        ("ThinkingDelta", kept),
        ("ThinkingEnd", b""),
        ("TextDelta", b"123"[len(kept) :] + b"b"),
    ]


@given(
    st.lists(st.sampled_from(PIECES), max_size=24),
    st.lists(st.integers(0, 200), max_size=40),
    st.integers(1, 6),
)
def test_a_budget_loses_nothing(pieces: list[Token], cuts: list[int], budget: int) -> None:
    """However a reply is cut, no more deltas than allowed are thinking, the last one of them is
    followed by the end at once, and all bytes but markers and control tokens are delivered.
    """
    tokens = split(pieces, cuts)
    request: dict[str, Any] = {"thinking": True, "thinking_markers": THINK}
    capped = run(make_pipeline(tokens, **request, thinking_budget_tokens=budget), len(tokens))
    thought = [at for at, event in enumerate(capped) if isinstance(event, ThinkingDelta)]
    assert len(thought) <= budget
    if len(thought) == budget:
        assert isinstance(capped[thought[-1] + 1], ThinkingEnd)
    free = run(make_pipeline(tokens, **request), len(tokens))

    def said(events: Sequence[Any]) -> bytes:
        return b"".join(e.data for e in events if isinstance(e, TextDelta | ThinkingDelta))

    assert said(capped) == said(free)


def test_a_character_that_the_cap_cuts() -> None:
    """Of a character that begins in the last delta all bytes are text: none is lost."""
    tokens = [(b"<t>1\xe6", False), (b"\x97\xa5</t>b", False)]
    found = deliveries(tokens, thinking=True, thinking_markers=THINK, thinking_budget_tokens=1)
    assert found == [
        ("ThinkingDelta", b"1"),
        ("ThinkingEnd", b""),
        ("TextDelta", "日b".encode()),
    ]


def test_a_budget_is_for_the_whole_reply() -> None:
    """Once it is used up, a second block is text without markers."""
    assert joined(thoughts("<t>12</t>-<t>34</t>.", 2)) == [
        ("ThinkingDelta", b"12"),
        ("ThinkingEnd", b""),
        ("TextDelta", b"-34."),
    ]


def test_the_end_of_generation_ends_thinking() -> None:
    """A block that is open at the end is closed, with what was held back in it."""
    assert joined(thoughts("<t>1</", None)) == [("ThinkingDelta", b"1</"), ("ThinkingEnd", b"")]
    assert joined(thoughts("<t>", None)) == [("ThinkingEnd", b"")]


@pytest.mark.parametrize(
    ("tail", "opens"),
    [
        ("<|im_start|>assistant\n<t>", True),
        ("<|im_start|>assistant\n<t>\n", True),
        ("<|im_start|>assistant\n<t>\nLet me", True),
        ("<|im_start|>assistant\n<t>\nLet me</t>", False),
        ("<|im_start|>user\nWhat is <t>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n", False),
        ("plain text <t>\n", True),
        ("plain text about <t> and more", False),
    ],
)
def test_a_block_that_the_prompt_opens(tail: str, opens: bool) -> None:
    """Thinking goes on where the prompt's last turn began it, and nowhere else."""
    from erllama_backend_stub.vocabulary import VOCABULARY

    prompt = Prompt.from_packed(VOCABULARY.tokenize(tail, add_bos=False, parse_special=True), tail)
    found = joined(thoughts("on</t>so", None, prompt=prompt))
    if opens:
        assert found == [("ThinkingDelta", b"on"), ("ThinkingEnd", b""), ("TextDelta", b"so")]
    else:
        assert found == [("TextDelta", b"on</t>so")]


def test_signatures_are_hmac_over_the_bytes() -> None:
    """Each block has its signature; the last event also has that of all thinking."""
    key = b"k" * 32
    events = thoughts("<t>one</t><t>two</t>", None, begin_signature=SigningKey(key).begin)
    ends = [event for event in events if isinstance(event, ThinkingEnd)]
    assert [end.signature for end in ends] == [
        hmac.new(key, data, hashlib.sha256).digest() for data in (b"one", b"two")
    ]
    assert ends[1].signature_so_far == hmac.new(key, b"onetwo", hashlib.sha256).digest()


# ------------------------------------------------------------------ tool calls


def test_markers_within_another_part_are_text_of_it() -> None:
    """Thinking does not open a tool call, nor the other way round, in any order of processors."""
    request: dict[str, Any] = {
        "thinking": True,
        "thinking_markers": THINK,
        "tool_call_markers": CALL,
    }
    tokens = [(b"<t><c>x</c></t><c><t>y</t></c>", False)]
    for names in (SHIPPED, ("tool_calls", "thinking", "utf8")):
        assert deliveries(tokens, names=names, **request) == [
            ("ThinkingDelta", b"<c>x</c>"),
            ("ThinkingEnd", b""),
            ("ToolCallDelta", b"<t>y</t>"),
            ("ToolCallEnd", b"<t>y</t>"),
        ]


def test_a_call_that_is_cut_off_is_no_call() -> None:
    """Without its end marker a call has deltas and no end."""
    assert deliveries([(b"<c>x</", False)], tool_call_markers=CALL) == [("ToolCallDelta", b"x</")]


def test_a_call_keeps_control_tokens() -> None:
    """What structures a call is part of its bytes, though it would be silent in a reply."""
    tokens = [(b"<c>", True), (b"f", False), (b"<|sep|>", True), (b"1", False), (b"</c>", True)]
    assert deliveries(tokens, tool_call_markers=CALL)[-1] == ("ToolCallEnd", b"f<|sep|>1")


def greedy_before(text: str, **request: Any) -> str:
    """For each letter of a reply, G where it would be drawn greedily."""
    tokens = [(letter.encode(), False) for letter in text]
    pipeline = make_pipeline(tokens, tool_call_markers=CALL, **request)
    marks = ""
    for token in range(len(tokens)):
        marks += "G" if pipeline.greedy else "-"
        pipeline.feed(token)
    return marks


def test_syntax_is_greedy_and_payload_is_not() -> None:
    """Greedy from behind the start marker to the end marker, but for what is in a payload."""
    text = "ab<c>f(xy)g</c>z<c>(q</c>r"
    mark = "-----GG---GGGGG----G-----"
    assert greedy_before(text)[: len(mark)] == mark
    assert greedy_before(text).endswith("-")
    assert set(greedy_before(text, may_swap=False)) == {"-"}
    assert set(greedy_before(text, names=["utf8"])) == {"-"}


def test_syntax_is_greedy_until_generation_ends() -> None:
    """A call that the end of generation ends is greedy to there, and so is one after another."""
    tokens = [(letter.encode(), False) for letter in "a<c>b<c>d"]
    pipeline = make_pipeline(tokens, tool_call_markers=CALL_TO_END)
    marks = ""
    for token in range(len(tokens)):
        marks += "G" if pipeline.greedy else "-"
        pipeline.feed(token)
    assert marks == "----GGGGG"
    assert pipeline.greedy
    assert [e.data for e in pipeline.finish() if isinstance(e, ToolCallEnd)] == [b"d"]


def test_a_payload_that_is_never_closed_ends_with_its_call() -> None:
    """The end marker ends a call within a payload too, and the rest is drawn as asked for."""
    marks = greedy_before("<c>(q</c>rr")
    assert marks == "---G-------"
    found = deliveries([(b"<c>(q</c>r", False)], tool_call_markers=CALL)
    assert found == [("ToolCallDelta", b"(q"), ("ToolCallEnd", b"(q"), ("TextDelta", b"r")]


# ------------------------------------------------------------ processors of one's own


class Shout:
    """Makes letters large, tells of each ``!``, and ends the reply at a ``#``."""

    def __init__(self, request: ProcessorRequest) -> None:
        self._outlet = request.outlet

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        before, hash_mark, behind = data.partition(b"#")
        self._outlet.send(token, before.upper(), channel)
        if b"!" in before:
            self._outlet.emit(ToolCallEnd(b"!"))
        if hash_mark:
            self._outlet.end()
            self._outlet.send(token, behind, channel)
            self._outlet.emit(ToolCallEnd(b"too late"))

    def flush(self) -> None:
        return

    def finish(self) -> None:
        return


def test_a_processor_of_ones_own() -> None:
    """It changes text, emits events in their place, and ends the request with all before it."""
    tokens = [(b"ab!", False), (b"\xc3", False), (b"c#d", False), (b"e", False)]
    for names in (["shout", *SHIPPED], [*SHIPPED[:3], "shout", "utf8"]):
        pipeline = make_pipeline(
            tokens, names=names, own={"shout": Shout}, stop_sequences=("B!Z", "b!z")
        )
        events = run(pipeline, 4)
        assert pipeline.ended
        assert pipeline.stop_sequence is None
        text = b"".join(event.data for event in events if isinstance(event, TextDelta))
        assert text == b"AB!\xc3C"
        assert [e for e in events if isinstance(e, ToolCallEnd)] == [ToolCallEnd(b"!")]
    # The stop was held back while the event came: it is delivered before it.
    pipeline = make_pipeline(
        tokens, names=["shout", *SHIPPED], own={"shout": Shout}, stop_sequences=("B!Z",)
    )
    assert joined(pipeline.feed(0)) == [("TextDelta", b"AB!"), ("ToolCallEnd", b"!")]


def test_a_stop_that_an_event_decides() -> None:
    """Text that an event interrupts is over: a stop that waited for a better one is met."""
    tokens = [(b"xA!", False), (b"y", False)]
    pipeline = make_pipeline(
        tokens, names=["shout", *SHIPPED], own={"shout": Shout}, stop_sequences=("A!Z", "A!")
    )
    assert joined(run(pipeline, 2)) == [("TextDelta", b"X")]
    assert pipeline.stop_sequence == "A!"


def test_a_factory_that_raises() -> None:
    """A factory's exception is a PluginFailed that names the processor."""

    def broken(request: ProcessorRequest) -> None:
        raise ZeroDivisionError

    with pytest.raises(PluginFailed, match="'mine'"):
        make_pipeline([], names=["mine"], own={"mine": broken})


def test_the_benchmark_runs() -> None:
    """It prints a figure beside its target for each kind of reply."""
    script = Path(__file__).parents[1] / "bench" / "streams.py"
    done = subprocess.run(
        [sys.executable, str(script), "--tokens", "200"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("at most 10: ") == 4

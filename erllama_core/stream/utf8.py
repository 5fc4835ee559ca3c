"""UTF-8 assembly: characters leave whole, however tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.interfaces.stream import Channel, Segment


def incomplete_tail(data: bytes) -> int:
    """How many last bytes may be the start of a character that is not complete yet.

    0 to 3, after the table of well-formed sequences in RFC 3629.
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:  # a leading byte: how many bytes does it announce?
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if byte < 0xF5 and back < needed else 0
    return 0


class Utf8Assembly:
    """Holds back the bytes of an unfinished character, per channel; a stream processor.

    Bytes that are not UTF-8 pass unchanged: what a channel's bytes are is not decided here.
    """

    def __init__(self) -> None:
        self._held: dict[Channel, bytes] = {}

    def feed(self, token: int, segments: Sequence[Segment]) -> Sequence[Segment]:
        del token
        out: list[Segment] = []
        for segment in segments:
            held = self._held.pop(segment.channel, b"")
            data = held + segment.data
            tail = incomplete_tail(data)
            if tail:
                self._held[segment.channel] = data[-tail:]
                data = data[:-tail]
            if data:
                out.append(Segment(segment.channel, data))
        return out

    def flush(self) -> Sequence[Segment]:
        held, self._held = self._held, {}
        return [Segment(channel, data) for channel, data in held.items()]

"""UTF-8 assembly: characters leave whole, however tokens cut them."""

from __future__ import annotations

from erllama_core.interfaces.stream import Channel, Outlet, ProcessorRequest


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


class Characters:
    """Puts the bytes of characters together; bytes that are not UTF-8 pass unchanged."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What is whole by now."""
        if self._held:
            data = self._held + data
            self._held = b""
        elif data.isascii():
            return data
        tail = incomplete_tail(data)
        if tail:
            self._held = data[-tail:]
            return data[:-tail]
        return data

    def rest(self) -> bytes:
        """What was held back: nothing more comes."""
        held, self._held = self._held, b""
        return held


class Utf8Assembly:
    """Holds back the bytes of an unfinished character of the reply; a stream processor."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._characters = Characters()

    @classmethod
    def for_request(cls, request: ProcessorRequest) -> Utf8Assembly:
        """Every reply needs one."""
        return cls(request.outlet)

    def feed(self, token: int, data: bytes, channel: Channel) -> None:
        if channel is Channel.TEXT:
            data = self._characters.feed(data)
        if data:
            self._outlet.send(token, data, channel)

    def flush(self) -> None:
        rest = self._characters.rest()
        if rest:
            self._outlet.send(-1, rest, Channel.TEXT)

    def finish(self) -> None:
        self.flush()

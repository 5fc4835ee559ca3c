"""UTF-8 assembly, and the mailbox between worker and consumer."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama_core.stream.mailbox import Mailbox
from erllama_core.stream.utf8 import Characters, incomplete_tail


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def assemble(chunks: Sequence[bytes]) -> tuple[list[bytes], bytes]:
    """What leaves while chunks come, and what is left at the end."""
    characters = Characters()
    out = [characters.feed(chunk) for chunk in chunks if chunk]
    return out, characters.rest()


@given(st.text(), st.lists(st.integers(0, 1000), max_size=20))
def test_text_leaves_in_whole_characters(text: str, cuts: list[int]) -> None:
    """However a text is cut, every piece that leaves is text by itself, and nothing is left."""
    out, rest = assemble(split(text.encode(), cuts))
    assert rest == b""
    assert "".join(piece.decode("utf-8", "strict") for piece in out) == text


@given(st.binary(), st.lists(st.integers(0, 1000), max_size=20))
def test_any_bytes_pass_unchanged(data: bytes, cuts: list[int]) -> None:
    """Bytes that are not UTF-8 are neither lost nor changed, and soon let go."""
    chunks = split(data, cuts)
    out, rest = assemble(chunks)
    assert b"".join([*out, rest]) == data
    assert len(rest) <= 3


@given(st.binary(max_size=8))
def test_nothing_is_held_that_cannot_become_a_character(data: bytes) -> None:
    """A tail is held back exactly while some continuation would complete it."""
    tail = incomplete_tail(data)
    assert 0 <= tail <= min(3, len(data))
    if tail:
        start = data[-tail:]
        continuations = [b"\x80" * n for n in (1, 2, 3)] + [b"\xbf" * n for n in (1, 2, 3)]
        assert not _decodes(start)
        # Over-long forms and surrogates announce a length that no continuation makes valid.
        assert (
            any(_decodes(start + more) for more in continuations)
            or start[0] in {0xC0, 0xC1, 0xE0, 0xED, 0xF0, 0xF4}
            or len(start) > 1
        )


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_mailbox_keeps_order_between_threads() -> None:
    """Items arrive once each, in the order in which they were put."""
    mailbox: Mailbox[int] = Mailbox()

    def send() -> None:
        for number in range(2000):
            mailbox.put(number)

    sender = threading.Thread(target=send)
    sender.start()
    assert [mailbox.get(10) for _ in range(2000)] == list(range(2000))
    sender.join()


def test_a_coroutine_gets_what_a_thread_puts() -> None:
    """Items reach an event loop once each and in order, however puts and waits interleave."""

    async def run() -> list[int]:
        mailbox: Mailbox[int] = Mailbox()

        def send() -> None:
            for number in range(2000):
                mailbox.put(number)

        sender = threading.Thread(target=send)
        sender.start()
        got = [await asyncio.wait_for(mailbox.get_async(), 10) for _ in range(2000)]
        sender.join()
        return got

    assert asyncio.run(run()) == list(range(2000))


def test_an_item_put_while_a_coroutine_begins_to_wait_wakes_it() -> None:
    """What arrives between finding nothing and beginning to wait is not overlooked."""

    class Interrupted(Mailbox[str]):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "_waiter" and value is not None:
                self.put("in between")
            super().__setattr__(name, value)

    async def run() -> str:
        return await asyncio.wait_for(Interrupted().get_async(), 10)

    assert asyncio.run(run()) == "in between"


def test_a_mailbox_that_stays_empty() -> None:
    """A wait that runs out is a TimeoutError and loses nothing."""
    mailbox: Mailbox[str] = Mailbox()
    with pytest.raises(TimeoutError):
        mailbox.get(0)
    mailbox.put("later")
    assert mailbox.get(0) == "later"


def test_a_cancelled_wait_loses_nothing() -> None:
    """A coroutine that is cancelled while it waits leaves the next item to the next one."""

    async def run() -> None:
        mailbox: Mailbox[str] = Mailbox()
        waiting = asyncio.create_task(mailbox.get_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        threading.Thread(target=mailbox.put, args=("item",)).start()
        assert await asyncio.wait_for(mailbox.get_async(), 10) == "item"

    asyncio.run(run())

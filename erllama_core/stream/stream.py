"""The caller's end of a running request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Self

from erllama_core.errors import TimeoutExceeded
from erllama_core.interfaces.stream import (
    Done,
    Event,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCallEnd,
)
from erllama_core.results import Completion, Stats
from erllama_core.stream.mailbox import Mailbox


class Stream:
    """Events of one request: an iterator, an async iterator and a context manager.

    Leaving the ``with`` block, or dropping the stream, cancels the request. One consumer at a
    time; ``cancel`` from any thread.
    """

    def __init__(
        self,
        request_id: int,
        events: Mailbox[Event | Exception],
        *,
        cancel: Callable[[], None],
        context_tokens: Callable[[], tuple[int, ...]],
    ) -> None:
        self.request_id: Final = request_id
        self._events: Final = events
        self._cancel: Final = cancel
        self._context_tokens: Final = context_tokens
        """Asked once the request has ended."""
        self._reply: list[bytes] = []
        self._thinking: list[bytes] = []
        self._thinking_signature = b""
        self._tool_calls: list[bytes] = []
        self._stats: Stats | None = None
        self._error: Exception | None = None

    def next_event(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises TimeoutError when none came in time, and stays usable.

        Raises the request's error when it failed, StopIteration after ``Done``.
        """
        self._check_open()
        return self._note(self._events.get(timeout_s))

    def result(self) -> Completion:
        """Wait for the end and give the whole reply, events taken before included.

        Breaking off the wait, as with Ctrl-C, cancels the request.
        """
        try:
            while self._stats is None:
                self._check_open()
                self._note(self._events.get())
        except BaseException:
            self.cancel()
            raise
        return self._completion(self._stats)

    async def result_async(self) -> Completion:
        """:meth:`result` for a coroutine; cancelling it cancels the request."""
        try:
            while self._stats is None:
                self._check_open()
                self._note(await self._events.get_async())
        except BaseException:
            self.cancel()
            raise
        return self._completion(self._stats)

    def cancel(self) -> None:
        """End the request at the next token; ``Done`` still comes. Idempotent."""
        self._cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return self.next_event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            self._check_open()
        except StopIteration:
            raise StopAsyncIteration from None
        try:
            return self._note(await self._events.get_async())
        except BaseException:
            self.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        cancel = getattr(self, "_cancel", None)
        if cancel is not None:
            cancel()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stats is not None:
            raise StopIteration

    def _note(self, item: Event | Exception) -> Event:
        if isinstance(item, Exception):
            self._error = item
            if isinstance(item, TimeoutExceeded):
                item.partial = self._completion(item.stats)
            raise item
        if isinstance(item, TextDelta):
            self._reply.append(item.data)
        elif isinstance(item, ThinkingDelta):
            self._thinking.append(item.data)
        elif isinstance(item, ThinkingEnd):
            self._thinking_signature = item.signature_so_far
        elif isinstance(item, ToolCallEnd):
            self._tool_calls.append(item.data)
        elif isinstance(item, Done):
            self._stats = item.stats
        return item

    def _completion(self, stats: Stats) -> Completion:
        return Completion(
            reply=b"".join(self._reply).decode("utf-8", errors="replace"),
            generated=stats.generated,
            context_tokens=self._context_tokens(),
            committed_tokens=stats.committed_tokens,
            finish_key=stats.finish_key,
            cache_hit_kind=stats.cache_hit_kind,
            cache_delta=stats.cache_delta,
            finish_reason=stats.finish_reason,
            stats=stats,
            stop_sequence=stats.stop_sequence,
            thinking=b"".join(self._thinking).decode("utf-8", errors="replace"),
            thinking_signature=self._thinking_signature,
            tool_calls=tuple(self._tool_calls),
            logprobs=stats.logprobs,
        )

"""What servers are asked, what comes back, and what follows from when it came."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class Ask:
    """One request."""

    tokens: tuple[int, ...]
    reply_tokens: int
    after_s: float = 0.0
    """When it arrives, after the first."""
    lasts: bool = False
    """Goes on until the others are answered, and for ``MORE_TOKENS`` alone. ``reply_tokens`` is
    then the most there can be."""
    slot: int | None = None
    """Which of llama-server's slots it goes to, where that must be said."""


@attrs.frozen(kw_only=True)
class Reply:
    """When its tokens came, by ``time.monotonic``."""

    asked_at: float
    token_times: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        return self.token_times[0] - self.asked_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [after - before for before, after in itertools.pairwise(self.token_times)]


class Server(Protocol):
    """Whoever answers requests, of erllama or of a peer."""

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer all of them at once. Raises RuntimeError when a reply is not complete."""
        ...


MORE_TOKENS = 16

Enough = Callable[[], bool]
"""Whether a request may end before it has all tokens; asked after each of them."""


def run_at_once(asks: Sequence[Ask], answer: Callable[[Ask, Enough], list[float]]) -> list[Reply]:
    """A thread for each request; ``answer`` waits for its tokens and returns their times."""
    replies: dict[int, Reply] = {}
    errors: list[Exception] = []
    began = time.monotonic()
    awaited = {number for number, ask in enumerate(asks) if not ask.lasts}
    answered = threading.Event()

    def run(number: int) -> None:
        ask = asks[number]
        try:
            time.sleep(max(0.0, began + ask.after_s - time.monotonic()))
            asked_at = time.monotonic()
            times = answer(ask, _lasting(answered) if ask.lasts else lambda: False)
            if len(times) != ask.reply_tokens and not (ask.lasts and answered.is_set()):
                raise RuntimeError(
                    f"{ask.reply_tokens} tokens were asked for, {len(times)} came one by one"
                )
            replies[number] = Reply(asked_at=asked_at, token_times=tuple(times))
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
        finally:
            awaited.discard(number)
            if not awaited:
                answered.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"a request was not answered: {errors[0]}") from errors[0]
    return [replies[number] for number in range(len(asks))]


def _lasting(answered: threading.Event) -> Enough:
    more = iter(range(MORE_TOKENS))
    return lambda: answered.is_set() and next(more, None) is None


def all_done_s(replies: Sequence[Reply]) -> float:
    """From the first request to the last token of all."""
    return max(r.token_times[-1] for r in replies) - min(r.asked_at for r in replies)


def tokens_per_s(replies: Sequence[Reply]) -> float:
    """Of all streams together, while all of them run.

    Of each the time from one of its tokens to another one counts: a step's tokens come one after
    the other, so that what all brought up to a moment would lack those that just then came.
    """
    start = max(reply.token_times[0] for reply in replies)
    end = min(reply.token_times[-1] for reply in replies)
    rates = []
    for reply in replies:
        times = [at for at in reply.token_times if start <= at <= end]
        if len(times) < 2:
            raise RuntimeError("the streams did not run together; ask for longer replies")
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return sum(rates)


class Prompts:
    """Prompts of exact lengths whose replies go on for as long as they may.

    They count, so that greedy replies go on counting, in characters of one byte each. No two
    numbers begin alike. ``tokenize`` gives the tokens of a text.
    """

    def __init__(self, tokenize: Callable[[str], Sequence[int]]) -> None:
        self._tokenize = tokenize

    def ledger(self, number: int, n_tokens: int) -> tuple[int, ...]:
        """So many tokens, unlike those of every other number."""
        start = 1000 + 137 * number
        text = f"{number}: the book of ship {number}. Entries: "
        text += ", ".join(str(start + entry) for entry in range(n_tokens))
        return self._exactly(text, n_tokens)

    def tail(self, number: int, n_tokens: int) -> tuple[int, ...]:
        """The end of one of several prompts that begin alike."""
        start = 10 + number
        text = f" {number}: " + ", ".join(str(start + entry) for entry in range(n_tokens))
        return self._exactly(text, n_tokens)

    def _exactly(self, text: str, n_tokens: int) -> tuple[int, ...]:
        tokens = tuple(self._tokenize(text))[:n_tokens]
        if len(tokens) != n_tokens:
            raise RuntimeError(f"a text of {len(text)} characters has only {len(tokens)} tokens")
        return tokens

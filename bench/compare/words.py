"""What contestants are asked and what they answer. Imported in their processes as well."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Setup:
    """How a contestant starts: everybody in the same way."""

    model: str
    """Path of a GGUF file."""
    n_ctx: int
    """Tokens of its one context."""
    threads: int
    root: str
    """A folder for what is to outlive the process."""


@attrs.frozen(kw_only=True)
class Question:
    """One prompt, answered greedily."""

    tokens: tuple[int, ...]
    reply_tokens: int
    text: str | None = None
    """What the tokens were made from, and how many at its end open the reply: who keeps texts
    may use them."""
    opening_tokens: int = 0

    def plain(self) -> dict[str, Any]:
        """What JSON can say."""
        return attrs.asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Question:
        """The inverse of :meth:`plain`."""
        return cls(**{**plain, "tokens": tuple(plain["tokens"])})


@attrs.frozen(kw_only=True)
class Answer:
    """A reply, and when it came, by ``time.monotonic`` of the contestant's process."""

    asked_at: float
    token_times: tuple[float, ...]
    """When text came; of a reply with characters of several bytes, not for every token."""
    reply: str
    computed_tokens: int
    """Of the prompt: those that went through the model before the first token of the reply."""

    @property
    def first_token_s(self) -> float:
        return self.token_times[0] - self.asked_at

    def plain(self) -> dict[str, Any]:
        """What JSON can say."""
        return attrs.asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Answer:
        """The inverse of :meth:`plain`."""
        return cls(**{**plain, "token_times": tuple(plain["token_times"])})


def common_tokens(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two prompts begin with alike."""
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return number
    return min(len(first), len(second))

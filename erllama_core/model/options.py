"""What a request may ask for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

import attrs

from erllama_core.errors import unknown_name
from erllama_core.interfaces.backend import SamplingParams
from erllama_core.results import CacheKey

_TYPES: Final[dict[type, Any]] = {int: int, float: int | float, bool: bool, str: str, bytes: bytes}
_WORDS: Final = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    bytes: "a key, which is bytes,",
}
_RULES: Final[dict[str, tuple[type, bool, float, float]]] = {
    # name: type, whether None is allowed, least and greatest value
    "response_tokens": (int, True, 1, math.inf),
    "temperature": (float, True, 0, math.inf),
    "top_k": (int, False, 0, (1 << 31) - 1),
    "top_p": (float, False, 0, 1),
    "min_p": (float, False, 0, 1),
    "repetition_penalty": (float, False, 0, math.inf),
    "seed": (int, True, 0, (1 << 32) - 1),
    "grammar": (str, True, 0, 0),
    "cache_salt": (str, True, 0, 0),
    "parent_key": (bytes, True, 0, 0),
    "thinking": (bool, False, 0, 1),
    "thinking_budget_tokens": (int, True, -math.inf, math.inf),
    "timeout_s": (float, True, 0, math.inf),
    "explain": (bool, False, 0, 1),
    "parse_special": (bool, False, 0, 1),
    "add_bos": (bool, True, 0, 1),
}

_MOST_STOP_BYTES: Final = 1 << 14
"""Of all stop sequences together; looking for them takes a node for each."""


def _stop_sequences(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray):
        raise TypeError(f"stop_sequences={given!r}: a list of strings is needed")
    n_bytes = 0
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"stop_sequences[{number}]={text!r}: a string is needed")
        if not text:
            raise ValueError(f"stop_sequences[{number}] is empty, and would end every reply")
        try:
            n_bytes += len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"stop_sequences[{number}] is not valid Unicode: a lone surrogate at index "
                f"{error.start}"
            ) from error
    if n_bytes > _MOST_STOP_BYTES:
        raise ValueError(
            f"stop_sequences have {n_bytes} bytes together; {_MOST_STOP_BYTES} is the limit"
        )
    return tuple(given)


MOST_LOGPROBS: Final = 100
"""Of the most likely tokens at each position."""


def _logprobs(given: object) -> int | None:
    if given is None or given is False:
        return None
    if given is True:
        return 0
    if not isinstance(given, int):
        raise TypeError(f"logprobs={given!r}: True, False, None or an integer is needed")
    if not 0 <= given <= MOST_LOGPROBS:
        raise ValueError(f"logprobs={given!r}: a value from 0 to {MOST_LOGPROBS} is needed")
    return given


class ReplyKwargs(TypedDict, total=False):
    """The options of ``continue_session``, as keyword arguments."""

    response_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    grammar: str | None
    json_schema: Mapping[str, Any] | bool | str | None
    logprobs: bool | int | None
    stop_sequences: Sequence[str] | None
    thinking: bool
    thinking_budget_tokens: int | None
    parent_key: CacheKey | None
    cache_salt: str | None
    on_full: Literal["block", "error"]
    timeout_s: float | None
    explain: bool
    parse_special: bool
    add_bos: bool | None


class RequestKwargs(ReplyKwargs, total=False):
    """The options of ``complete`` and ``infer``, as keyword arguments."""

    session_id: Hashable | None


@attrs.frozen(kw_only=True)
class RequestOptions:
    """One request's options, with their defaults. Raises TypeError, ValueError for wrong values."""

    response_tokens: int | None = None
    """Tokens to generate at most. None: to the end of the context."""
    temperature: float | None = None
    """None or 0: greedy."""
    top_k: int = 40
    """With temperature: choose among this many. 0: all."""
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    seed: int | None = None
    """None: 0. Equal seeds give equal draws."""
    grammar: str | None = None
    """GBNF that all of the reply's text follows, from the rule ``root`` on."""
    json_schema: Mapping[str, Any] | bool | str | None = None
    """A JSON schema, or its text: the reply is a JSON text that is valid by it."""
    logprobs: int | None = attrs.field(default=None, converter=_logprobs)
    """Give each token's log-probability, and those of so many most likely tokens at its place.
    True: 0. None or False: give none."""
    stop_sequences: tuple[str, ...] = attrs.field(default=(), converter=_stop_sequences)
    """Texts that end the reply where the first of them begins."""
    thinking: bool = False
    """Make events of what is between the model's ``thinking_markers``."""
    thinking_budget_tokens: int | None = None
    """With thinking: deliver this many deltas of it at most. None, 0 or less: any number."""
    parent_key: CacheKey | None = None
    """``finish_key`` of the turn before: a hint. Content decides what is reused."""
    cache_salt: str | None = None
    """Requests share stored state only with those of the same salt."""
    session_id: Hashable | None = None
    """Keep the context at hand under this name, and go on from it when the prompt does."""
    on_full: Literal["block", "error"] = "block"
    """When all sequences are in use: wait for one, or raise SeqCapacity."""
    timeout_s: float | None = None
    """Seconds from the call until the request is ended with TimeoutExceeded. None: no limit."""
    explain: bool = False
    """Have ``Stats.explain`` say what was reused, and why not more."""
    parse_special: bool = True
    """In a ``str`` prompt, the text of a control token is that token."""
    add_bos: bool | None = None
    """Put the model's BOS in front of a ``str`` prompt. None: where the model asks for it."""

    def __attrs_post_init__(self) -> None:
        for name, (kind, may_be_none, least, most) in _RULES.items():
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, _TYPES[kind]):
                raise TypeError(f"{name}={value!r}: {_WORDS[kind]} is needed")
            if isinstance(value, str | bytes | bool):
                continue
            if not math.isfinite(value) or not least <= value <= most:
                bound = f"from {least} to {most}" if most < math.inf else f"at least {least}"
                raise ValueError(f"{name}={value!r}: a value {bound} is needed")
        if not isinstance(self.json_schema, Mapping | bool | str | None):
            raise TypeError(
                f"json_schema={self.json_schema!r}: a schema as a mapping, or as JSON text, is "
                "needed"
            )
        if self.grammar is not None and self.json_schema is not None:
            raise ValueError("grammar and json_schema: a reply can follow one of them only")
        if self.on_full not in {"block", "error"}:
            raise ValueError(f"on_full={self.on_full!r}: 'block' or 'error' is needed")
        try:
            hash(self.session_id)
        except TypeError as error:
            raise TypeError(
                f"session_id={self.session_id!r}: a hashable value is needed"
            ) from error
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty=0: a value above 0 is needed; 1.0 is none")

    @classmethod
    def of(cls, options: RequestKwargs) -> RequestOptions:
        """From keyword arguments. An unknown name is a TypeError that names the nearest."""
        known = [field.name for field in attrs.fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(unknown_name("request option", name, known))
        values: dict[str, Any] = dict(options)
        return cls(**values)

    @property
    def is_constrained(self) -> bool:
        """Whether the reply has to look like something."""
        return self.grammar is not None or self.json_schema is not None

    def sampling(self) -> SamplingParams:
        """The part that a backend's sampler needs."""
        return SamplingParams(
            temperature=self.temperature or 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed or 0,
        )

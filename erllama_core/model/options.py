"""What a request may ask for."""

from __future__ import annotations

from typing import Any, TypedDict

import attrs

from erllama_core.errors import unknown_name
from erllama_core.interfaces.backend import SamplingParams


class RequestKwargs(TypedDict, total=False):
    """The options of ``complete`` and ``infer``, as keyword arguments."""

    response_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    cache_salt: str | None
    parse_special: bool
    add_bos: bool | None


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
    cache_salt: str | None = None
    """Requests share stored state only with those of the same salt."""
    parse_special: bool = True
    """In a ``str`` prompt, the text of a control token is that token."""
    add_bos: bool | None = None
    """Put the model's BOS in front of a ``str`` prompt. None: where the model asks for it."""

    def __attrs_post_init__(self) -> None:
        for name, least, most in (
            ("response_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0, None),
            ("seed", 0, (1 << 32) - 1),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            integral = name in {"response_tokens", "top_k", "seed"}
            if isinstance(value, bool) or not isinstance(value, int if integral else int | float):
                kind = "an integer" if integral else "a number"
                raise TypeError(f"{name}={value!r}: {kind} is needed")
            if not value >= least or (most is not None and value > most):
                bound = f"from {least} to {most}" if most is not None else f"at least {least}"
                raise ValueError(f"{name}={value!r}: a value {bound} is needed")
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

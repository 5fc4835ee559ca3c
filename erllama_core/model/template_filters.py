"""What a chat template's filters and tests cost, and what it may call besides.

As in :mod:`.template_calls`, what they build is paid for first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn

import jinja2
import markupsafe
from jinja2.exceptions import FilterArgumentError, SecurityError

from erllama_core.model.chat_guard import MAX_DEPTH
from erllama_core.model.template_budget import OBJECT, Budget, TooMuch
from erllama_core.model.template_calls import (
    ESCAPED,
    LINE_ENDS,
    Guard,
    free,
    pay_for_arguments,
    pay_for_joining,
    pay_for_percent,
    pay_for_remainder,
    pay_for_replacing,
)

_DIGITS: Final = re.compile(r"\d+")
_PATTERN_CHARACTERS: Final = 256
_MESSAGE_CHARACTERS: Final = 2_000
_MAX_DIGITS: Final = 400
"""Beyond the range of a float."""
_SLOW: Final = 32
"""A filter written in Python takes so much longer than one in C."""

# ------------------------------------------------------------------ filters


def _text(budget: Budget, value: Any, times: int = 1) -> str:
    """The value as the text that a filter makes of it first, paid for so many times."""
    budget.pay_for(value)
    text = markupsafe.soft_str(value)
    budget.pay(times * len(text))
    return text


def _shouts(budget: Budget, value: Any) -> None:
    _text(budget, value, 3)


def _writes_slowly(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    _text(budget, value, _SLOW)


def _escapes(budget: Budget, value: Any) -> None:
    _text(budget, value, ESCAPED)


def _centers(budget: Budget, value: Any, width: int = 80) -> None:
    budget.pay(max(0, width))
    _text(budget, value)


def _fills_in(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    pay_for_percent(budget, _text(budget, value), kwargs or args)


def _indents(
    budget: Budget, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> None:
    del first, blank
    text = _text(budget, s, 2)
    indent = len(width) if isinstance(width, str) else max(0, width)
    lines = 2 + sum(map(text.count, LINE_ENDS))
    budget.pay(lines * (indent + OBJECT))


def _replaces_text(budget: Budget, s: Any, old: Any, new: Any, count: int | None = None) -> None:
    text = _text(budget, s)
    old, new = _text(budget, old), _text(budget, new)
    pay_for_replacing(budget, text, old, new, -1 if count is None else count)


def _trims(budget: Budget, value: Any, chars: Any = None) -> None:
    del chars
    _text(budget, value)


def _truncates(
    budget: Budget,
    s: Any,
    length: int = 255,
    killwords: bool = False,
    end: str = "...",
    leeway: int | None = None,
) -> None:
    del length, killwords, leeway
    budget.pay(len(end))
    budget.pay_for_items(s, 2)


def _rounds(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    del budget, method
    if not isinstance(value, int | float):
        raise TypeError("only a number can be rounded")
    if abs(precision) > _MAX_DIGITS:
        raise TooMuch(f"it rounds to {precision} digits")


def _takes_items(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Something is done for each item, which may be compared to others."""
    del args, kwargs
    budget.pay_for_items(value, OBJECT)
    if not isinstance(value, str):
        budget.pay_for(value)


def _lists_items(budget: Budget, value: Any) -> None:
    budget.pay_for_items(value, OBJECT)


def _sums(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    del attribute
    if not isinstance(start, int | float):
        raise SecurityError("only numbers can be summed by a chat template")
    budget.pay_for_items(iterable, OBJECT)


def _batches(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> None:
    budget.pay_for_items(value, OBJECT)
    if fill_with is not None:
        budget.pay(8 * max(0, linecount))


def _slices(budget: Budget, value: Any, slices: int, fill_with: Any = None) -> None:
    del fill_with
    budget.pay_for_items(value, OBJECT)
    budget.pay(OBJECT * max(0, slices))


def _reverses(budget: Budget, value: Any) -> None:
    budget.pay_for_items(value)


def _is_read(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """A number is read from a text."""
    del args, kwargs
    if not isinstance(value, str):
        budget.pay_for(value)
    else:
        budget.pay(_SLOW * len(value))


_FILTER_GUARDS: Final[Mapping[str, Guard]] = {
    **dict.fromkeys(
        ("abs", "attr", "count", "d", "default", "first", "last", "length", "random"), free
    ),
    **dict.fromkeys(("items", "map", "reject", "rejectattr", "select", "selectattr"), free),
    **dict.fromkeys(("capitalize", "lower", "upper"), _shouts),
    **dict.fromkeys(("title", "wordcount"), _writes_slowly),
    **dict.fromkeys(("e", "escape", "forceescape"), _escapes),
    **dict.fromkeys(("filesizeformat", "float", "int"), _is_read),
    **dict.fromkeys(("safe", "string", "trim"), _trims),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _takes_items),
    "batch": _batches,
    "center": _centers,
    "format": _fills_in,
    "indent": _indents,
    "list": _lists_items,
    "replace": _replaces_text,
    "reverse": _reverses,
    "round": _rounds,
    "slice": _slices,
    "sum": _sums,
    "truncate": _truncates,
}
"""Of Jinja's filters, those that a chat template has a use for."""

_TAKES_ALL: Final = frozenset(
    ("dictsort", "groupby", "list", "max", "min", "reverse", "sort", "sum", "unique")
)
"""These need every item of a sequence, also of one whose items come one by one."""


def guarded_filter(name: str) -> Callable[..., Any] | None:
    """A filter of Jinja's, paid for; None for one that chat templates cannot have."""
    guard = _FILTER_GUARDS.get(name)
    if guard is None:
        return None
    unguarded = f" {name}"

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.budget
        budget.step()
        pay_for_arguments(budget, args, kwargs)
        if name in _TAKES_ALL:
            value = budget.listed(value)
        try:
            guard(budget, value, *args, **kwargs)
        except TypeError as error:  # other arguments than the filter has
            raise FilterArgumentError(f"the filter {name!r}: {error}") from error
        # By this name the environment knows the filter itself, and what else it is passed.
        result = context.environment.call_filter(unguarded, value, args, kwargs, context)
        return budget.count(result) if isinstance(result, Iterator) else result

    return guarded


@jinja2.pass_context
def join(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
    """Jinja's ``join``."""
    budget: Budget = context.budget
    budget.step()
    pay_for_arguments(budget, (d, attribute), {})
    if attribute is not None:
        value = context.environment.call_filter(
            " map", value, kwargs={"attribute": attribute}, context=context
        )
    items = list(budget.count(value))
    pay_for_joining(budget, str(d), items)
    return context.environment.call_filter(" join", items, (d,), context=context)


@jinja2.pass_context
def tojson(
    context: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's ``tojson``: Jinja's escapes <, >, & and ' for HTML, which no model knows."""
    budget: Budget = context.budget
    budget.step()
    budget.pay(ESCAPED * budget.size(value))
    if indent is None and separators in {None, (", ", ": "), (",", ":")}:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
        )
    if indent is not None:
        budget.pay(MAX_DEPTH * (len(indent) if isinstance(indent, str) else max(0, indent)))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts = []
    for part in encoder.iterencode(value):
        budget.step(len(part))
        parts.append(part)
    return "".join(parts)


# -------------------------------------------------------------------- tests

_LOOKS_AT_ALL: Final = frozenset(
    (
        *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge"),
        *("<", "lt", "lessthan", "<=", "le", "in", "lower", "upper", "filter", "test"),
    )
)
_DIVIDES: Final = frozenset(("odd", "even", "divisibleby"))
"""With Python's ``%``, which formats when it is given a string."""


def guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test of Jinja's, paid for where it looks at all of a value."""
    if name not in _LOOKS_AT_ALL | _DIVIDES:
        return function
    unguarded = f" {name}"

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.budget
        budget.step()
        if name in _DIVIDES:
            pay_for_remainder(budget, value, args[0] if args else 2)
        budget.pay_for(value)
        pay_for_arguments(budget, args, kwargs)
        return context.environment.call_test(unguarded, value, args, kwargs, context)

    return guarded


# ------------------------------------------------------------------ globals


class Refused(jinja2.TemplateError):
    """The template called ``raise_exception``."""


def refuse(message: object) -> NoReturn:
    """``raise_exception``."""
    raise Refused(str(message)[:_MESSAGE_CHARACTERS])


def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict`` without the class, whose own methods are no template's business."""
    return dict(*args, **kwargs)


def check_pattern(pattern: str) -> str:
    """A pattern for dates, which C libraries fill in as wide as it says."""
    if len(pattern) > _PATTERN_CHARACTERS or any(
        int(digits) > _PATTERN_CHARACTERS for digits in _DIGITS.findall(pattern)
    ):
        raise TooMuch(f"it formats a date of more than {_PATTERN_CHARACTERS} characters")
    return pattern

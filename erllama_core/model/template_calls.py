"""What a chat template may do with values, and what that costs: methods and operators.

Everything is paid for with the :class:`~.template_budget.Budget` of the rendering before it is
done. What is not listed of Python's own types cannot be called: it builds what no template needs
(``int.to_bytes``), or changes what it is given.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any, Final

import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro

from erllama_core.model.template_budget import OBJECT, Budget, TooMuch

_MAX_WIDTH: Final = 10_000
"""Of a field that is formatted."""
ESCAPED: Final = 6
"""What a character becomes at most when it is escaped for JSON or HTML."""
LINE_ENDS: Final = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
DIGITS: Final = re.compile(r"\d+")

Guard = Callable[..., object]
"""Pays for a call, given the budget, the object and the call's own arguments."""


# ------------------------------------------------------------------ methods


def free(budget: Budget, owner: Any, *args: Any, **kwargs: Any) -> None:
    """For what builds nothing."""
    del budget, owner, args, kwargs


def _copies(budget: Budget, owner: str, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    budget.pay(len(owner))


def _changes_case(budget: Budget, owner: str) -> None:
    budget.pay(3 * len(owner))


def _pads(budget: Budget, owner: str, width: int, *fill: str) -> None:
    del fill
    budget.pay(max(width, len(owner)))


def pay_for_replacing(budget: Budget, owner: str, old: str, new: str, count: int = -1) -> None:
    """For ``owner.replace(old, new, count)``."""
    found = owner.count(old)
    budget.pay(len(owner) + len(new) * (found if count < 0 else min(count, found)))


def _expands_tabs(budget: Budget, owner: str, tabsize: int = 8) -> None:
    budget.pay(len(owner) + max(0, tabsize) * owner.count("\t"))


def _cuts_lines(budget: Budget, owner: str, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    budget.pay(OBJECT * (1 + sum(map(owner.count, LINE_ENDS))))


def _compares_items(budget: Budget, owner: Any, *args: Any) -> None:
    del args
    budget.pay_for(owner)


def _copies_items(budget: Budget, owner: Any) -> None:
    budget.pay_for_items(owner, OBJECT)


_TEXT_METHODS: Final[Mapping[str, Guard]] = {
    **dict.fromkeys(
        ("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _changes_case
    ),
    **dict.fromkeys(
        ("lstrip", "partition", "removeprefix", "removesuffix", "rpartition", "rstrip", "strip"),
        _copies,
    ),
    **dict.fromkeys(
        ("count", "endswith", "find", "index", "rfind", "rindex", "startswith"),
        free,
    ),
    **dict.fromkeys(
        (name for name in dir(str) if name.startswith("is")),
        free,
    ),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pads),
    "expandtabs": _expands_tabs,
    "replace": pay_for_replacing,
    "splitlines": _cuts_lines,
}
_METHODS: Final[Mapping[type, Mapping[str, Guard]]] = {
    list: {"copy": _copies_items, "count": _compares_items, "index": _compares_items},
    tuple: {"count": _compares_items, "index": _compares_items},
    dict: {
        "copy": _copies_items,
        "get": free,
        "items": free,
        "keys": free,
        "values": free,
    },
    int: dict.fromkeys(("as_integer_ratio", "bit_count", "bit_length", "is_integer"), free),
    float: dict.fromkeys(("as_integer_ratio", "hex", "is_integer"), free),
    range: dict.fromkeys(("count", "index"), free),
    bytes: {"decode": _copies},
}
_OWN_TYPES: Final[tuple[type, ...]] = (
    *(list, tuple, dict, set, frozenset, int, float, complex, range, bytes, bytearray),
    *(type, GeneratorType, type({}.items()), type({}.keys()), type({}.values())),
)
"""Of these nothing but what is listed may be called; an application's own objects are its own."""


_JINJAS_OWN: Final = frozenset(("_loop_vars", "_block_vars"))
"""Arguments that Jinja adds to calls, and takes off again where they are of no use."""


class TextFormat:
    """``str.format`` of a string, or ``format_map``, as a template holds it."""

    def __init__(self, text: str, *, is_map: bool) -> None:
        self.text: Final = text
        self.is_map: Final = is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        del args, kwargs
        raise SecurityError("str.format can only be called by a template itself")


def call_guarded(
    environment: jinja2.sandbox.SandboxedEnvironment,
    budget: Budget,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    go_on: Callable[..., Any],
) -> Any:
    """Call a function for a template, through ``go_on`` where it is nothing of Python's own.

    Raises SecurityError, TooMuch.
    """
    budget.step()
    if isinstance(function, Macro | LoopContext):  # their bodies count for themselves
        return go_on(function, *args, **kwargs)
    passed = kwargs
    if kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN}
    pay_for_arguments(budget, args, kwargs)
    if isinstance(function, TextFormat):
        return _format(environment, budget, function, args, kwargs)
    if isinstance(function, BuiltinMethodType | MethodType):
        owner, name = function.__self__, function.__name__
        if isinstance(owner, str):
            return _call_text_method(budget, function, owner, name, args, kwargs)
        if isinstance(owner, _OWN_TYPES):
            guard = next(
                (m[name] for kind, m in _METHODS.items() if isinstance(owner, kind) and name in m),
                None,
            )
            if guard is None:
                raise _not_callable(type(owner), name)
            guard(budget, owner, *args, **kwargs)
    return go_on(function, *args, **passed)


def pay_for_arguments(budget: Budget, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """For lists and the like, which may be compared, hashed or written out."""
    for arg in args:
        if not isinstance(arg, str):
            budget.pay_for(arg)
    for arg in kwargs.values():
        if not isinstance(arg, str):
            budget.pay_for(arg)


def _not_callable(owner: type, name: str) -> SecurityError:
    return SecurityError(f"{owner.__name__}.{name} cannot be called by a chat template")


def _call_text_method(
    budget: Budget,
    method: Callable[..., Any],
    owner: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if name == "join" and len(args) == 1:
        items = budget.listed(args[0])
        pay_for_joining(budget, owner, items)
        return method(items)
    if name in {"split", "rsplit"}:
        separator, most = _split_arguments(*args, **kwargs)
        return budget.split(lambda cuts: method(separator, cuts), most)
    guard = _TEXT_METHODS.get(name)
    if guard is None:
        raise _not_callable(str, name)
    guard(budget, owner, *args, **kwargs)
    return method(*args, **kwargs)


def _split_arguments(sep: str | None = None, maxsplit: int = -1) -> tuple[str | None, int]:
    return sep, maxsplit


def pay_for_joining(budget: Budget, separator: str, items: Iterable[Any]) -> None:
    """For the items of a sequence, with a separator between each two."""
    for item in items:
        budget.pay(len(separator))
        budget.pay_for(item)


# --------------------------------------------------------------- formatting


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    def __init__(self, environment: jinja2.Environment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        _pay_for_widths(self._budget, format_spec)
        self._budget.pay_for(value)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._budget.pay_for([value])
        return super().convert_field(value, conversion)


def _format(
    environment: jinja2.sandbox.SandboxedEnvironment,
    budget: Budget,
    function: TextFormat,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    budget.pay(len(function.text))
    if function.is_map:
        (mapping,) = args
        args, kwargs = (), mapping
    formatter: string.Formatter = _Formatter(environment, budget)
    return formatter.vformat(function.text, args, kwargs)


def _pay_for_widths(budget: Budget, text: str) -> None:
    for digits in DIGITS.findall(text):
        if len(digits) > 5 or int(digits) > _MAX_WIDTH:
            raise TooMuch(f"it formats a field of more than {_MAX_WIDTH} characters")
        budget.pay(int(digits))


def pay_for_percent(budget: Budget, text: str, args: Any) -> None:
    """For ``text % args``."""
    budget.pay(len(text))
    directives = text.count("%")
    if not directives:
        return
    _pay_for_widths(budget, text)
    if "*" in text:
        values = args if isinstance(args, tuple) else (args,)
        if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in values):
            raise TooMuch(f"it formats a field of more than {_MAX_WIDTH} characters")
        budget.pay(_MAX_WIDTH * text.count("*"))
    if isinstance(args, tuple) and not any(c in text for c in "ra("):
        budget.pay_for(args)  # each is used once
    else:
        budget.pay(directives * (budget.size(args) + OBJECT) * ESCAPED)


# ---------------------------------------------------------------- operators


def _add(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str):
        budget.pay(len(left) + len(right))
    elif isinstance(left, int) and isinstance(right, int):
        budget.check_bits(max(left.bit_length(), right.bit_length()) + 1)
    else:
        budget.pay_for_items(left)
        budget.pay_for_items(right)


def _multiply(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        budget.check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        many, times = (right, left) if isinstance(left, int) else (left, right)
        if times > 0:
            budget.pay_for_items(many, times * (1 if isinstance(many, str | bytes) else 8))


def _raise_to(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        budget.check_bits(left.bit_length() * right)


def pay_for_remainder(budget: Budget, left: Any, right: Any) -> None:
    """For ``left % right``, which formats when ``left`` is a text."""
    if isinstance(left, str):
        pay_for_percent(budget, left, right)
    elif isinstance(left, bytes | bytearray):
        raise SecurityError("bytes cannot be formatted by a chat template")


OPERATORS: Final[Mapping[str, Callable[[Budget, Any, Any], None]]] = {
    "+": _add,
    "*": _multiply,
    "**": _raise_to,
    "%": pay_for_remainder,
}

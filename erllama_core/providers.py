"""The records that plugin hooks return: what exists, how it is configured and made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NewType, TypeVar

import attrs

from erllama_core.interfaces.backend import BackendModel, BackendRequest, MemoryEstimate
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.interfaces.stream import ProcessorRequest, StreamProcessor
from erllama_core.interfaces.tier import Tier

_Made = TypeVar("_Made")

ByteSize = NewType("ByteSize", int)
"""A number of bytes; in a configuration an integer, or a string with a unit: ``"50GiB"``.

For fields of a provider's ``config`` class.
"""


@attrs.frozen
class Available:
    """A probe's answer: it can work on this machine."""


@attrs.frozen
class Unavailable:
    """A probe's answer: it cannot, and what is missing, in words that help."""

    reason: str


Probe = Callable[[], Available | Unavailable]


def always_available() -> Available:
    """The probe of a provider that needs nothing from the machine."""
    return Available()


Problems = Iterable[tuple[str, str]]
"""A key, dotted where it is nested, and what is wrong with its value."""


def nothing_wrong(_: Any) -> Problems:
    """The check of a provider whose options are right when they are of the right types."""
    return ()


@attrs.frozen
class NoOptions:
    """The configuration of a provider that has none."""


@attrs.frozen
class BackendProvider:
    """A way to run models. ``factory`` may take long; it runs on the loading thread.

    ``config`` is an attrs class, structured by the core from a model's ``model_opts``. ``check``
    says what ``factory`` would refuse, as far as that can be told quickly: it loads no weights
    and changes nothing. Its keys are those of the model's table: ``"model_path"``,
    ``"context_opts.n_ctx"``. ``estimate`` says what ``factory`` and ``open_context`` would
    allocate for the same request, and allocates no such thing itself; it is asked where the
    engine has a memory budget. Without it, or where it gives None, only the size of the model's
    files is known.
    """

    name: str
    summary: str
    factory: Callable[[BackendRequest], BackendModel]
    config: type[Any] = NoOptions
    probe: Probe = always_available
    check: Callable[[BackendRequest], Problems] = nothing_wrong
    estimate: Callable[[BackendRequest], MemoryEstimate | None] | None = None


@attrs.frozen
class TierProvider:
    """A kind of tier. ``factory`` opens the store.

    ``config`` is structured from the keys of a ``[[tiers]]`` table other than ``name`` and
    ``kind``, and given to ``factory``. ``check`` gets it too, and says why the store cannot be
    opened; it creates and changes nothing. Its keys are those of ``config``.
    """

    name: str
    summary: str
    factory: Callable[[Any], Tier]
    config: type[Any] = NoOptions
    probe: Probe = always_available
    check: Callable[[Any], Problems] = nothing_wrong


@attrs.frozen
class PressureProvider:
    """A pressure source. ``config`` is structured from ``[pressure.<name>]``."""

    name: str
    summary: str
    factory: Callable[[Any], PressureSource]
    config: type[Any] = NoOptions
    probe: Probe = always_available


@attrs.frozen
class StreamProcessorProvider:
    """A stream processor, chosen by a model's ``processors``.

    ``factory`` is called once per request, on the caller's thread, and must not block; None:
    this request needs none. ``config`` is structured from ``processor_opts.<name>``.
    """

    name: str
    summary: str
    factory: Callable[[ProcessorRequest], StreamProcessor | None]
    config: type[Any] = NoOptions
    probe: Probe = always_available


Provider = BackendProvider | TierProvider | PressureProvider | StreamProcessorProvider


def check_made(made: _Made, protocol: type[Any]) -> _Made:
    """What a factory made; TypeError, with what is missing, when it is not what it is for.

    Asked once for each thing that is made, before the core relies on it.
    """
    wanted = {*vars(protocol), *getattr(protocol, "__annotations__", ())}
    lacking = sorted(n for n in wanted if not n.startswith("_") and not hasattr(made, n))
    if lacking:
        raise TypeError(
            f"its factory returned a {type(made).__name__}, which is no {protocol.__name__}: "
            f"it has no {', '.join(lacking)}"
        )
    return made

"""Names to providers: who claims a name, whether it works here, and why not.

A registry is filled by a plugin host and read by everybody else, from any thread.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Final, Literal, overload

import attrs

from erllama_core.errors import (
    PluginDuplicate,
    PluginFailed,
    PluginMissing,
    PluginUnavailable,
    nearest,
)
from erllama_core.providers import (
    Available,
    BackendProvider,
    PressureProvider,
    Provider,
    StreamProcessorProvider,
    TierProvider,
    Unavailable,
)

ProviderKind = Literal["backend", "tier", "pressure", "processor"]
Stage = Literal["metadata", "version", "import", "register", "hook", "validate"]
"""Where a plugin failed: reading its distribution, comparing the core that it is for with this
one, importing it, registering its hooks, calling one, or checking what it returned."""

RECORDS: Final[dict[ProviderKind, type[Provider]]] = {
    "backend": BackendProvider,
    "tier": TierProvider,
    "pressure": PressureProvider,
    "processor": StreamProcessorProvider,
}
"""The provider record of each kind, in the order in which kinds are listed."""

_WORDS: Final[dict[ProviderKind, str]] = {
    "backend": "backend",
    "tier": "tier kind",
    "pressure": "pressure source",
    "processor": "stream processor",
}

OFFICIAL: Final[dict[tuple[ProviderKind, str], str]] = {
    ("backend", "llama"): "erllama-backend-llama",
    ("backend", "stub"): "erllama-backend-stub",
    ("tier", "disk"): "erllama-tier-disk",
    ("tier", "ram_file"): "erllama-tier-disk",
    ("tier", "redis"): "erllama-tier-redis",
    ("pressure", "system"): "erllama-pressure-system",
    ("pressure", "psi"): "erllama-pressure-system",
    ("pressure", "nvidia"): "erllama-pressure-nvidia",
}
"""The distribution to install for a name that this project provides outside the core."""


def normalise(name: str) -> str:
    """A distribution or plugin name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def one_line(error: BaseException) -> str:
    """An exception as one line: its type, and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@attrs.frozen
class Origin:
    """Where a plugin comes from."""

    plugin: str
    """Its entry-point name, or the name that it was registered under."""
    distribution: str | None = None
    """None when it was registered by a call."""
    version: str | None = None

    def __str__(self) -> str:
        if self.distribution is None:
            return f"the object registered as {self.plugin!r}"
        return " ".join(part for part in (self.distribution, self.version) if part)


@attrs.frozen
class Claim:
    """One provider, and the plugin that offers it."""

    kind: ProviderKind
    provider: Provider
    origin: Origin


@attrs.frozen
class PluginFailure:
    """A plugin that could not be used; nothing of it is."""

    origin: Origin
    stage: Stage
    cause: BaseException
    provides: tuple[tuple[ProviderKind, str], ...] = ()
    """The providers that it would have, as far as it came."""

    def __str__(self) -> str:
        origin = self.origin
        who = (
            str(origin) if origin.distribution is None else f"plugin {origin.plugin!r} of {origin}"
        )
        return f"{who} failed at stage {self.stage!r}: {one_line(self.cause)}"


@attrs.frozen
class BlockedPlugin:
    """A plugin that is installed and, by configuration, was not imported."""

    origin: Origin
    reason: str


class Registry:
    """Providers by kind and name. Thread-safe; a probe runs once, when first needed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._claims: dict[tuple[ProviderKind, str], list[Claim]] = {}
        self._probed: dict[tuple[ProviderKind, str], Available | Unavailable] = {}
        self._failures: list[PluginFailure] = []
        self._blocked: list[BlockedPlugin] = []

    # ------------------------------------------------------------- filling

    def add(self, claims: Iterable[Claim]) -> None:
        """Take in what one plugin provides."""
        with self._lock:
            for claim in claims:
                key = (claim.kind, claim.provider.name)
                self._claims.setdefault(key, []).append(claim)

    def add_failure(self, failure: PluginFailure) -> None:
        """Remember a plugin that failed."""
        with self._lock:
            self._failures.append(failure)

    def add_blocked(self, blocked: BlockedPlugin) -> None:
        """Remember a plugin that was left out."""
        with self._lock:
            self._blocked.append(blocked)

    # ------------------------------------------------------------- reading

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """Every plugin that failed, in the order in which they did."""
        with self._lock:
            return tuple(self._failures)

    @property
    def blocked(self) -> tuple[BlockedPlugin, ...]:
        """Every plugin that was left out."""
        with self._lock:
            return tuple(self._blocked)

    def claims(self) -> Iterator[Claim]:
        """Every claim, duplicates included; by kind, then in the order of registration."""
        with self._lock:
            found = [claim for claims in self._claims.values() for claim in claims]
        order = list(RECORDS)
        yield from sorted(found, key=lambda claim: order.index(claim.kind))

    def names(self, kind: ProviderKind) -> tuple[str, ...]:
        """The names of a kind that can be asked for, in the order of registration.

        Names that two plugins claim are not among them; those that cannot work on this
        machine are.
        """
        with self._lock:
            return tuple(
                name
                for (claimed, name), claims in self._claims.items()
                if claimed == kind and len(claims) == 1
            )

    @overload
    def get(self, kind: Literal["backend"], name: str) -> BackendProvider: ...
    @overload
    def get(self, kind: Literal["tier"], name: str) -> TierProvider: ...
    @overload
    def get(self, kind: Literal["pressure"], name: str) -> PressureProvider: ...
    @overload
    def get(self, kind: Literal["processor"], name: str) -> StreamProcessorProvider: ...
    def get(self, kind: ProviderKind, name: str) -> Provider:
        """The provider of that name, which can also be ``"package.module:attribute"``.

        Raises PluginMissing, PluginFailed (the plugin that would provide it failed),
        PluginDuplicate, or PluginUnavailable (its probe says so).
        """
        provider = self.find(kind, name)
        answer = self.probe(kind, name, provider)
        if isinstance(answer, Unavailable):
            raise PluginUnavailable(
                f"the {_WORDS[kind]} {name!r} cannot be used on this machine: {answer.reason}"
            )
        return provider

    def find(self, kind: ProviderKind, name: str) -> Provider:
        """As :meth:`get`, whether or not it works on this machine: its probe is not asked."""
        return _resolve(kind, name) if ":" in name else self._registered(kind, name)

    def probe(self, kind: ProviderKind, name: str, provider: Provider) -> Available | Unavailable:
        """The answer of the provider's probe, which runs once. Never raises."""
        key = (kind, name)
        with self._lock:
            if key not in self._probed:
                self._probed[key] = _run_probe(provider)
            return self._probed[key]

    def suggestion(self, kind: ProviderKind, name: str) -> str | None:
        """The name that a mistyped one most likely meant, installed or not."""
        official = [known for claimed, known in OFFICIAL if claimed == kind]
        guess = nearest(name, self.names(kind)) or nearest(name, official)
        return guess if guess != name else None

    def duplicate(self, kind: ProviderKind, name: str) -> PluginDuplicate | None:
        """The error for a name that several plugins claim, or None."""
        with self._lock:
            claims = self._claims.get((kind, name), [])
        if len(claims) < 2:
            return None
        who = " and ".join(f"{claim.origin} (plugin {claim.origin.plugin!r})" for claim in claims)
        return PluginDuplicate(
            f"the {_WORDS[kind]} {name!r} is claimed by {who}, so none of them is used. "
            f"Uninstall all but one, or name the others in plugins.block."
        )

    def _registered(self, kind: ProviderKind, name: str) -> Provider:
        with self._lock:
            claims = tuple(self._claims.get((kind, name), ()))
        if len(claims) == 1:
            return claims[0].provider
        duplicate = self.duplicate(kind, name)
        if duplicate is not None:
            raise duplicate
        for failure in self.failures:
            if self._would_provide(failure.origin, failure.provides, kind, name):
                raise PluginFailed(
                    f"the {_WORDS[kind]} {name!r} is missing because {failure}. "
                    f"`erllama plugins` lists every plugin."
                ) from failure.cause
        text, guess = self.why_missing(kind, name)
        raise PluginMissing(f"{text} (did you mean {guess!r}?)" if guess else text)

    def why_missing(self, kind: ProviderKind, name: str) -> tuple[str, str | None]:
        """Why nothing provides a name, and the name that was probably meant."""
        what = _WORDS[kind]
        for blocked in self.blocked:
            if self._would_provide(blocked.origin, (), kind, name):
                plugin = f"plugin {blocked.origin.plugin!r} of {blocked.origin}"
                return f"the {what} {name!r} is missing: {plugin} is {blocked.reason}", None
        names = self.names(kind)
        known = ", ".join(sorted(names)) or "none"
        if (kind, name) in OFFICIAL:
            install = f"pip install {OFFICIAL[kind, name]}"
            return f"the {what} {name!r} is not installed: {install}. Known: {known}.", None
        text = f"unknown {what} {name!r}; known: {known}"
        guess = self.suggestion(kind, name)
        if guess is not None and guess not in names:
            text += f"; {guess!r} is not installed: pip install {OFFICIAL[kind, guess]}"
        return text, guess

    @staticmethod
    def _would_provide(
        origin: Origin,
        provides: tuple[tuple[ProviderKind, str], ...],
        kind: ProviderKind,
        name: str,
    ) -> bool:
        """Whether a plugin that never got to say so is the one behind a name.

        It is if it came as far as naming the provider. Otherwise its entry point is called
        like it, or it is the distribution that this project publishes for that name.
        """
        if provides:
            return (kind, name) in provides
        official = OFFICIAL.get((kind, name))
        distribution = origin.distribution
        if official is not None and distribution is not None:
            return normalise(distribution) == official
        return normalise(origin.plugin) == normalise(name)


def _resolve(kind: ProviderKind, reference: str) -> Provider:
    """The provider record at ``"package.module:attribute"``."""
    module_name, _, path = reference.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise PluginFailed(
            f"{reference!r} cannot be loaded as a {_WORDS[kind]}: {one_line(error)}"
        ) from error
    wanted = RECORDS[kind]
    if not isinstance(found, wanted):
        raise PluginFailed(
            f"{reference!r} is a {type(found).__name__}; a {_WORDS[kind]} is given by an "
            f"instance of erllama_core.providers.{wanted.__name__}"
        )
    problem = record_problem(found)
    if problem is not None:
        raise PluginFailed(f"{reference!r} is not a usable provider: {problem}")
    return found


def record_problem(provider: Provider) -> str | None:
    """What is wrong with a provider record, or None."""
    name: object = provider.name
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        return f"its name {name!r} is not a word"
    if ":" in name:
        return f"its name {name!r} has a colon, which is kept for 'package.module:attribute'"
    summary: object = provider.summary
    if not isinstance(summary, str):
        return f"{name!r}: its summary is a {type(summary).__name__}, not text"
    for field in ("factory", "probe", "check", "estimate"):
        if not hasattr(provider, field):
            continue  # only some records have the last two
        value: object = getattr(provider, field)
        if not callable(value) and not (field == "estimate" and value is None):
            return f"{name!r}: its {field} is a {type(value).__name__}, which cannot be called"
    config: object = provider.config
    if not isinstance(config, type) or not attrs.has(config):
        shown = config.__name__ if isinstance(config, type) else repr(config)
        return f"{name!r}: its config is {shown}, which is not an attrs class"
    return None


def _run_probe(provider: Provider) -> Available | Unavailable:
    try:
        answer: object = provider.probe()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a probe may raise anything
        return Unavailable(f"its probe raised {one_line(error)}")
    if isinstance(answer, Available | Unavailable):
        return answer
    return Unavailable(f"its probe returned {answer!r}, neither Available nor Unavailable")

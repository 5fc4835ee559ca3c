"""The plugin host: finds plugins, keeps them apart, and lists them.

A host is an object; nothing is loaded until one is made. A plugin that raises, misspells a
hook or returns something unusable takes only itself out: what went wrong is kept, logged once
and listed.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Final, Literal, overload

import attrs
import pluggy

from erllama_core import builtin, hookspecs, telemetry
from erllama_core.compatibility import refuse_other_core
from erllama_core.errors import PluginFailed, nearest
from erllama_core.interfaces.log import get_logger
from erllama_core.providers import (
    BackendProvider,
    PressureProvider,
    Provider,
    StreamProcessorProvider,
    TierProvider,
    Unavailable,
)
from erllama_core.registry import (
    RECORDS,
    BlockedPlugin,
    Claim,
    Origin,
    PluginFailure,
    ProviderKind,
    Registry,
    Stage,
    normalise,
    one_line,
    record_problem,
)

log = get_logger(__name__)

HOOKS: Final[dict[str, ProviderKind]] = {
    "erllama_backends": "backend",
    "erllama_tiers": "tier",
    "erllama_pressure_sources": "pressure",
    "erllama_stream_processors": "processor",
}
"""What the records that a hook returns are."""

NOTIFICATIONS: Final = tuple(telemetry.HOOKS.values())
"""The hooks that are told of something, and return nothing."""

_ALL_HOOKS: Final = (*HOOKS, *NOTIFICATIONS)

CORE_DISTRIBUTION: Final = "erllama-core"

PluginState = Literal["ok", "unavailable", "failed", "blocked"]
ListedKind = ProviderKind | Literal["listener"]


@attrs.frozen
class PluginListing:
    """One line of ``erllama plugins``: a provider, or a plugin that has none to show."""

    name: str
    """The provider's name; for a listener, and for a plugin that failed or is blocked, the
    plugin's."""
    kind: ListedKind | None
    """None for a plugin that failed or is blocked."""
    distribution: str | None
    """None for what was registered by a call."""
    version: str | None
    state: PluginState
    reason: str | None
    """Why the state is not ``"ok"``."""
    summary: str


class PluginHost:
    """Loads plugins when it is made, and answers for them afterwards. Thread-safe.

    ``allow``: names of the plugins to load, all when None; ``block``: those to leave out,
    which wins. A name is that of an entry point or of its distribution; case and ``-``,
    ``_``, ``.`` do not matter. What is left out is not imported. Neither concerns the core's
    own providers or :meth:`register`. ``discover=False`` looks at no entry point at all.

    Raises nothing for a broken plugin: see :attr:`failures` and :meth:`listing`.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] | None = None,
        block: Sequence[str] = (),
        discover: bool = True,
    ) -> None:
        if isinstance(allow, str) or isinstance(block, str):
            raise TypeError("allow and block are sequences of names, not one string")
        self._allow = None if allow is None else frozenset(map(normalise, allow))
        self._block = frozenset(map(normalise, block))
        self._lock = threading.RLock()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.registry: Final = Registry()
        self._listeners: Final[dict[str, list[tuple[Origin, telemetry.Listener]]]] = {}
        core = Origin("builtin", CORE_DISTRIBUTION, _version(CORE_DISTRIBUTION))
        self._load(builtin, core)
        if discover:
            self._discover(core.version)

    # ------------------------------------------------------------- reading

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """Every plugin that failed, with the stage and the exception."""
        return self.registry.failures

    @overload
    def get(self, kind: Literal["backend"], name: str) -> BackendProvider: ...
    @overload
    def get(self, kind: Literal["tier"], name: str) -> TierProvider: ...
    @overload
    def get(self, kind: Literal["pressure"], name: str) -> PressureProvider: ...
    @overload
    def get(self, kind: Literal["processor"], name: str) -> StreamProcessorProvider: ...
    def get(self, kind: Any, name: str) -> Provider:
        """The provider of that name; see :meth:`Registry.get`."""
        provider: Provider = self.registry.get(kind, name)
        return provider

    def installed(self) -> frozenset[str]:
        """Names by which ``allow`` and ``block`` can mean a plugin that is here, normalised."""
        registry = self.registry
        origins = [claim.origin for claim in registry.claims()]
        origins += [failure.origin for failure in registry.failures]
        origins += [blocked.origin for blocked in registry.blocked]
        with self._lock:
            origins += [origin for found in self._listeners.values() for origin, _ in found]
        names = {origin.plugin for origin in origins}
        names |= {origin.distribution for origin in origins if origin.distribution is not None}
        return frozenset(map(normalise, names))

    @property
    def listeners(self) -> dict[str, tuple[telemetry.Listener, ...]]:
        """Who wants to be told of what, by the name of the hook."""
        with self._lock:
            return {
                hook: tuple(listener for _, listener in found)
                for hook, found in self._listeners.items()
            }

    def listing(self) -> tuple[PluginListing, ...]:
        """One row per provider, then listeners, plugins that failed, and those that are blocked.

        Runs every probe that has not run yet.
        """
        return tuple(self._rows())

    def _rows(self) -> Iterator[PluginListing]:
        for claim in self.registry.claims():
            yield self._provider_row(claim)
        yield from self._listener_rows()
        for failure in self.registry.failures:
            reason = f"{failure.stage}: {one_line(failure.cause)}"
            yield _plugin_row(failure.origin, "failed", reason)
        for blocked in self.registry.blocked:
            yield _plugin_row(blocked.origin, "blocked", blocked.reason)

    def _listener_rows(self) -> Iterator[PluginListing]:
        told: dict[Origin, list[str]] = {}
        with self._lock:
            for hook, found in self._listeners.items():
                for origin, _ in found:
                    told.setdefault(origin, []).append(hook)
        for origin, hooks in told.items():
            row = _plugin_row(origin, "ok", None)
            yield attrs.evolve(row, kind="listener", summary=f"listens: {', '.join(hooks)}")

    def _provider_row(self, claim: Claim) -> PluginListing:
        state: PluginState = "ok"
        reason = None
        duplicate = self.registry.duplicate(claim.kind, claim.provider.name)
        if duplicate is not None:
            state, reason = "failed", one_line(duplicate)
        else:
            answer = self.registry.probe(claim.kind, claim.provider.name, claim.provider)
            if isinstance(answer, Unavailable):
                state, reason = "unavailable", answer.reason
        return PluginListing(
            name=claim.provider.name,
            kind=claim.kind,
            distribution=claim.origin.distribution,
            version=claim.origin.version,
            state=state,
            reason=reason,
            summary=claim.provider.summary,
        )

    # ------------------------------------------------------------- loading

    def register(self, plugin: ModuleType | object, *, name: str | None = None) -> None:
        """Load a plugin that has no entry point: a module or an object with hookimpls.

        ``name`` stands for it in listings; the module's or the class's name by default.
        Raises PluginFailed, and lists the failure, when it cannot be used.
        """
        own_name = getattr(plugin, "__name__", None) or type(plugin).__qualname__
        with self._lock:
            failure = self._load(plugin, Origin(name or str(own_name)))
        if failure is not None:
            raise PluginFailed(str(failure)) from failure.cause

    def _discover(self, core: str | None) -> None:
        for distribution in _distributions():
            about = distribution.metadata  # each time it is asked for, it is parsed
            name, version = about["Name"], about["Version"]
            try:
                points = distribution.entry_points.select(group=hookspecs.PROJECT)
            except Exception as error:  # noqa: BLE001 - damaged metadata of somebody else
                self._fail(Origin(name, name, version), "metadata", error)
                continue
            for point in sorted(points, key=lambda point: point.name):
                origin = Origin(point.name, name, version)
                reason = self._blocked_by(origin)
                if reason is not None:
                    self.registry.add_blocked(BlockedPlugin(origin, reason))
                    continue
                stage: Stage = "version"
                try:
                    refuse_other_core(
                        CORE_DISTRIBUTION, core, name, version, distribution.requires or ()
                    )
                    stage = "import"
                    plugin = point.load()
                except (Exception, SystemExit) as error:  # noqa: BLE001 - plugin code
                    self._fail(origin, stage, error)
                else:
                    self._load(plugin, origin)

    def _blocked_by(self, origin: Origin) -> str | None:
        names = {normalise(origin.plugin), normalise(origin.distribution or origin.plugin)}
        if names & self._block:
            return "blocked by plugins.block"
        if self._allow is not None and not names & self._allow:
            return "not in plugins.allow"
        return None

    def _load(self, plugin: object, origin: Origin) -> PluginFailure | None:
        """Register a plugin's hooks, call each once, and take in what they return."""
        stage: Stage = "register"
        named: list[tuple[ProviderKind, str]] = []
        registered = False
        try:
            hooks = self._check_hooks(plugin)
            # Two distributions may give their entry points the same name; the key may not be.
            key = f"{origin.distribution or ''}:{origin.plugin}"
            self._manager.register(plugin, name=key)
            registered = True
            claims: list[Claim] = []
            for hook in hooks:
                if hook in NOTIFICATIONS:
                    continue
                stage = "hook"
                returned = self._call(plugin, hook)
                stage = "validate"
                claims.extend(_checked(hook, returned, origin, named))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - plugin code
            if registered:
                self._manager.unregister(plugin)
            return self._fail(origin, stage, error, tuple(named))
        self.registry.add(claims)
        for hook in hooks:
            if hook in NOTIFICATIONS:
                found = self._listeners.setdefault(hook, [])
                found.append((origin, self._listener(plugin, hook, origin)))
        return None

    def _check_hooks(self, plugin: object) -> list[str]:
        """The hooks that a plugin implements.

        pluggy accepts names that match no hook, and finds them only in a check over all
        plugins together, which cannot tell whose fault it is.
        """
        if plugin is None or inspect.isclass(plugin):
            raise TypeError(f"{plugin!r} is neither a module nor an object with hooks")
        found = []
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                _check_unmarked(plugin, attribute)
                continue
            hook = options.get("specname") or attribute
            if hook not in _ALL_HOOKS:
                guess = nearest(hook, _ALL_HOOKS)
                hint = f"; did you mean {guess!r}?" if guess else ""
                known = ", ".join(_ALL_HOOKS)
                raise NameError(f"there is no hook {hook!r}{hint} Known: {known}.")
            if options.get("wrapper") or options.get("hookwrapper"):
                raise TypeError(
                    f"{attribute} is a hook wrapper; every implementation is called by itself, "
                    f"so there is nothing to wrap"
                )
            found.append(hook)
        if not found:
            raise TypeError(
                "it implements no hook; mark its functions with erllama_core.hookspecs.hookimpl"
            )
        return sorted(found, key=_ALL_HOOKS.index)

    def _implementation(self, plugin: object, hook: str) -> pluggy.HookImpl:
        # pluggy's own call runs all implementations, and one that raises loses the results of
        # every other.
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        (found,) = (one for one in caller.get_hookimpls() if one.plugin is plugin)
        return found

    def _call(self, plugin: object, hook: str) -> object:
        returned: object = self._implementation(plugin, hook).function()
        return returned

    def _listener(self, plugin: object, hook: str, origin: Origin) -> telemetry.Listener:
        implementation = self._implementation(plugin, hook)
        function = implementation.function
        if implementation.argnames:
            return telemetry.Listener(origin.plugin, function)
        return telemetry.Listener(origin.plugin, lambda _: function())

    def _fail(
        self,
        origin: Origin,
        stage: Stage,
        cause: BaseException,
        provides: tuple[tuple[ProviderKind, str], ...] = (),
    ) -> PluginFailure:
        failure = PluginFailure(origin, stage, cause, provides)
        self.registry.add_failure(failure)
        log.warning(
            "plugin.failed",
            plugin=origin.plugin,
            distribution=origin.distribution,
            version=origin.version,
            stage=stage,
            error=one_line(cause),
        )
        return failure


def _plugin_row(origin: Origin, state: PluginState, reason: str | None) -> PluginListing:
    return PluginListing(
        name=origin.plugin,
        kind=None,
        distribution=origin.distribution,
        version=origin.version,
        state=state,
        reason=reason,
        summary="",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distributions() -> Iterator[importlib.metadata.Distribution]:
    """The installed distributions with entry points of the group, each name once.

    ``importlib.metadata.entry_points()`` reads all of them in one go, so one damaged file
    anywhere hides every plugin.
    """
    seen = set()
    for found in importlib.metadata.distributions():
        try:
            text = found.read_text("entry_points.txt")
            if text is None or hookspecs.PROJECT not in text:
                continue
            # The path may hold several versions; the one that imports see comes first.
            name = found.name
            distribution = importlib.metadata.distribution(name)
        except Exception as error:  # noqa: BLE001 - damaged metadata of somebody else
            log.warning("plugin.unreadable_distribution", error=one_line(error))
            continue
        if normalise(name) not in seen:
            seen.add(normalise(name))
            yield distribution


def _check_unmarked(plugin: object, attribute: str) -> None:
    """Refuse a function that is named like a hook and was not marked as one."""
    if attribute not in _ALL_HOOKS:
        return
    function = inspect.getattr_static(plugin, attribute)
    if inspect.isfunction(function) and function.__module__ != hookspecs.__name__:
        raise TypeError(f"{attribute} is not marked with erllama_core.hookspecs.hookimpl")


def _checked(
    hook: str,
    returned: object,
    origin: Origin,
    named: list[tuple[ProviderKind, str]],
) -> Iterator[Claim]:
    """The claims of what a hook returned; ``named`` collects the names as they are seen."""
    kind = HOOKS[hook]
    record = RECORDS[kind]
    if inspect.iscoroutine(returned):
        returned.close()
    if isinstance(returned, str) or not isinstance(returned, Sequence):
        raise TypeError(
            f"{hook} returned a {type(returned).__name__}; it must return a list of "
            f"{record.__name__}, which may be empty"
        )
    for provider in returned:
        if not isinstance(provider, record):
            raise TypeError(
                f"{hook} returned a {type(provider).__name__} in its list; it must hold "
                f"{record.__name__} alone"
            )
        problem = record_problem(provider)
        if problem is not None:
            raise TypeError(f"{hook} returned an unusable provider: {problem}")
        if (kind, provider.name) in named:
            raise ValueError(f"{hook} returned two providers named {provider.name!r}")
        named.append((kind, provider.name))
        yield Claim(kind, provider, origin)

"""What of another configuration a running engine can take over, and what it must leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar, cast

import attrs

from erllama_core.cache.policy import LIVE_POLICY
from erllama_core.config import EngineConfig, ModelConfig, TierConfig, structure_options
from erllama_core.config.structuring import dotted
from erllama_core.errors import ConfigError, ConfigProblem, PluginError
from erllama_core.host import PluginHost

T = TypeVar("T", bound=attrs.AttrsInstance)

_AT_START: Final = "is read when the engine starts"
_AT_LOADING: Final = "is read when the model is loaded; unload it and load it again"
_LIVE_ENGINE: Final = frozenset({"thinking_signing_key_file", "thinking_signing_key_env"})
_LIVE_PRESSURE: Final = frozenset(
    {
        "enabled",
        "interval_ms",
        "high_watermark",
        "low_watermark",
        "min_evict_bytes",
        "evict_tiers",
        "unload_idle_models",
    }
)
_QUOTA: Final = "quota_bytes"


@attrs.frozen
class Change:
    """A value that a reload has changed."""

    path: str
    before: Any
    after: Any
    """None, for either: not given."""

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.after)}"


@attrs.frozen
class Kept:
    """Something that is different in the configuration, and stayed as it was."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@attrs.frozen(kw_only=True)
class Reloaded:
    """What a reload did."""

    changed: tuple[Change, ...] = ()
    kept: tuple[Kept, ...] = ()
    """What was not done, and why."""
    loaded: tuple[str, ...] = ()
    """Ids of models that are new."""
    unloaded: tuple[str, ...] = ()
    """Ids of models that are gone."""

    def __str__(self) -> str:
        lines = [f"changed {change}" for change in self.changed]
        lines += [f"loaded model {name}" for name in self.loaded]
        lines += [f"unloaded model {name}" for name in self.unloaded]
        lines += [f"kept {kept}" for kept in self.kept]
        return "\n".join(lines) or "nothing is different"


@attrs.frozen(kw_only=True)
class Running:
    """What a plan must know of the engine beside its configuration."""

    loaded: frozenset[str]
    """Ids of all models that are loaded."""
    from_config: frozenset[str]
    """Of these, the ones that a configuration named; the others are the application's."""
    can_change_quota: Callable[[str], bool]
    """By a tier's name; False for one that is not open."""
    logging_is_ours: bool
    """Whether ``[logging]`` is what configures the log."""


@attrs.frozen(kw_only=True)
class Plan:
    """A reload before it is done."""

    config: EngineConfig
    """What will hold: the old configuration, with what can change taken from the new one."""
    changed: tuple[Change, ...]
    kept: tuple[Kept, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    quotas: Mapping[str, tuple[int | None, int | None]]
    """By a tier's name, the old and the new one."""

    def problems(self) -> list[ConfigProblem]:
        """Where what can change contradicts what cannot, or needs it."""
        found = [
            attrs.evolve(problem, message=f"{problem.message}, beside what cannot change now")
            for problem in self.config.problems()
        ]
        tiers = {tier.name for tier in self.config.tiers}
        for name in self.added:
            path = dotted("models", [name])
            found += [
                ConfigProblem(f"{path}.tier", f"{tier!r} is opened when the engine starts")
                for tier in self.config.models[name].tier
                if tier not in tiers
            ]
        return found

    def with_another_key(self) -> Plan:
        """The same, where the signing key is another one, whether or not its place is."""
        if any(change.path.startswith("engine.thinking_signing_key") for change in self.changed):
            return self
        engine = self.config.engine
        field = "file" if engine.thinking_signing_key_file is not None else "env"
        path = f"engine.thinking_signing_key_{field}"
        change = Change(path, "the key that it was", "the key that is there now")
        return attrs.evolve(self, changed=(*self.changed, change))


def plan_reload(
    before: EngineConfig, after: EngineConfig, running: Running, host: PluginHost
) -> Plan:
    """Compare two configurations that are both right."""
    return _Planner(running, host).plan(before, after)


class _Planner:
    def __init__(self, running: Running, host: PluginHost) -> None:
        self._running: Final = running
        self._host: Final = host
        self._changed: Final[list[Change]] = []
        self._kept: Final[list[Kept]] = []
        self._quotas: Final[dict[str, tuple[int | None, int | None]]] = {}

    def plan(self, before: EngineConfig, after: EngineConfig) -> Plan:
        logging_live = frozenset({"level", "format"}) if self._running.logging_is_ours else None
        engine = self._section("engine", before.engine, after.engine, _LIVE_ENGINE)
        plugins = self._section("plugins", before.plugins, after.plugins)
        cache = self._section("cache", before.cache, after.cache, LIVE_POLICY)
        tiers = self._tiers(before.tiers, after.tiers)
        added = tuple(name for name in after.models if name not in before.models)
        removed = tuple(name for name in before.models if name not in after.models)
        models = {
            name: model if name in added else self._model(name, before.models[name], model)
            for name, model in after.models.items()
        }
        pressure = self._section("pressure", before.pressure, after.pressure, _LIVE_PRESSURE)
        log = self._section(
            "logging",
            before.logging,
            after.logging,
            logging_live or frozenset(),
            _AT_START if logging_live else "the application configures its log by itself",
        )
        return Plan(
            config=EngineConfig(
                engine=engine,
                plugins=plugins,
                cache=cache,
                tiers=tiers,
                models=models,
                pressure=pressure,
                logging=log,
            ),
            changed=tuple(self._changed),
            kept=tuple(self._kept),
            added=added,
            removed=tuple(name for name in removed if name in self._running.from_config),
            quotas=self._quotas,
        )

    def _section(
        self,
        path: str,
        before: T,
        after: T,
        live: frozenset[str] = frozenset(),
        reason: str = _AT_START,
    ) -> T:
        """The old section with the fields in ``live`` taken from the new one."""
        taken = {}
        for name, old, new in _different(before, after):
            if name in live:
                taken[name] = new
                self._changed.append(Change(f"{path}.{name}", old, new))
            else:
                # The options of a pressure source have a table of its name in the section itself.
                place = path if name == "source_options" else dotted(path, [name])
                places = _leaves(place, old, new)
                self._kept.extend(Kept(place, reason) for place in places)
        made: Any = before  # mypy follows evolve into no type variable
        return cast("T", attrs.evolve(made, **taken))

    def _tiers(
        self, before: tuple[TierConfig, ...], after: tuple[TierConfig, ...]
    ) -> list[TierConfig]:
        new = {tier.name: (index, tier) for index, tier in enumerate(after)}
        old = {tier.name for tier in before}
        made = []
        for tier in before:
            index, other = new.get(tier.name, (None, None))
            if index is None or other is None:
                path = dotted("tiers", [tier.name])
                self._kept.append(Kept(path, "stays open until the engine is closed"))
                made.append(tier)
            else:
                made.append(self._tier(dotted("tiers", [index]), tier, other))
        for name, (index, _) in new.items():
            if name not in old:
                path = dotted("tiers", [index])
                self._kept.append(Kept(path, f"{name!r} is opened when the engine starts"))
        return made

    def _tier(self, path: str, before: TierConfig, after: TierConfig) -> TierConfig:
        if before.kind != after.kind:
            self._kept.append(Kept(f"{path}.kind", _AT_START))
            return before
        options = dict(before.options)
        for name, old, new in self._options_apart(
            "tier", before.kind, before.options, after.options
        ):
            if name == _QUOTA and self._running.can_change_quota(before.name):
                self._quotas[before.name] = (old, new)
                self._changed.append(Change(f"{path}.{name}", old, new))
                options.pop(name, None)
                if new is not None:
                    options[name] = new
            else:
                self._kept.append(Kept(dotted(path, [name]), _AT_START))
        return attrs.evolve(before, options=options)

    def _model(self, name: str, before: ModelConfig, after: ModelConfig) -> ModelConfig:
        path = dotted("models", [name])
        if name not in self._running.loaded:
            self._kept.append(Kept(path, "was unloaded meanwhile, and is not loaded again"))
            return after
        policy = before.policy
        for field, old, new in _different(before, after):
            if field == "policy":
                policy = self._policy(f"{path}.policy", old, new)
            elif field != "model_opts" or any(
                self._options_apart("backend", before.backend, old, new)
            ):
                places = _leaves(f"{path}.{field}", old, new)
                self._kept.extend(Kept(place, _AT_LOADING) for place in places)
        return attrs.evolve(before, policy=policy)

    def _policy(
        self, path: str, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A model's own policy: what it says of a field, or that it leaves it to ``[cache]``."""
        made = dict(before)
        for name in sorted({*before, *after}):
            if (name in before) == (name in after) and before[name] == after[name]:
                continue
            if name not in LIVE_POLICY:
                self._kept.append(Kept(f"{path}.{name}", _AT_LOADING))
                continue
            self._changed.append(Change(f"{path}.{name}", before.get(name), after.get(name)))
            made.pop(name, None)
            if name in after:
                made[name] = after[name]
        return made

    def _options_apart(
        self, kind: Any, name: str, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> list[tuple[str, Any, Any]]:
        """Where two tables of a provider's options differ in what they mean, not as written."""
        if before == after:
            return []
        try:
            config = self._host.get(kind, name).config
            structured = structure_options(config, before), structure_options(config, after)
        except (ConfigError, PluginError):
            names = sorted({*before, *after})
            return [
                (key, before.get(key), after.get(key))
                for key in names
                if before.get(key) != after.get(key)
            ]
        return list(_different(*structured))


def _different(before: T, after: T) -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two instances of one attrs class differ."""
    for field in attrs.fields(type(before)):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old != new:
            yield field.name, old, new


def _leaves(path: str, before: Any, after: Any) -> list[str]:
    """The paths below ``path`` at which two values differ."""
    if type(before) is type(after) and attrs.has(type(before)):
        inner = list(_different(before, after))
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        inner = [
            (str(key), before.get(key), after.get(key))
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
    else:
        return [path]
    return [place for name, old, new in inner for place in _leaves(dotted(path, [name]), old, new)]


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)

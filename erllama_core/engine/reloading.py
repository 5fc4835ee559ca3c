"""Another configuration for an engine that runs: all of it that can change, or nothing."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from erllama_core.cache.cache import Cache
from erllama_core.config import (
    EngineConfig,
    ModelConfig,
    PressureConfig,
    check_config,
    examine_loaded,
    memory_problems,
    read_config,
    read_signing_key,
)
from erllama_core.config.structuring import dotted
from erllama_core.engine.model_table import ModelTable
from erllama_core.engine.reload_plan import Plan, Reloaded, Running, plan_reload
from erllama_core.errors import ConfigError, ConfigProblem, ErllamaError
from erllama_core.host import PluginHost
from erllama_core.interfaces.log import get_logger
from erllama_core.logs import logging_is_ours, reconfigure_logging
from erllama_core.pressure.monitor import Monitor
from erllama_core.signing import SigningKey

log = get_logger("erllama.engine")

ConfigSource = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a TOML file, or the same structure as a mapping."""


@attrs.frozen
class Settings:
    """What holds of a configuration."""

    config: EngineConfig
    signing_key: SigningKey | None


class Reloader:
    """Reloads an engine's configuration; one at a time, the others wait.

    ``settings`` is what holds now, replaced as a whole and read without a lock. ``load`` and
    ``unload`` are the engine's.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelTable,
        cache: Cache,
        monitor: Monitor,
        plugins: PluginHost,
        *,
        load: Callable[[str, ModelConfig, EngineConfig], object],
        unload: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.source: ConfigSource | None = None
        """Where the configuration was read."""
        self._models: Final = models
        self._cache: Final = cache
        self._monitor: Final = monitor
        self._plugins: Final = plugins
        self._load: Final = load
        self._unload: Final = unload
        self._lock: Final = threading.Lock()

    def reload(self, source: ConfigSource | EngineConfig | None) -> Reloaded:
        """See :meth:`Engine.reload`."""
        with self._lock:
            try:
                plan, key = self._plan(self.source if source is None else source)
                with contextlib.ExitStack() as undo:
                    for model_id in plan.added:
                        self._load(model_id, plan.config.models[model_id], plan.config)
                        undo.callback(self._unload, model_id)
                    self._take_over(plan, key, undo)
                    undo.pop_all()  # nothing failed, so nothing is taken back
            except ErllamaError as error:
                problems = error.problems if isinstance(error, ConfigError) else ()
                log.warning(
                    "config.reload_refused",
                    error=type(error).__name__,
                    problems=[problem.path for problem in problems],
                )
                raise
            self._models.note_named(plan.added)
            for model_id in plan.removed:
                self._unload(model_id)
        done = plan.done
        log.info(
            "config.reloaded",
            changed=[change.path for change in done.changed],
            kept=[kept.path for kept in done.kept],
            loaded=done.loaded,
            unloaded=done.unloaded,
        )
        return done

    def _plan(self, source: ConfigSource | EngineConfig | None) -> tuple[Plan, SigningKey | None]:
        """What there is to do, and the key that there is now; raises ConfigError."""
        if source is None:
            raise ValueError("the engine was not made from a file: give reload a configuration")
        if isinstance(source, EngineConfig):
            wanted, name, problems = source, None, check_config(source, self._plugins, stores=False)
        else:
            found = examine_loaded(read_config(source), self._plugins, stores=False)
            wanted, name, problems = found.config, found.source, list(found.problems)
        loaded = {model.id for model in self._models.all()}
        named = self._models.named
        for model_id in wanted.models:
            if model_id in loaded - named:
                message = "the application has loaded a model under this id"
                problems.append(ConfigProblem(dotted("models", [model_id]), message))
        if problems:
            raise ConfigError(problems, name)
        opened = self._cache.tier_names()
        running = Running(
            loaded=frozenset(loaded),
            from_config=named,
            can_change_quota=lambda tier: tier in opened and self._cache.can_change_quota(tier),
            logging_is_ours=logging_is_ours(),
        )
        plan = plan_reload(self.settings.config, wanted, running, self._plugins)
        # What is new may contradict what cannot change.
        problems = plan.problems() + memory_problems(plan.config, self._plugins)
        if problems:
            raise ConfigError(problems, name)
        key = read_signing_key(plan.config.engine)
        return (plan if key == self.settings.signing_key else plan.with_another_key()), key

    def _take_over(self, plan: Plan, key: SigningKey | None, undo: contextlib.ExitStack) -> None:
        """Let a plan hold, but for its models; ``undo`` takes back what was done until then."""
        before, after = self.settings, Settings(plan.config, key)
        own = self._models.configs()
        undo.callback(self._hold, before, own)
        self._hold(after, own)
        for model in self._models.all():
            if model.id not in own:
                continue  # loaded this very moment, by somebody else
            old, new = (
                settings.config.policy_for(settings.config.models.get(model.id, own[model.id]))
                for settings in (before, after)
            )
            if old != new:
                undo.callback(model.set_policy, old)
                model.set_policy(new)
        self._follow_pressure(before.config.pressure, plan.config.pressure, undo)
        if plan.config.logging != before.config.logging:
            undo.callback(reconfigure_logging, before.config.logging)
            reconfigure_logging(plan.config.logging)
        for tier, (old_quota, new_quota) in plan.quotas.items():
            undo.callback(self._cache.set_quota, tier, old_quota)
            self._cache.set_quota(tier, new_quota)

    def _hold(self, settings: Settings, own: Mapping[str, ModelConfig]) -> None:
        self.settings = settings
        models = settings.config.models
        self._models.set_configs({name: models.get(name, config) for name, config in own.items()})

    def _follow_pressure(
        self, old: PressureConfig, new: PressureConfig, undo: contextlib.ExitStack
    ) -> None:
        """Change of the monitor what the configuration changes; what calls changed, they keep."""
        monitor = self._monitor
        fields = attrs.asdict(new.thresholds)
        changed = {name for name, value in fields.items() if value != getattr(old, name)}
        if changed:
            now = monitor.status().thresholds
            undo.callback(monitor.set_thresholds, **{name: getattr(now, name) for name in changed})
            monitor.set_thresholds(**{name: fields[name] for name in changed})
        if new.enabled != old.enabled:
            switch = {True: monitor.enable, False: monitor.disable}
            undo.callback(switch[monitor.status().enabled])
            switch[new.enabled]()


def lasting(source: ConfigSource) -> ConfigSource:
    """A source that means the same later, wherever the process works then."""
    return source if isinstance(source, Mapping) else Path(source).absolute()

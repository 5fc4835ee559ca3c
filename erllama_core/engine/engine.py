"""The engine: plugin host, cache and loaded models of one process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from erllama_core.cache.cache import Cache
from erllama_core.cache.tiers import NamedTier
from erllama_core.config import (
    EngineConfig,
    ModelConfig,
    TierConfig,
    config_warnings,
    examine_loaded,
    memory_problems,
    model_config,
    plugin_host,
    read_config,
    read_signing_key,
    structure_options,
)
from erllama_core.config.structuring import dotted
from erllama_core.engine.aio import AsyncEngine
from erllama_core.engine.calls import ModelCalls
from erllama_core.engine.model_table import ModelTable
from erllama_core.engine.release import Releaser
from erllama_core.engine.reload_plan import Reloaded
from erllama_core.engine.reloading import ConfigSource, Reloader, Settings, lasting
from erllama_core.engine.sources import pressure_sources
from erllama_core.errors import (
    CacheError,
    ConfigError,
    ConfigProblem,
    EngineClosed,
    ErllamaError,
    TierError,
    unknown_name,
)
from erllama_core.host import PluginHost
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.stream import RunningSignature
from erllama_core.interfaces.telemetry import (
    CacheEvent,
    ModelLoaded,
    Notification,
    PressureSampled,
    RequestFinished,
)
from erllama_core.interfaces.tier import Tier
from erllama_core.model.footprint import Footprint, set_aside
from erllama_core.model.loading import open_model
from erllama_core.model.model import Model, ModelRef
from erllama_core.model.parts import ReplySetup
from erllama_core.pressure.monitor import Monitor
from erllama_core.providers import check_made
from erllama_core.registry import one_line
from erllama_core.results import ModelInfo
from erllama_core.signing import NoSignature
from erllama_core.stream.pipeline import Stage
from erllama_core.stream.stream import Stream
from erllama_core.telemetry import Notifier

log = get_logger("erllama.engine")


class Engine(ModelCalls):
    """One per process; thread-safe; a context manager.

    ``config`` decides tiers, cache and plugins; its models are loaded by
    :meth:`from_config`. A tier that cannot be opened is left out with a warning: what would
    have been stored there is computed again instead.
    """

    def __init__(
        self, config: EngineConfig | None = None, *, plugins: PluginHost | None = None
    ) -> None:
        self._pid: Final = os.getpid()
        config = EngineConfig() if config is None else config
        problems = config.problems()
        if problems:
            raise ConfigError(problems)
        signing_key = read_signing_key(config.engine)
        self.plugins: Final = plugin_host(config) if plugins is None else plugins
        problems = memory_problems(config, self.plugins)
        if problems:
            raise ConfigError(problems)
        for warning in config_warnings(config, self.plugins):
            log.warning("config.questionable", path=warning.path, message=warning.message)
        self._closing: Final = threading.Lock()
        self._models: Final = ModelTable()
        self._ids: Final = itertools.count(1)
        with contextlib.ExitStack() as undo:
            self._notifier: Final = Notifier(self.plugins.listeners)
            undo.callback(self._notifier.close)
            self._cache: Final = self._open_cache(config)
            undo.callback(self._cache.close)
            self._pressure: Final = self._open_pressure(config)
            undo.pop_all()
        self._reloader: Final = Reloader(
            Settings(config, signing_key),
            self._models,
            self._cache,
            self._pressure,
            self.plugins,
            load=self._load,
            unload=self.unload,
        )
        self.aio: Final = AsyncEngine(self)
        # What is still in save buffers when a program ends without closing is written. The
        # engine's threads would outlive it otherwise, so until it is closed it stays.
        self._at_exit: Final = functools.partial(_close_at_exit, self, self._pid)
        atexit.register(self._at_exit)
        log.info("engine.opened", tiers=self._cache.tier_names())

    @classmethod
    def from_config(cls, source: ConfigSource, *, plugins: PluginHost | None = None) -> Engine:
        """An engine with the tiers and the models of a file, or of the same structure.

        Raises ConfigError with every mistake, those of plugins' options and missing files
        among them, and ModelLoadError; nothing is left running then.
        """
        loaded = read_config(source)
        host = plugin_host(loaded.config) if plugins is None else plugins
        # A tier that cannot be opened is left out with a warning, and no mistake.
        found = examine_loaded(loaded, host, stores=False)
        if found.problems:
            raise ConfigError(found.problems, found.source)
        engine = cls(loaded.config, plugins=host)
        engine._reloader.source = lasting(source)
        try:
            for model_id, model in loaded.config.models.items():
                engine._load(model_id, model, loaded.config)
            engine._models.note_named(loaded.config.models)
        except BaseException:
            engine.close()
            raise
        return engine

    def _teller(self, kind: type[Notification]) -> Callable[[Notification], None] | None:
        """What notifications of a kind are given to; None when no plugin listens to them."""
        return self._notifier.tell if self._notifier.listens_to(kind) else None

    def _open_pressure(self, config: EngineConfig) -> Monitor:
        settings = config.pressure
        monitor = Monitor(
            settings.thresholds,
            functools.partial(pressure_sources, settings, self.plugins),
            Releaser(
                self._cache,
                config,
                self.plugins,
                models=self._models.all,
                unload_if_idle=self._unload_if_idle,
            ),
            tell=self._teller(PressureSampled),
        )
        if settings.enabled:
            monitor.enable()
        return monitor

    def _open_cache(self, config: EngineConfig) -> Cache:
        settings = config.cache
        tiers = self._open_tiers(config.tiers)
        try:
            return Cache(
                tiers,
                max_inflight_bytes=settings.max_inflight_bytes,
                writer_threads=settings.writer_threads,
                loader_threads=settings.loader_threads,
                marks_share=settings.marks_share,
                read_timeout_s=settings.read_timeout_ms / 1000,
                write_timeout_s=settings.write_timeout_ms / 1000,
                memory_budget_bytes=config.engine.memory_budget_bytes,
                on_event=self._teller(CacheEvent),
            )
        except BaseException:
            for named in tiers:
                named.tier.close()
            raise

    def _open_tiers(self, tiers: Sequence[TierConfig]) -> list[NamedTier]:
        opened: list[NamedTier] = []
        try:
            for number, tier in enumerate(tiers):
                try:
                    opened.append(open_tier(self.plugins, tier, path=f"tiers[{number}]"))
                except (CacheError, OSError) as error:
                    log.warning("tier.not_opened", tier=tier.name, kind=tier.kind, error=str(error))
        except BaseException:
            for named in opened:
                named.tier.close()
            raise
        return opened

    # ------------------------------------------------------------------- models

    def load_model(
        self, model_id: str | None = None, config: ModelConfig | None = None, **options: Any
    ) -> Model:
        """Load a model; blocks until it can take requests.

        ``options`` are the keys of a ``[models.<id>]`` table, instead of a ``config``. The id
        is made up when none is given. Raises AlreadyLoaded, ModelLoadError, ConfigError,
        PluginError.
        """
        self._check_open()
        if config is not None and options:
            raise TypeError("give load_model a config or single options, not both")
        chosen = model_config(options if config is None else config)
        name = f"{chosen.backend}-{next(self._ids)}" if model_id is None else model_id
        return self._load(name, chosen, self.config)

    def _load(self, name: str, chosen: ModelConfig, config: EngineConfig) -> Model:
        """Load a model, with the tiers and the policy of ``config``."""
        self._models.claim(name)
        started = time.perf_counter()
        memory: Footprint | None = None
        try:
            provider = self.plugins.get("backend", chosen.backend)
            backend_options = structure_options(provider.config, chosen.model_opts, "model_opts")
            memory = set_aside(name, chosen, provider, backend_options, self._cache)
            parts = open_model(
                name,
                chosen,
                provider,
                backend_options,
                cache=self._cache,
                tiers=self._usable_tiers(chosen, config),
                policy=config.policy_for(chosen),
                reply=self._reply_setup(chosen),
                memory=memory,
                tell_finished=self._teller(RequestFinished),
            )
            model = Model(parts, self.unload)
            try:
                self._models.add(model, chosen)
            except EngineClosed:
                model.close()
                raise
            seconds = time.perf_counter() - started
            log.info("model.loaded", model=name, backend=chosen.backend, seconds=round(seconds, 3))
            if self._notifier.listens_to(ModelLoaded):
                self._notifier.tell(ModelLoaded(model=model.info(), seconds=seconds))
        except BaseException:
            if memory is not None:
                memory.release()
            raise
        else:
            return model
        finally:
            self._models.unclaim(name)

    def _usable_tiers(self, model: ModelConfig, config: EngineConfig) -> list[str]:
        """The model's tiers that are open; one that was never configured is a mistake."""
        configured = {tier.name for tier in config.tiers}
        for number, name in enumerate(model.tier):
            if name not in configured:
                message = unknown_name("tier", name, configured)
                raise ConfigError([ConfigProblem(f"tier[{number}]", message)])
        opened = self._cache.tier_names()
        return [name for name in model.tier if name in opened]

    def _reply_setup(self, config: ModelConfig) -> ReplySetup:
        stages = []
        for name in (*config.processors, "utf8"):
            provider = self.plugins.get("processor", name)
            options = config.processor_opts.get(name, {})
            path = dotted("processor_opts", [name])
            stages.append(Stage(provider, structure_options(provider.config, options, path)))
        return ReplySetup(
            stages=tuple(stages),
            thinking_markers=config.thinking_markers,
            tool_call_markers=config.tool_call_markers,
            begin_signature=self._begin_signature,
        )

    def _begin_signature(self) -> RunningSignature:
        key = self._reloader.settings.signing_key  # which a reload may have changed
        return NoSignature() if key is None else key.begin()

    def model(self, model_id: str) -> Model:
        """The model loaded under an id. Raises ModelNotFound."""
        return self._resolve(model_id)

    def unload(self, model: ModelRef) -> None:
        """End a model's requests with EngineClosed and free it. Unknown is a no-op."""
        found = self._models.take(model)
        if found is None:
            return
        try:
            found.close()
        finally:
            self._models.forget(found)
        log.info("model.unloaded", model=found.id)

    def _unload_if_idle(self, model: Model) -> bool:
        """Unload a model in which nothing runs or waits; whether it was."""
        if not model.stop_if_idle():
            return False
        self.unload(model)
        return True

    def models(self) -> list[ModelInfo]:
        """Every loaded model."""
        return [model.info() for model in self._models.all()]

    def queue_depth(self, model: ModelRef | None = None) -> int:
        """Streams of a model, or of all, that have not ended; 0 for an unknown one."""
        if model is not None:
            found = self._find(model)
            return 0 if found is None else found.queue_depth()
        return sum(one.queue_depth() for one in self._models.all())

    # ----------------------------------------------------------------- requests

    def cancel(self, stream_or_request_id: Stream | int) -> None:
        """End a request at its next token; ``Done`` still comes. Idempotent, unknown is a no-op.

        The id is a stream's ``request_id``, so that it can be cancelled without the stream.
        """
        if isinstance(stream_or_request_id, Stream):
            stream_or_request_id.cancel()
            return
        loaded = self._models.all()
        any(model.cancel(stream_or_request_id) for model in loaded)

    def verify_thinking(self, thinking: str | bytes, signature: bytes) -> bool:
        """Whether an engine with this one's key signed this thinking; False without a key."""
        key = self._reloader.settings.signing_key
        return key is not None and key.verify(thinking, signature)

    # ---------------------------------------------------------------- lifecycle

    @property
    def cache(self) -> Cache:
        """The cache that all models share."""
        return self._cache

    @property
    def pressure(self) -> Monitor:
        """What watches memory, and gives it back."""
        self._check_fork()
        return self._pressure

    @property
    def config(self) -> EngineConfig:
        """What holds: what the engine was made with, and what reloads have changed of it."""
        return self._reloader.settings.config

    def reload(self, source: ConfigSource | EngineConfig | None = None) -> Reloaded:
        """Read the configuration again, and take over what can change while the engine runs.

        ``source`` None: what :meth:`from_config` was given. Models that are new in it are
        loaded, those that are gone are unloaded, last of all; pressure, quotas, the save policy
        of loaded models, the log and the signing key become what it says. The result tells
        what was done, and what stays as it is until the engine is made anew. Requests that run
        are left alone, but for those of models that go.

        All or nothing: raises ConfigError with every mistake, ModelLoadError, and then nothing
        has changed. Blocks while models are loaded; not for a signal handler to call, which
        has a thread do it. Calls take turns.
        """
        self._check_open()
        return self._reloader.reload(source)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the state of every answered request is in the tiers.

        An answer comes before its state is saved, so that saving costs no caller time.
        ``close`` does this too. False when time ran out.
        """
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        loaded = self._models.all()
        return all(model.settle(left()) for model in loaded) and self._cache.flush(left())

    def close(self) -> None:
        """Save what runs, answer every caller, free models and tiers. Idempotent.

        Returns when that is done, also to a second thread that closes. Not for a stream
        processor to call: it runs on a worker.
        """
        self._check_fork()
        with self._closing:
            loaded = self._models.close()
            self._pressure.close()
            for model in loaded:
                model.close()
            self._models.clear()
            self._cache.close()
            self._notifier.close()
            atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, model: ModelRef) -> Model | None:
        return self._models.find(model)

    def _resolve(self, model: ModelRef) -> Model:
        self._check_open()
        if isinstance(model, Model):
            return model
        return self._models.get(model)

    def _check_open(self) -> None:
        self._check_fork()
        if self._models.is_closed:
            raise EngineClosed("the engine is closed")

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed(
                "this engine was made before the process forked, and its threads are the "
                "parent's; make one after the fork"
            )


def open_tier(plugins: PluginHost, config: TierConfig, *, path: str = "") -> NamedTier:
    """A tier as its table describes it, for an engine or for a :class:`Cache` alone.

    ``path`` goes before the paths of configuration problems. Raises ConfigError, PluginError,
    TierError, OSError.
    """
    provider = plugins.get("tier", config.kind)
    options = structure_options(provider.config, config.options, path)
    try:
        tier = check_made(provider.factory(options), Tier)
    except (ErllamaError, OSError):
        raise
    except Exception as error:
        reason = one_line(error)
        raise TierError(f"the tier kind {config.kind!r} could not open it: {reason}") from error
    return NamedTier(config.name, config.kind, tier)


def _close_at_exit(engine: Engine, pid: int) -> None:
    if os.getpid() == pid:
        engine.close()

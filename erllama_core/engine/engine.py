"""The engine: plugin host, cache and loaded models of one process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, Unpack

import attrs

from erllama_core.cache.budget import Hold
from erllama_core.cache.cache import Cache
from erllama_core.cache.tiers import NamedTier
from erllama_core.config import (
    EngineConfig,
    ModelConfig,
    PressureConfig,
    TierConfig,
    check_config,
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
from erllama_core.engine.release import Releaser
from erllama_core.engine.reload_plan import Plan, Reloaded, Running, plan_reload
from erllama_core.engine.sources import pressure_sources
from erllama_core.errors import (
    AlreadyLoaded,
    CacheError,
    ConfigError,
    ConfigProblem,
    EngineClosed,
    ErllamaError,
    ModelNotFound,
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
from erllama_core.logs import logging_is_ours, reconfigure_logging
from erllama_core.model.footprint import set_aside
from erllama_core.model.loading import open_model
from erllama_core.model.model import Model, ModelRef, PromptLike, ReplySetup
from erllama_core.model.options import ReplyKwargs, RequestKwargs
from erllama_core.pressure.monitor import Monitor
from erllama_core.prompt import Prompt
from erllama_core.results import (
    AdapterInfo,
    CacheHit,
    CacheKey,
    Completion,
    Explanation,
    ModelInfo,
    Phase,
    Prefill,
    Replay,
)
from erllama_core.signing import NoSignature, SigningKey
from erllama_core.stream.pipeline import Stage
from erllama_core.stream.stream import Stream
from erllama_core.telemetry import Notifier

log = get_logger("erllama.engine")

ConfigSource = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a TOML file, or the same structure as a mapping."""


class Engine:
    """One per process; thread-safe; a context manager.

    ``config`` decides tiers, cache and plugins; its models are loaded by
    :meth:`from_config`. A tier that cannot be opened is left out with a warning: what would
    have been stored there is computed again instead.
    """

    def __init__(
        self, config: EngineConfig | None = None, *, plugins: PluginHost | None = None
    ) -> None:
        self._pid: Final = os.getpid()
        self._config = EngineConfig() if config is None else config
        problems = self._config.problems()
        if problems:
            raise ConfigError(problems)
        self._signing_key = read_signing_key(self._config.engine)
        self.plugins: Final = plugin_host(self._config) if plugins is None else plugins
        problems = memory_problems(self._config, self.plugins)
        if problems:
            raise ConfigError(problems)
        for warning in config_warnings(self._config, self.plugins):
            log.warning("config.questionable", path=warning.path, message=warning.message)
        self._notifier: Final = Notifier(self.plugins.listeners)
        settings = self._config.cache
        self._cache: Final = Cache(
            self._open_tiers(),
            max_inflight_bytes=settings.max_inflight_bytes,
            writer_threads=settings.writer_threads,
            loader_threads=settings.loader_threads,
            marks_share=settings.marks_share,
            read_timeout_s=settings.read_timeout_ms / 1000,
            write_timeout_s=settings.write_timeout_ms / 1000,
            memory_budget_bytes=self._config.engine.memory_budget_bytes,
            on_event=self._teller(CacheEvent),
        )
        self._lock: Final = threading.Lock()
        self._closing: Final = threading.Lock()
        self._reloading: Final = threading.Lock()
        self._source: ConfigSource | None = None
        self._models: Final[dict[str, Model]] = {}
        self._model_configs: Final[dict[str, ModelConfig]] = {}
        self._from_config: Final[set[str]] = set()
        """Ids of models that are loaded because the configuration names them."""
        self._loading: Final[set[str]] = set()
        self._ids: Final = itertools.count(1)
        self._closed = False
        try:
            self._pressure: Final = self._open_pressure()
        except BaseException:
            self._cache.close()
            self._notifier.close()
            raise
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
        engine._source = _lasting(source)
        try:
            for model_id, model in loaded.config.models.items():
                engine._load(model_id, model, loaded.config)
                engine._from_config.add(model_id)
        except BaseException:
            engine.close()
            raise
        return engine

    def _teller(self, kind: type[Notification]) -> Callable[[Notification], None] | None:
        """What notifications of a kind are given to; None when no plugin listens to them."""
        return self._notifier.tell if self._notifier.listens_to(kind) else None

    def _open_pressure(self) -> Monitor:
        settings = self._config.pressure
        monitor = Monitor(
            settings.thresholds,
            functools.partial(pressure_sources, settings, self.plugins),
            Releaser(
                self._cache,
                self._config,
                self.plugins,
                models=self._loaded,
                unload_if_idle=self._unload_if_idle,
            ),
            tell=self._teller(PressureSampled),
        )
        if settings.enabled:
            monitor.enable()
        return monitor

    def _loaded(self) -> list[Model]:
        with self._lock:
            return list(self._models.values())

    def _open_tiers(self) -> list[NamedTier]:
        opened: list[NamedTier] = []
        try:
            for number, tier in enumerate(self._config.tiers):
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
        return self._load(name, chosen, self._config)

    def _load(self, name: str, chosen: ModelConfig, config: EngineConfig) -> Model:
        """Load a model, with the tiers and the policy of ``config``."""
        with self._lock:
            if name in self._models or name in self._loading:
                raise AlreadyLoaded(f"a model is loaded as {name!r}; unload it or use another id")
            self._loading.add(name)
        started = time.perf_counter()
        hold: Hold | None = None
        try:
            provider = self.plugins.get("backend", chosen.backend)
            backend_options = structure_options(provider.config, chosen.model_opts, "model_opts")
            hold = set_aside(name, chosen, provider, backend_options, self._cache)
            parts = open_model(
                name,
                chosen,
                provider,
                backend_options,
                cache=self._cache,
                tiers=self._usable_tiers(chosen, config),
                policy=config.policy_for(chosen),
                reply=self._reply_setup(chosen),
                tell_finished=self._teller(RequestFinished),
            )
            model = Model(parts, self.unload, hold)
            with self._lock:
                is_open = not self._closed
                if is_open:
                    self._models[name] = model
                    self._model_configs[name] = chosen
            if not is_open:
                model.close()
                raise EngineClosed("the engine was closed while the model was loading")
            seconds = time.perf_counter() - started
            log.info("model.loaded", model=name, backend=chosen.backend, seconds=round(seconds, 3))
            if self._notifier.listens_to(ModelLoaded):
                self._notifier.tell(ModelLoaded(model=model.info(), seconds=seconds))
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        else:
            return model
        finally:
            with self._lock:
                self._loading.discard(name)

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
        key = self._signing_key  # which a reload may have changed
        return NoSignature() if key is None else key.begin()

    def model(self, model_id: str) -> Model:
        """The model loaded under an id. Raises ModelNotFound."""
        return self._resolve(model_id)

    def unload(self, model: ModelRef) -> None:
        """End a model's requests with EngineClosed and free it. Unknown is a no-op."""
        name = model if isinstance(model, str) else model.id
        with self._lock:
            found = self._models.get(name)
            if found is None or (isinstance(model, Model) and found is not model):
                return
            del self._models[name]
            self._model_configs.pop(name, None)
            self._from_config.discard(name)
        found.close()
        log.info("model.unloaded", model=name)

    def _unload_if_idle(self, model: Model) -> bool:
        """Unload a model in which nothing runs or waits; whether it was."""
        if not model.stop_if_idle():
            return False
        self.unload(model)
        return True

    def models(self) -> list[ModelInfo]:
        """Every loaded model."""
        with self._lock:
            loaded = list(self._models.values())
        return [model.info() for model in loaded]

    def phase(self, model: ModelRef) -> Phase:
        """What a model is doing, without waiting for it; an unknown one is idle."""
        found = self._find(model)
        return "idle" if found is None else found.phase()

    def pending_len(self, model: ModelRef) -> int:
        """Requests that wait for a sequence of a model; 0 for an unknown one."""
        found = self._find(model)
        return 0 if found is None else found.pending_len()

    def queue_depth(self, model: ModelRef | None = None) -> int:
        """Streams of a model, or of all, that have not ended; 0 for an unknown one."""
        if model is not None:
            found = self._find(model)
            return 0 if found is None else found.queue_depth()
        with self._lock:
            loaded = list(self._models.values())
        return sum(one.queue_depth() for one in loaded)

    def last_cache_hit(self, model: ModelRef) -> CacheHit | None:
        """What the request found that a model admitted last; None before, or if unknown."""
        found = self._find(model)
        return None if found is None else found.last_cache_hit()

    def _find(self, model: ModelRef) -> Model | None:
        with self._lock:
            return self._models.get(model if isinstance(model, str) else model.id)

    def model_info(self, model: ModelRef) -> ModelInfo:
        """One loaded model. Raises ModelNotFound."""
        return self._resolve(model).info()

    # ----------------------------------------------------------------- requests

    def complete(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Completion:
        """See :meth:`Model.complete`."""
        return self._resolve(model).complete(prompt, **options)

    def infer(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Stream:
        """See :meth:`Model.infer`."""
        return self._resolve(model).infer(prompt, **options)

    def prefill_only(
        self,
        model: ModelRef,
        prompt: PromptLike,
        *,
        parent_key: CacheKey | None = None,
        cache_salt: str | None = None,
        pin: bool = False,
    ) -> Prefill:
        """See :meth:`Model.prefill_only`."""
        return self._resolve(model).prefill_only(
            prompt, parent_key=parent_key, cache_salt=cache_salt, pin=pin
        )

    def continue_session(
        self,
        model: ModelRef,
        suffix_tokens: Sequence[int],
        *,
        session_id: Hashable,
        expect_committed: Sequence[int] | None = None,
        **options: Unpack[ReplyKwargs],
    ) -> Stream:
        """See :meth:`Model.continue_session`."""
        return self._resolve(model).continue_session(
            suffix_tokens, session_id=session_id, expect_committed=expect_committed, **options
        )

    def end_session(self, model: ModelRef, session_id: Hashable) -> None:
        """See :meth:`Model.end_session`; an unknown model is a no-op too."""
        found = self._find(model)
        if found is not None:
            found.end_session(session_id)

    def reset_session(self, model: ModelRef, session_id: Hashable) -> bool:
        """See :meth:`Model.reset_session`."""
        return self._resolve(model).reset_session(session_id)

    def load_adapter(
        self,
        model: ModelRef,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        scale: float = 1.0,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """See :meth:`Model.load_adapter`."""
        return self._resolve(model).load_adapter(path, name=name, scale=scale, timeout_s=timeout_s)

    def unload_adapter(self, model: ModelRef, name: str, *, timeout_s: float | None = None) -> None:
        """See :meth:`Model.unload_adapter`."""
        self._resolve(model).unload_adapter(name, timeout_s=timeout_s)

    def set_adapter_scale(
        self, model: ModelRef, name: str, scale: float, *, timeout_s: float | None = None
    ) -> None:
        """See :meth:`Model.set_adapter_scale`."""
        self._resolve(model).set_adapter_scale(name, scale, timeout_s=timeout_s)

    def list_adapters(self, model: ModelRef) -> list[AdapterInfo]:
        """See :meth:`Model.list_adapters`."""
        return self._resolve(model).list_adapters()

    def why(
        self, model: ModelRef, prompt: PromptLike, *, cache_salt: str | None = None
    ) -> Explanation:
        """See :meth:`Model.why`."""
        return self._resolve(model).why(prompt, cache_salt=cache_salt)

    def cancel(self, stream_or_request_id: Stream | int) -> None:
        """End a request at its next token; ``Done`` still comes. Idempotent, unknown is a no-op.

        The id is a stream's ``request_id``, so that it can be cancelled without the stream.
        """
        if isinstance(stream_or_request_id, Stream):
            stream_or_request_id.cancel()
            return
        with self._lock:
            loaded = list(self._models.values())
        any(model.cancel(stream_or_request_id) for model in loaded)

    def tokenize(
        self,
        model: ModelRef,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = True,
    ) -> Prompt:
        """See :meth:`Model.tokenize`."""
        return self._resolve(model).tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, model: ModelRef, tokens: Sequence[int]) -> str:
        """See :meth:`Model.detokenize`."""
        return self._resolve(model).detokenize(tokens)

    def apply_chat_template(
        self,
        model: ModelRef,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **variables: Any,
    ) -> Prompt:
        """See :meth:`Model.apply_chat_template`."""
        return self._resolve(model).apply_chat_template(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            cache_salt=cache_salt,
            **variables,
        )

    def put_replay(
        self,
        model: ModelRef,
        ids: str | Sequence[str],
        completion: Completion,
        *,
        cache_salt: str | None = None,
    ) -> bool:
        """See :meth:`Model.put_replay`."""
        return self._resolve(model).put_replay(ids, completion, cache_salt=cache_salt)

    def get_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> Replay | None:
        """See :meth:`Model.get_replay`."""
        return self._resolve(model).get_replay(replay_id, cache_salt=cache_salt)

    def drop_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> None:
        """See :meth:`Model.drop_replay`."""
        self._resolve(model).drop_replay(replay_id, cache_salt=cache_salt)

    def verify_thinking(self, thinking: str | bytes, signature: bytes) -> bool:
        """Whether an engine with this one's key signed this thinking; False without a key."""
        key = self._signing_key
        return key is not None and key.verify(thinking, signature)

    def embed(self, model: ModelRef, prompt: PromptLike) -> list[float]:
        """See :meth:`Model.embed`."""
        return self._resolve(model).embed(prompt)

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
        return self._config

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
        with self._reloading:
            self._check_open()
            try:
                plan, key = self._plan_reload(source)
                with contextlib.ExitStack() as undo:
                    for model_id in plan.added:
                        self._load(model_id, plan.config.models[model_id], plan.config)
                        undo.callback(self.unload, model_id)
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
            self._from_config.update(plan.added)
            for model_id in plan.removed:
                self.unload(model_id)
            done = Reloaded(
                changed=plan.changed, kept=plan.kept, loaded=plan.added, unloaded=plan.removed
            )
            log.info(
                "config.reloaded",
                changed=[change.path for change in done.changed],
                kept=[kept.path for kept in done.kept],
                loaded=done.loaded,
                unloaded=done.unloaded,
            )
            return done

    def _plan_reload(
        self, source: ConfigSource | EngineConfig | None
    ) -> tuple[Plan, SigningKey | None]:
        if source is None:
            source = self._source
        if source is None:
            raise ValueError("the engine was not made from a file: give reload a configuration")
        if isinstance(source, EngineConfig):
            wanted, name, problems = source, None, check_config(source, self.plugins, stores=False)
        else:
            found = examine_loaded(read_config(source), self.plugins, stores=False)
            wanted, name, problems = found.config, found.source, list(found.problems)
        for model_id in wanted.models:
            if model_id in self._models and model_id not in self._from_config:
                message = "the application has loaded a model under this id"
                problems.append(ConfigProblem(dotted("models", [model_id]), message))
        if problems:
            raise ConfigError(problems, name)
        opened = self._cache.tier_names()
        with self._lock:
            running = Running(
                loaded=frozenset(self._models),
                from_config=frozenset(self._from_config),
                can_change_quota=lambda tier: tier in opened and self._cache.can_change_quota(tier),
                logging_is_ours=logging_is_ours(),
            )
        plan = plan_reload(self._config, wanted, running, self.plugins)
        # What is new may contradict what cannot change.
        problems = plan.problems() + memory_problems(plan.config, self.plugins)
        if problems:
            raise ConfigError(problems, name)
        key = read_signing_key(plan.config.engine)
        return (plan if key == self._signing_key else plan.with_another_key()), key

    def _take_over(self, plan: Plan, key: SigningKey | None, undo: contextlib.ExitStack) -> None:
        """Let a plan hold, but for its models; ``undo`` takes back what was done until then."""
        with self._lock:
            before, own_key = self._config, self._signing_key
            configs = dict(self._model_configs)
            models = list(self._models.values())

        def hold(config: EngineConfig, signing_key: SigningKey | None) -> None:
            with self._lock:
                self._config, self._signing_key = config, signing_key
                for name in self._models.keys() & configs.keys():
                    self._model_configs[name] = config.models.get(name, configs[name])

        undo.callback(hold, before, own_key)
        hold(plan.config, key)
        for model in models:
            own = configs[model.id]
            old = before.policy_for(before.models.get(model.id, own))
            new = plan.config.policy_for(plan.config.models.get(model.id, own))
            if old != new:
                undo.callback(model.set_policy, old)
                model.set_policy(new)
        self._follow_pressure(before.pressure, plan.config.pressure, undo)
        if plan.config.logging != before.logging:
            undo.callback(reconfigure_logging, before.logging)
            reconfigure_logging(plan.config.logging)
        for tier, (old_quota, new_quota) in plan.quotas.items():
            undo.callback(self._cache.set_quota, tier, old_quota)
            self._cache.set_quota(tier, new_quota)

    def _follow_pressure(
        self, old: PressureConfig, new: PressureConfig, undo: contextlib.ExitStack
    ) -> None:
        """Change of the monitor what the configuration changes; what calls changed, they keep."""
        monitor = self._pressure
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

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the state of every answered request is in the tiers.

        An answer comes before its state is saved, so that saving costs no caller time.
        ``close`` does this too. False when time ran out.
        """
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        with self._lock:
            loaded = list(self._models.values())
        return all(model.settle(left()) for model in loaded) and self._cache.flush(left())

    def close(self) -> None:
        """Save what runs, answer every caller, free models and tiers. Idempotent.

        Returns when that is done, also to a second thread that closes. Not for a stream
        processor to call: it runs on a worker.
        """
        self._check_fork()
        with self._closing:
            with self._lock:
                self._closed = True
                loaded = list(self._models.values())
            self._pressure.close()
            for model in loaded:
                model.close()
            with self._lock:
                self._models.clear()
            self._cache.close()
            self._notifier.close()
            atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolve(self, model: ModelRef) -> Model:
        self._check_open()
        if isinstance(model, Model):
            return model
        with self._lock:
            found = self._models.get(model)
            loaded = list(self._models)
        if found is None:
            raise ModelNotFound(unknown_name("model", model, loaded))
        return found

    def _check_open(self) -> None:
        self._check_fork()
        if self._closed:
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
    TierError.
    """
    provider = plugins.get("tier", config.kind)
    options = structure_options(provider.config, config.options, path)
    return NamedTier(config.name, config.kind, provider.factory(options))


def _lasting(source: ConfigSource) -> ConfigSource:
    """A source that means the same later, wherever the process works then."""
    return source if isinstance(source, Mapping) else Path(source).absolute()


def _close_at_exit(engine: Engine, pid: int) -> None:
    if os.getpid() == pid:
        engine.close()

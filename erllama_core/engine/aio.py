"""The engine for coroutines."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack

from erllama_core.cache.cache import Cache
from erllama_core.cache.evictor import Evicted
from erllama_core.cache.meta import BlockMeta
from erllama_core.cache.pins import Pinned
from erllama_core.cache.report import Row, Usage
from erllama_core.config import EngineConfig, ModelConfig
from erllama_core.engine.reload_plan import Reloaded
from erllama_core.engine.reloading import ConfigSource
from erllama_core.errors import EngineClosed
from erllama_core.interfaces.block import Bytes, Header
from erllama_core.model.adapters import Withdrawal
from erllama_core.model.model import Model, ModelRef, PromptLike
from erllama_core.model.options import ReplyKwargs, RequestKwargs
from erllama_core.pressure.monitor import Monitor
from erllama_core.pressure.status import PressureStatus
from erllama_core.prompt import Prompt
from erllama_core.results import AdapterInfo, CacheKey, Completion, Prefill, Replay
from erllama_core.stream.stream import Stream

if TYPE_CHECKING:
    from erllama_core.engine.engine import Engine


_T = TypeVar("_T")


class AsyncPressure:
    """What of :class:`~erllama_core.pressure.monitor.Monitor` blocks, for coroutines."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor: Final = monitor

    async def force_check(self) -> PressureStatus:
        """See :meth:`Monitor.force_check`."""
        return await asyncio.to_thread(self._monitor.force_check)


class AsyncCache:
    """What of :class:`~erllama_core.cache.cache.Cache` blocks, for coroutines."""

    def __init__(self, cache: Cache) -> None:
        self._cache: Final = cache

    async def save(
        self, tier: str, meta: BlockMeta, payload: Bytes
    ) -> tuple[CacheKey, Header, int]:
        """See :meth:`Cache.save`."""
        return await asyncio.to_thread(self._cache.save, tier, meta, payload)

    async def load(
        self, tier: str, key: CacheKey, *, start: int = 0
    ) -> tuple[Mapping[str, Any], bytes]:
        """See :meth:`Cache.load`."""
        return await asyncio.to_thread(self._cache.load, tier, key, start=start)

    async def dump(self) -> list[Row]:
        """See :meth:`Cache.dump`."""
        return await asyncio.to_thread(self._cache.dump)

    async def usage(self) -> list[Usage]:
        """See :meth:`Cache.usage`."""
        return await asyncio.to_thread(self._cache.usage)

    async def set_quota(self, tier: str, quota_bytes: int | None) -> None:
        """See :meth:`Cache.set_quota`."""
        await asyncio.to_thread(self._cache.set_quota, tier, quota_bytes)

    async def pin(self, key: CacheKey | bytes, *, tier: str | None = None) -> Pinned:
        """See :meth:`Cache.pin`."""
        return await asyncio.to_thread(self._cache.pin, key, tier=tier)

    async def unpin(self, key: CacheKey | bytes) -> None:
        """See :meth:`Cache.unpin`."""
        await asyncio.to_thread(self._cache.unpin, key)

    async def evict_bytes(self, n_bytes: int, tiers: Sequence[str] | None = None) -> Evicted:
        """See :meth:`Cache.evict_bytes`."""
        return await asyncio.to_thread(self._cache.evict_bytes, n_bytes, tiers)

    async def gc(self) -> Evicted:
        """See :meth:`Cache.gc`."""
        return await asyncio.to_thread(self._cache.gc)

    async def flush(self, timeout_s: float | None = None) -> bool:
        """See :meth:`Cache.flush`."""
        return await asyncio.to_thread(self._cache.flush, timeout_s)

    async def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """See :meth:`Cache.wait_scanned`."""
        return await asyncio.to_thread(self._cache.wait_scanned, timeout_s)


class AsyncEngine:
    """The engine's blocking calls for coroutines: the same names and arguments.

    What blocks runs on a thread; cancelling a task cancels its request.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Final[weakref.ReferenceType[Engine]] = weakref.ref(engine)

    @property
    def _sync(self) -> Engine:
        engine = self._engine()
        if engine is None:
            raise EngineClosed("the engine is gone")
        return engine

    def _found(self, model: ModelRef) -> Model:
        return self._sync.model(model) if isinstance(model, str) else model

    async def load_model(
        self, model_id: str | None = None, config: ModelConfig | None = None, **options: Any
    ) -> Model:
        """See :meth:`Engine.load_model`."""
        return await asyncio.to_thread(self._sync.load_model, model_id, config, **options)

    async def unload(self, model: ModelRef) -> None:
        """See :meth:`Engine.unload`."""
        await asyncio.to_thread(self._sync.unload, model)

    async def complete(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Completion:
        """See :meth:`Engine.complete`."""
        stream = await self.infer(model, prompt, **options)
        return await stream.result_async()

    async def infer(
        self, model: ModelRef, prompt: PromptLike, **options: Unpack[RequestKwargs]
    ) -> Stream:
        """See :meth:`Engine.infer`; the stream is an async iterator too."""
        return await asyncio.to_thread(self._sync.infer, model, prompt, **options)

    async def prefill_only(
        self,
        model: ModelRef,
        prompt: PromptLike,
        *,
        parent_key: CacheKey | None = None,
        cache_salt: str | None = None,
        pin: bool = False,
    ) -> Prefill:
        """See :meth:`Engine.prefill_only`."""
        found = self._found(model)
        stream = await asyncio.to_thread(
            found.start_prefill, prompt, parent_key=parent_key, cache_salt=cache_salt
        )
        stats = (await stream.result_async()).stats
        return await asyncio.to_thread(found.prefill_of, stats, pin=pin)

    async def continue_session(
        self,
        model: ModelRef,
        suffix_tokens: Sequence[int],
        *,
        session_id: Hashable,
        expect_committed: Sequence[int] | None = None,
        **options: Unpack[ReplyKwargs],
    ) -> Stream:
        """See :meth:`Engine.continue_session`; the stream is an async iterator too."""
        return await asyncio.to_thread(
            self._sync.continue_session,
            model,
            suffix_tokens,
            session_id=session_id,
            expect_committed=expect_committed,
            **options,
        )

    async def reset_session(self, model: ModelRef, session_id: Hashable) -> bool:
        """See :meth:`Engine.reset_session`."""
        return await asyncio.to_thread(self._sync.reset_session, model, session_id)

    async def load_adapter(
        self,
        model: ModelRef,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        scale: float = 1.0,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """See :meth:`Engine.load_adapter`. Cancelling the task takes it back, unless the adapter
        is in effect or being attached by then.
        """
        return await self._change_adapters(
            self._found(model).load_adapter, path, name=name, scale=scale, timeout_s=timeout_s
        )

    async def unload_adapter(
        self, model: ModelRef, name: str, *, timeout_s: float | None = None
    ) -> None:
        """See :meth:`Engine.unload_adapter`; cancelling is as for :meth:`load_adapter`."""
        await self._change_adapters(self._found(model).unload_adapter, name, timeout_s=timeout_s)

    async def set_adapter_scale(
        self, model: ModelRef, name: str, scale: float, *, timeout_s: float | None = None
    ) -> None:
        """See :meth:`Engine.set_adapter_scale`; cancelling is as for :meth:`load_adapter`."""
        await self._change_adapters(
            self._found(model).set_adapter_scale, name, scale, timeout_s=timeout_s
        )

    @staticmethod
    async def _change_adapters(call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        withdrawal = Withdrawal()
        try:
            return await asyncio.to_thread(call, *arguments, **options, withdrawal=withdrawal)
        except asyncio.CancelledError:
            withdrawal.ask()
            raise

    async def list_adapters(self, model: ModelRef) -> list[AdapterInfo]:
        """See :meth:`Engine.list_adapters`, which waits for nobody."""
        return self._sync.list_adapters(model)

    async def embed(self, model: ModelRef, prompt: PromptLike) -> list[float]:
        """See :meth:`Engine.embed`."""
        return await asyncio.to_thread(self._sync.embed, model, prompt)

    async def tokenize(
        self,
        model: ModelRef,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = True,
    ) -> Prompt:
        """See :meth:`Engine.tokenize`."""
        return await asyncio.to_thread(
            self._sync.tokenize, model, text, add_bos=add_bos, parse_special=parse_special
        )

    async def apply_chat_template(
        self, model: ModelRef, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> Prompt:
        """See :meth:`Engine.apply_chat_template`."""
        return await asyncio.to_thread(self._sync.apply_chat_template, model, messages, **arguments)

    @property
    def pressure(self) -> AsyncPressure:
        """The awaitable twin of what blocks of ``engine.pressure``."""
        return AsyncPressure(self._sync.pressure)

    @property
    def cache(self) -> AsyncCache:
        """The awaitable twin of what blocks of ``engine.cache``."""
        return AsyncCache(self._sync.cache)

    async def put_replay(
        self,
        model: ModelRef,
        ids: str | Sequence[str],
        completion: Completion,
        *,
        cache_salt: str | None = None,
    ) -> bool:
        """See :meth:`Engine.put_replay`."""
        return await asyncio.to_thread(
            self._sync.put_replay, model, ids, completion, cache_salt=cache_salt
        )

    async def get_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> Replay | None:
        """See :meth:`Engine.get_replay`."""
        return await asyncio.to_thread(
            self._sync.get_replay, model, replay_id, cache_salt=cache_salt
        )

    async def drop_replay(
        self, model: ModelRef, replay_id: str, *, cache_salt: str | None = None
    ) -> None:
        """See :meth:`Engine.drop_replay`."""
        await asyncio.to_thread(self._sync.drop_replay, model, replay_id, cache_salt=cache_salt)

    async def flush(self, timeout_s: float | None = None) -> bool:
        """See :meth:`Engine.flush`."""
        return await asyncio.to_thread(self._sync.flush, timeout_s)

    async def reload(self, source: ConfigSource | EngineConfig | None = None) -> Reloaded:
        """See :meth:`Engine.reload`."""
        return await asyncio.to_thread(self._sync.reload, source)

    async def close(self) -> None:
        """See :meth:`Engine.close`."""
        await asyncio.to_thread(self._sync.close)

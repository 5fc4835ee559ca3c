"""Giving memory back: what goes first, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.cache.cache import Cache
from erllama_core.cache.evictor import Evicted
from erllama_core.config import EngineConfig, evict_tier_problems
from erllama_core.errors import ConfigProblem
from erllama_core.host import PluginHost
from erllama_core.interfaces.log import get_logger
from erllama_core.model.model import Model
from erllama_core.pressure.status import Release
from erllama_core.pressure.thresholds import Thresholds

log = get_logger("erllama.engine")

RESIDENTS_TIMEOUT_S: Final = 2.0
"""How long a worker that is in the middle of a step is waited for. It drops what is idle
afterwards in any case."""


class Releaser:
    """Gives back an engine's memory, what costs least first. One thread at a time.

    Objects of the tiers first, which are the cheapest to have again. Then idle sequences, whose
    state is saved before where there is more than memory to save it to; and what that put into
    memory. Then, if it may, the idle model that was used longest ago; one at a time, as nothing
    tells beforehand what that brings.
    """

    def __init__(
        self,
        cache: Cache,
        config: EngineConfig,
        plugins: PluginHost,
        *,
        models: Callable[[], Sequence[Model]],
        unload_if_idle: Callable[[Model], bool],
    ) -> None:
        self._cache: Final = cache
        self._config: Final = config
        self._plugins: Final = plugins
        self._models: Final = models
        self._unload_if_idle: Final = unload_if_idle

    def problems(self, thresholds: Thresholds) -> list[ConfigProblem]:
        """Names in ``evict_tiers`` that no tier can have."""
        return evict_tier_problems(thresholds.evict_tiers, self._config, self._plugins)

    def held_bytes(self, thresholds: Thresholds) -> int:
        """What the tiers that give way hold."""
        return self._cache.held_bytes(thresholds.evict_tiers)

    def release(self, n_bytes: int, thresholds: Thresholds, *, of_tiers: bool) -> Release:
        """Give back ``n_bytes``, or as much as there is."""
        tiers = thresholds.evict_tiers if of_tiers else ()
        evicted = self._cache.free_memory(n_bytes, tiers)
        residents = 0
        unloaded = None
        if evicted.bytes < n_bytes:
            residents = sum(map(self._drop_residents, self._models()))
            if residents and tiers:
                # What they were saved to includes memory, but for a tier that has them now.
                self._cache.flush(RESIDENTS_TIMEOUT_S)
                more = self._cache.free_memory(n_bytes - evicted.bytes, tiers)
                evicted = Evicted(evicted.rows + more.rows, evicted.bytes + more.bytes)
        if evicted.bytes < n_bytes and thresholds.unload_idle_models:
            unloaded = self._unload_one()
        return Release(
            wanted_bytes=n_bytes,
            freed_bytes=evicted.bytes,
            rows=evicted.rows,
            residents=residents,
            unloaded=unloaded,
        )

    def _drop_residents(self, model: Model) -> int:
        """What could be saved to memory alone is not: that would have to go again."""
        return model.drop_residents(RESIDENTS_TIMEOUT_S, save=self._cache.any_lasts(model.tiers))

    def _unload_one(self) -> str | None:
        """The model that was used longest ago, if nothing runs or waits in it."""
        for model in sorted(self._models(), key=lambda model: model.last_used_s):
            if self._unload_if_idle(model):
                log.info("model.unloaded_under_pressure", model=model.id)
                return model.id
        return None

"""What a model takes of the memory budget, set aside before anything is allocated."""

from __future__ import annotations

from typing import Any

import attrs

from erllama_core.cache.budget import Hold, in_words
from erllama_core.cache.cache import Cache
from erllama_core.config import ModelConfig
from erllama_core.errors import AdapterLoadError, ErllamaError, ModelLoadError
from erllama_core.interfaces.backend import BackendRequest, MemoryEstimate
from erllama_core.interfaces.log import get_logger
from erllama_core.model.fingerprint import weights_files
from erllama_core.providers import BackendProvider

log = get_logger("erllama.model")


@attrs.frozen(eq=False)
class Footprint:
    """What one model has set aside: its weights and a context, and what comes on top of that."""

    _cache: Cache
    _model: str
    """As errors call it."""
    _estimate: MemoryEstimate
    _whole: Hold

    def hold_adapter(self, name: str, n_bytes: int) -> Hold:
        """Set an adapter's weights aside. Raises AdapterLoadError, with the numbers."""
        hold = _hold(self._cache, f"adapter {name!r} of {self._model}", n_bytes)
        if hold is None:
            budget = self._cache.budget
            raise AdapterLoadError(
                f"the adapter {name!r} would take {in_words(n_bytes)}, which is "
                f"{in_words(budget.missing(n_bytes))} too much: {budget}. Unload another adapter "
                f"or model, or raise engine.memory_budget_bytes"
            )
        return hold

    def hold_lost_context(self) -> Hold:
        """Count a context that was given up and not freed, while another takes its place.

        That is taken already, so it is never refused; what is cached gives way, if it can.
        """
        n_bytes = self._estimate.kv_bytes + self._estimate.compute_bytes
        name = f"context of {self._model} that does not come back"
        return _hold(self._cache, name, n_bytes) or self._beyond(name, n_bytes)

    def _beyond(self, name: str, n_bytes: int) -> Hold:
        hold = self._cache.budget.hold(name, n_bytes, beyond=True)
        assert hold is not None
        return hold

    def release(self) -> None:
        """Weights and context are freed. Idempotent."""
        self._whole.release()


def _hold(cache: Cache, name: str, n_bytes: int) -> Hold | None:
    """Set memory aside; what is cached gives way to it. None when that is not enough."""
    hold = cache.budget.hold(name, n_bytes)
    if hold is None:
        cache.free_pages(cache.budget.missing(n_bytes))
        hold = cache.budget.hold(name, n_bytes)
    return hold


def set_aside(
    model_id: str, config: ModelConfig, provider: BackendProvider, options: Any, cache: Cache
) -> Footprint | None:
    """Set a model's memory aside; what is cached gives way to it.

    None without a budget: then nothing is estimated. Raises ModelLoadError, with the numbers,
    when the budget has no room.
    """
    budget = cache.budget
    if budget.limit_bytes is None:
        return None
    estimate = estimate_memory(config, provider, options)
    needed = estimate.total_bytes
    name = f"model {model_id!r}"
    hold = _hold(cache, name, needed)
    if hold is None:
        raise ModelLoadError(
            f"{name} would take {in_words(needed)} (weights {in_words(estimate.weights_bytes)}, KV "
            f"{in_words(estimate.kv_bytes)}, computing {in_words(estimate.compute_bytes)}), which "
            f"is {in_words(budget.missing(needed))} too much: {budget}. Lower context_opts.n_ctx, "
            f"unload another model, or raise engine.memory_budget_bytes"
        )
    return Footprint(cache, name, estimate, hold)


def estimate_memory(config: ModelConfig, provider: BackendProvider, options: Any) -> MemoryEstimate:
    """What the backend expects a model to take; of one that cannot tell, its file's size.

    Raises ModelLoadError.
    """
    path = None if config.model_path is None else config.model_path.expanduser()
    if path is not None and not path.is_file():
        return MemoryEstimate()  # loading says so in better words
    request = BackendRequest(model_path=path, options=options, context=config.context_opts)
    try:
        told = None if provider.estimate is None else provider.estimate(request)
    except ErllamaError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"the backend {provider.name!r} could not tell how much memory the model takes",
            reason=repr(error),
        ) from error
    if told is not None:
        return told
    log.warning("memory.not_estimated", backend=provider.name)
    files = () if path is None else weights_files(path)
    return MemoryEstimate(weights_bytes=sum(file.stat().st_size for file in files))

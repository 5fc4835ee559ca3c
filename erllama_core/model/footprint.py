"""What a model takes of the memory budget, set aside before anything is allocated."""

from __future__ import annotations

from typing import Any

from erllama_core.cache.budget import Hold, in_words
from erllama_core.cache.cache import Cache
from erllama_core.config import ModelConfig
from erllama_core.errors import ErllamaError, ModelLoadError
from erllama_core.interfaces.backend import BackendRequest, MemoryEstimate
from erllama_core.interfaces.log import get_logger
from erllama_core.model.fingerprint import weights_files
from erllama_core.providers import BackendProvider

log = get_logger("erllama.model")


def set_aside(
    model_id: str, config: ModelConfig, provider: BackendProvider, options: Any, cache: Cache
) -> Hold | None:
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
    hold = budget.hold(name, needed)
    if hold is None:
        cache.free_pages(budget.missing(needed))
        hold = budget.hold(name, needed)
    if hold is None:
        raise ModelLoadError(
            f"{name} would take {in_words(needed)} (weights {in_words(estimate.weights_bytes)}, KV "
            f"{in_words(estimate.kv_bytes)}, computing {in_words(estimate.compute_bytes)}), which "
            f"is {in_words(budget.missing(needed))} too much: {budget}. Lower context_opts.n_ctx, "
            f"unload another model, or raise engine.memory_budget_bytes"
        )
    return hold


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

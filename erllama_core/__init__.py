"""Run GGUF models through llama.cpp and never compute the same prompt prefix twice."""

from erllama_core.cache.budget import MemoryUse
from erllama_core.cache.cache import Cache
from erllama_core.cache.counters import Counters
from erllama_core.cache.evictor import Evicted
from erllama_core.cache.meta import BlockMeta
from erllama_core.cache.pins import Pinned
from erllama_core.cache.policy import SavePolicy
from erllama_core.cache.report import Row, Usage
from erllama_core.cache.tiers import NamedTier
from erllama_core.config import EngineConfig, ModelConfig, TierConfig, load_config
from erllama_core.engine import AsyncEngine, Engine, Reloaded, open_tier
from erllama_core.host import PluginHost
from erllama_core.interfaces.stream import (
    Done,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCallDelta,
    ToolCallEnd,
)
from erllama_core.model.model import Model
from erllama_core.pressure.status import PressureStatus
from erllama_core.prompt import Prompt
from erllama_core.results import (
    AdapterInfo,
    CacheDelta,
    CacheHit,
    CacheKey,
    Completion,
    Explanation,
    ModelInfo,
    Replay,
    Stats,
    TokenLogprob,
)
from erllama_core.signing import verify_thinking
from erllama_core.stream.stream import Stream

__all__ = [
    "AdapterInfo",
    "AsyncEngine",
    "BlockMeta",
    "Cache",
    "CacheDelta",
    "CacheHit",
    "CacheKey",
    "Completion",
    "Counters",
    "Done",
    "Engine",
    "EngineConfig",
    "Evicted",
    "Explanation",
    "MemoryUse",
    "Model",
    "ModelConfig",
    "ModelInfo",
    "NamedTier",
    "Pinned",
    "PluginHost",
    "PressureStatus",
    "Prompt",
    "Reloaded",
    "Replay",
    "Row",
    "SavePolicy",
    "Stats",
    "Stream",
    "TextDelta",
    "ThinkingDelta",
    "ThinkingEnd",
    "TierConfig",
    "TokenLogprob",
    "ToolCallDelta",
    "ToolCallEnd",
    "Usage",
    "load_config",
    "open_tier",
    "verify_thinking",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("erllama-core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

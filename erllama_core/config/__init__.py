"""The configuration: its classes, reading it, and checking it against this machine."""

from erllama_core.config.check import (
    Examination,
    check_config,
    config_warnings,
    evict_tier_problems,
    examine_config,
    examine_loaded,
    memory_problems,
    plugin_host,
)
from erllama_core.config.classes import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    EngineSettings,
    LoggingConfig,
    ModelConfig,
    PluginsConfig,
    PressureConfig,
    TierConfig,
)
from erllama_core.config.reading import LoadedConfig, load_config, model_config, read_config
from erllama_core.config.signing import read_signing_key, signing_key_warnings
from erllama_core.config.structuring import structure_options
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers

__all__ = [
    "AdapterConfig",
    "CacheConfig",
    "EngineConfig",
    "EngineSettings",
    "Examination",
    "LoadedConfig",
    "LoggingConfig",
    "ModelConfig",
    "PluginsConfig",
    "PressureConfig",
    "ThinkingMarkers",
    "TierConfig",
    "ToolCallMarkers",
    "check_config",
    "config_warnings",
    "evict_tier_problems",
    "examine_config",
    "examine_loaded",
    "load_config",
    "memory_problems",
    "model_config",
    "plugin_host",
    "read_config",
    "read_signing_key",
    "signing_key_warnings",
    "structure_options",
]

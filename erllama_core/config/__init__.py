"""The configuration: its classes, reading it, and checking it against this machine."""

from erllama_core.config.check import (
    Examination,
    check_config,
    examine_config,
    not_yet_effective,
)
from erllama_core.config.classes import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    EngineSettings,
    ModelConfig,
    PluginsConfig,
    PressureConfig,
    TierConfig,
)
from erllama_core.config.reading import LoadedConfig, load_config, model_config, read_config
from erllama_core.config.signing import read_signing_key
from erllama_core.config.structuring import structure_options
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers

__all__ = [
    "AdapterConfig",
    "CacheConfig",
    "EngineConfig",
    "EngineSettings",
    "Examination",
    "LoadedConfig",
    "ModelConfig",
    "PluginsConfig",
    "PressureConfig",
    "ThinkingMarkers",
    "TierConfig",
    "ToolCallMarkers",
    "check_config",
    "examine_config",
    "load_config",
    "model_config",
    "not_yet_effective",
    "read_config",
    "read_signing_key",
    "structure_options",
]

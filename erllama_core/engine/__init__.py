"""The engine, blocking and for coroutines."""

from erllama_core.engine.aio import AsyncEngine
from erllama_core.engine.engine import Engine, open_tier

__all__ = ["AsyncEngine", "Engine", "open_tier"]

"""The engine, blocking and for coroutines."""

from erllama_core.engine.aio import AsyncEngine
from erllama_core.engine.engine import Engine, open_tier
from erllama_core.engine.reload_plan import Change, Kept, Reloaded

__all__ = ["AsyncEngine", "Change", "Engine", "Kept", "Reloaded", "open_tier"]

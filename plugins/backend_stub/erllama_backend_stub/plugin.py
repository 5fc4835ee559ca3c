"""The plugin's entry point."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_backend_stub.model import estimate_memory, open_model
from erllama_backend_stub.options import StubOptions
from erllama_core.hookspecs import hookimpl
from erllama_core.providers import BackendProvider


@hookimpl
def erllama_backends() -> Sequence[BackendProvider]:
    """The backend ``stub``."""
    return [
        BackendProvider(
            name="stub",
            summary="A deterministic model without weights, for tests.",
            factory=open_model,
            config=StubOptions,
            estimate=estimate_memory,
        )
    ]

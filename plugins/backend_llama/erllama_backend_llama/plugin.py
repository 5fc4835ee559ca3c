"""What this distribution tells erllama: one backend. Importing it loads nothing native."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from erllama_backend_llama.options import LlamaOptions
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.backend import BackendModel, BackendRequest, MemoryEstimate
from erllama_core.providers import Available, BackendProvider, Unavailable


def _probe() -> Available | Unavailable:
    # Finding, not importing: an import would load the native library.
    if importlib.util.find_spec("llama_cpp") is None:
        return Unavailable(
            "the package llama-cpp-python is not installed; "
            "install it with: pip install erllama-backend-llama"
        )
    return Available()


def _load(request: BackendRequest) -> BackendModel:
    from erllama_backend_llama.model import load_model

    return load_model(request)


def _estimate(request: BackendRequest) -> MemoryEstimate | None:
    from erllama_backend_llama.memory import estimate_memory

    return estimate_memory(request)


@hookimpl
def erllama_backends() -> Sequence[BackendProvider]:
    """The backend ``llama``."""
    return (
        BackendProvider(
            name="llama",
            summary="GGUF models through llama.cpp, on the CPU or a GPU",
            factory=_load,
            config=LlamaOptions,
            probe=_probe,
            estimate=_estimate,
        ),
    )

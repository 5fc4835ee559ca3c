"""What this distribution tells erllama: one backend. Importing it loads nothing native."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence

from erllama_backend_llama.options import LlamaOptions
from erllama_core.errors import ModelLoadError
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


def _check(request: BackendRequest) -> Iterator[tuple[str, str]]:
    """What loading would refuse before it loads anything."""
    from erllama_backend_llama.context_params import check_options
    from erllama_backend_llama.model_check import check_model

    if request.model_path is None:
        yield "model_path", "required: the path of a GGUF file"
    else:
        try:
            check_model(request.model_path)
        except ModelLoadError as error:
            yield "model_path", str(error)
    try:
        check_options(request.context)
    except ModelLoadError as error:
        named = re.search(r"context_opts\.\w+", str(error))
        yield named[0] if named else "context_opts", str(error)


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
            check=_check,
            estimate=_estimate,
        ),
    )

"""What the plugin tells erllama, and what it refuses to be configured with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from erllama_backend_llama import plugin
from erllama_backend_llama.options import LlamaOptions
from erllama_core.providers import Available, Unavailable


def test_importing_the_plugin_loads_nothing_native() -> None:
    """Discovery, the probe included, imports neither llama_cpp nor numpy."""
    code = (
        "import sys; from erllama_backend_llama import plugin; "
        "plugin.erllama_backends()[0].probe(); "
        "sys.exit(any(name in sys.modules for name in ('llama_cpp', 'numpy')))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_it_provides_one_usable_backend() -> None:
    """The hook gives the backend ``llama``, which can work where llama_cpp is installed."""
    (provider,) = plugin.erllama_backends()
    assert (provider.name, provider.config) == ("llama", LlamaOptions)
    assert provider.probe() == Available()


def test_the_probe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama_cpp the backend is unavailable, with the command that helps."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    answer = plugin.erllama_backends()[0].probe()
    assert isinstance(answer, Unavailable)
    assert "pip install erllama-backend-llama" in answer.reason


@pytest.mark.parametrize(
    "options",
    [
        {"n_gpu_layers": -2},
        {"main_gpu": -1},
        {"split_mode": "rows"},
        {"tensor_split": (1.0, -1.0)},
        {"tensor_split": (0.0, 0.0)},
        {"tensor_split": (float("nan"),)},
    ],
)
def test_meaningless_options_are_refused(options: dict[str, Any]) -> None:
    """An option that llama.cpp would misread is a ValueError that names it."""
    with pytest.raises(ValueError, match=next(iter(options))):
        LlamaOptions(**options)


def test_options_accept_what_configuration_files_hold() -> None:
    """A list of proportions becomes a tuple."""
    shares: Any = [3, 1]
    assert LlamaOptions(tensor_split=shares).tensor_split == (3, 1)

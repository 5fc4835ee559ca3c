"""Fixtures for every test of the repository, those of the plugins included."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before llama.cpp is loaded, here and in the processes that tests start: its threads sleep where
# they wait for one another. Otherwise they spin, for as long as the one that all wait for has no
# core to run on, which is often where suites run side by side.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile(
    "default",
    deadline=None,  # a machine that is busy elsewhere is no failure
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """What a test makes of logging ends with it; ``capture_logs`` leaves structlog configured."""
    yield
    if "structlog" in sys.modules:
        sys.modules["structlog"].reset_defaults()


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """A small, real GGUF model: ERLLAMA_TEST_MODEL, or the demo's, fetched once."""
    configured = os.environ.get("ERLLAMA_TEST_MODEL")
    if configured:
        return Path(configured)
    from erllama_core.cli.demo_model import fetch_demo_model

    return fetch_demo_model()


def pytest_unconfigure() -> None:
    """Close what llama-cpp-python opens when it is imported and never closes.

    Its ``_utils`` keeps ``/dev/null`` open, and warnings are errors until the interpreter ends.
    """
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        file = getattr(utils, name, None)
        if file is not None:
            file.close()

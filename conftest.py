"""Fixtures for every test of the repository, those of the plugins included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,  # a machine that is busy elsewhere is no failure
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """A small, real GGUF model: ERLLAMA_TEST_MODEL, or the demo's, fetched once."""
    configured = os.environ.get("ERLLAMA_TEST_MODEL")
    if configured:
        return Path(configured)
    from erllama_core.cli.demo_model import fetch_demo_model

    return fetch_demo_model()

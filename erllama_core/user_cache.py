"""The folder for what erllama fetches and computes once: everything in it can be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """``erllama`` in XDG_CACHE_HOME, else in ``~/.cache``. Not created here.

    A relative XDG_CACHE_HOME is invalid and ignored, as the XDG base directory specification
    asks.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    return base / "erllama"

"""Waiting for what another thread does and nothing announces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_GLANCE_S = 0.001


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return as soon as ``condition`` holds; AssertionError when it does not in time.

    For states that have no event. Where there is one, wait for that.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to be within {timeout_s} s"
        threading.Event().wait(_GLANCE_S)

"""Where a command's log goes."""

from __future__ import annotations

from erllama_core.config import LoggingConfig
from erllama_core.logs import configure_logging


def configure_logs() -> None:
    """Warnings and errors, one line each, on standard error."""
    configure_logging(LoggingConfig(format="text"))

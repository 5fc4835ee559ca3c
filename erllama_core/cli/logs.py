"""Where the command's log goes."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs() -> None:
    """Warnings and errors, one line each, on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

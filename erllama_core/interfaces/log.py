"""Loggers for the core and for plugins: structlog, quiet until an application configures it."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

_QUIET = structlog.make_filtering_bound_logger(logging.WARNING)


class _Logger:
    """Binds at each call, so that it follows the application's configuration.

    structlog's own default prints every debug line to standard output. A library that an
    application merely imports must not: until ``structlog.configure`` is called, warnings and
    errors go to standard error and nothing else anywhere.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        logger = (
            structlog.get_logger()
            if structlog.is_configured()
            else structlog.wrap_logger(structlog.PrintLogger(sys.stderr), wrapper_class=_QUIET)
        )
        return getattr(logger.bind(logger=self._name), method)


def get_logger(name: str) -> Any:
    """A logger whose events carry ``logger=name``. Thread-safe."""
    return _Logger(name)

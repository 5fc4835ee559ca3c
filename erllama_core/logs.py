"""Logging for a program that has none of its own: structlog, on standard error.

Importing the library configures nothing. The command line calls :func:`configure_logging`, and
so may any application; one that configures structlog by itself leaves this alone.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any, Final, TextIO

import structlog

from erllama_core.config import LoggingConfig
from erllama_core.interfaces.log import LineLogger

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Factory:
    """Gives out one logger, and shows whose configuration structlog has."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: Final = stream
        self._logger: Final = LineLogger(stream)

    def __call__(self, *_: Any) -> LineLogger:
        return self._logger


_lock: Final = threading.Lock()


def configure_logging(settings: LoggingConfig | None = None, stream: TextIO | None = None) -> None:
    """Have structlog write events to ``stream``, standard error when None.

    One line each: for people, with colours on a terminal, or as JSON objects. May be called
    again, with other settings.
    """
    chosen = LoggingConfig() if settings is None else settings
    out = sys.stderr if stream is None else stream
    with _lock:
        _configure(chosen, _Factory(out))


def logging_is_ours() -> bool:
    """Whether :func:`configure_logging` is what configured structlog last."""
    return isinstance(structlog.get_config()["logger_factory"], _Factory)


def reconfigure_logging(settings: LoggingConfig) -> bool:
    """Apply other settings, if :func:`configure_logging` is what configured structlog last.

    False, and nothing done, when an application configured it by itself, or nobody did.
    """
    with _lock:
        factory = structlog.get_config()["logger_factory"]
        if not isinstance(factory, _Factory):
            return False
        _configure(settings, factory)
        return True


def _configure(settings: LoggingConfig, factory: _Factory) -> None:
    stream = factory.stream
    on_terminal = stream is not None and stream.isatty()
    as_json = settings.format == "json" or (settings.format == "auto" and not on_terminal)
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks with local variables would show prompts; those of neither renderer do.
    if as_json:
        processors += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=on_terminal, exception_formatter=structlog.dev.plain_traceback
            )
        )
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )

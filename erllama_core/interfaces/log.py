"""Loggers for the core and for plugins: structlog, quiet until an application configures it.

Nothing of a prompt, of a reply or of a key is logged above the level debug. What an exception
says can hold any of them, when other people's code raised it: :func:`told` and
:func:`log_unexpected` are for such exceptions.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
from typing import Any, Final, TextIO

import structlog

from erllama_core.errors import ErllamaError, PluginFailed

_QUIET: Final = structlog.make_filtering_bound_logger(logging.WARNING)
_FRAMES: Final = 6
_writing: Final = threading.Lock()


class LineLogger:
    """Writes lines to a stream, and never raises: a log that nobody reads ends no request."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        """Write one event."""
        if self._stream is None:  # as under pythonw
            return
        with contextlib.suppress(OSError, ValueError), _writing:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


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
            else structlog.wrap_logger(LineLogger(sys.stderr), wrapper_class=_QUIET)
        )
        return getattr(logger.bind(logger=self._name), method)


def get_logger(name: str) -> Any:
    """A logger whose events carry ``logger=name``. Thread-safe."""
    return _Logger(name)


def told(error: BaseException) -> str:
    """An exception as one line that a log may show at any level.

    What an ErllamaError or the operating system says; of any other exception its type alone,
    since a plugin's may quote what it was given, and so may a PluginFailed about it.
    """
    kind = type(error).__name__
    if not isinstance(error, ErllamaError | OSError) or isinstance(error, PluginFailed):
        return kind
    text = " ".join(str(error).split())
    return f"{kind}: {text}" if text else kind


def log_unexpected(log: Any, event: str, error: BaseException, **fields: Any) -> None:
    """Log an exception of code that may have handled prompts: where it was raised, and by what.

    The traceback with what the exception says follows at the level debug.
    """
    stack = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
    log.error(event, error=told(error), raised_at=places, **fields)
    log.debug("exception.detail", of=event, exc_info=error, **fields)

"""llama.cpp in this process: started once, its log routed, its build identified."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_core.interfaces.log import get_logger

log = get_logger(__name__)

# enum ggml_log_level of ggml.h. (llama-cpp-python's own table is off by one.)
_DEBUG: Final = 1
_WARN: Final = 3
_ERROR: Final = 4
_CONTINUED: Final = 5
LogLine = tuple[int, str]
"""A line that was collected, and its level."""
_LEVEL_NAMES: Final = {0: "none", 2: "info", _WARN: "warning", _ERROR: "error"}


class _NativeLog:
    """Takes llama.cpp's log lines, from any thread, and never raises.

    A line may come in pieces, so what a thread has not yet ended with a newline is kept. All
    state is per thread: a load collects what its own thread says, not what another's does.
    """

    def __init__(self) -> None:
        self._threads = threading.local()

    def receive(self, level: int, text: bytes | None, _user_data: int | None) -> None:
        # An exception cannot cross a C frame; ctypes would print it to stderr.
        with contextlib.suppress(Exception):
            self._receive(level, text or b"")

    def _receive(self, level: int, text: bytes) -> None:
        threads = self._threads
        if level != _CONTINUED:
            threads.level = level
        if getattr(threads, "level", 0) == _DEBUG:
            # Graphs tensor by tensor, and a line for every import: they describe llama.cpp.
            return
        pending: str = getattr(threads, "pending", "") + text.decode("utf-8", "replace")
        *lines, threads.pending = pending.split("\n")
        for line in lines:
            self._line(getattr(threads, "level", 0), line.rstrip())

    def _line(self, level: int, line: str) -> None:
        if not line:
            return
        collected: list[LogLine] | None = getattr(self._threads, "collected", None)
        if collected is not None and (level in (_WARN, _ERROR) or self._threads.everything):
            collected.append((level, line))
        log.debug("llama.native", severity=_LEVEL_NAMES.get(level, "unknown"), line=line)

    @contextlib.contextmanager
    def collect(self, *, everything: bool = False) -> Iterator[list[LogLine]]:
        """Collect the warnings and errors that this thread's native calls log.

        ``everything``: all but what is for debugging.
        """
        threads = self._threads
        outer = getattr(threads, "collected", None), getattr(threads, "everything", False)
        collected: list[LogLine] = []
        threads.collected, threads.everything = collected, everything
        try:
            yield collected
        finally:
            threads.collected, threads.everything = outer


_LOG: Final = _NativeLog()
# llama.cpp keeps the pointer for good, so the callback object must live as long.
_LOG_CALLBACK: Final = llama_cpp.llama_log_callback(_LOG.receive)
_STARTING: Final = threading.Lock()
_once: dict[str, Any] = {}

collect_log = _LOG.collect


def start() -> None:
    """Initialise llama.cpp, once per process. Thread-safe.

    It is never shut down again: other users of llama_cpp in the process may need it.
    """
    with _STARTING:
        if "started" not in _once:
            llama_cpp.llama_log_set(_LOG_CALLBACK, None)
            llama_cpp.llama_backend_init()
            _once["started"] = True


def reason(lines: list[LogLine]) -> str | None:
    """What llama.cpp logged about a failure, in one line; None when it said nothing.

    Its errors, or, when it called nothing an error, its warnings.
    """
    errors = [line for level, line in lines if level == _ERROR]
    return "; ".join((errors or [line for _, line in lines])[-3:]) or None


def version() -> str:
    """llama.cpp's own name for its version."""
    name: bytes = llama_cpp.llama_version()
    return name.decode("utf-8", "replace")


def build_digest() -> str:
    """SHA-256 over the native libraries, hexadecimal. Computed once per process; thread-safe.

    The format of exported state carries no version and changes between builds that report the
    same one; only the code itself tells them apart.
    """
    with _STARTING:
        digest: str | None = _once.get("build_digest")
        if digest is None:
            digest = _once["build_digest"] = _digest(_libraries())
    return digest


def _libraries() -> list[Path]:
    loaded = Path(llama_cpp._lib._name)  # noqa: SLF001 - the binding has no public name for it
    folder, suffix = loaded.parent, loaded.suffix
    # ggml defines the element types of the cache. Versioned copies hold the same bytes.
    return [loaded, *sorted(folder.glob(f"*ggml*{suffix}"))]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

"""Telling plugins what happens, without anybody waiting for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from erllama_core.interfaces.log import get_logger, log_unexpected
from erllama_core.interfaces.telemetry import (
    CacheEvent,
    ModelLoaded,
    Notification,
    PressureSampled,
    RequestFinished,
)

log = get_logger("erllama.telemetry")

HOOKS: Final[dict[type[Notification], str]] = {
    ModelLoaded: "erllama_model_loaded",
    RequestFinished: "erllama_request_finished",
    CacheEvent: "erllama_cache_event",
    PressureSampled: "erllama_pressure_sampled",
}
"""The hook that each notification goes to."""

MAX_WAITING: Final = 10_000
"""Notifications that listeners are behind by, at most; beyond them they are dropped."""
CLOSE_TIMEOUT_S: Final = 5.0
"""How long closing waits for listeners to hear the last of it."""


@attrs.frozen
class Listener:
    """One plugin's implementation of one notification hook."""

    plugin: str
    call: Callable[[Notification], Any]


class Notifier:
    """Hands notifications to listeners, on a thread of its own. Thread-safe.

    ``listeners``: by the name of the hook. Without any there is no thread, and telling costs a
    look into an empty dictionary.
    """

    def __init__(
        self, listeners: Mapping[str, Sequence[Listener]], *, max_waiting: int = MAX_WAITING
    ) -> None:
        self._listeners: Final = {
            kind: tuple(listeners[hook]) for kind, hook in HOOKS.items() if listeners.get(hook)
        }
        self._waiting: Final[queue.Queue[Notification | None]] = queue.Queue(max_waiting)
        self._failed: Final[set[tuple[type, str]]] = set()
        self._closing: Final = threading.Event()
        self.dropped = 0
        """Notifications that nobody was told of, as listeners were too far behind."""
        self._thread: threading.Thread | None = None
        if self._listeners:
            self._thread = threading.Thread(
                target=self._deliver, name="erllama-notifier", daemon=True
            )
            self._thread.start()

    def listens_to(self, kind: type[Notification]) -> bool:
        """Whether anybody wants to know. Asked before a notification is put together."""
        return kind in self._listeners

    def tell(self, what: Notification) -> None:
        """Have listeners told of something. Never waits, never raises."""
        if type(what) not in self._listeners or self._closing.is_set():
            return
        try:
            self._waiting.put_nowait(what)
        except queue.Full:
            if not self.dropped:
                log.warning("notifications.dropped", waiting=self._waiting.maxsize)
            self.dropped += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Deliver what waits, and end. A listener that hangs is left behind. Idempotent."""
        if self._thread is None:
            return
        self._closing.set()
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            log.warning("notifier.left_behind", waiting=self._waiting.qsize())
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning("notifier.left_behind", waiting=self._waiting.qsize())

    def _deliver(self) -> None:
        while (what := self._waiting.get()) is not None:
            for listener in self._listeners[type(what)]:
                try:
                    listener.call(what)
                except Exception as error:  # noqa: BLE001 - a plugin's own code
                    self._note_failure(type(what), listener, error)

    def _note_failure(self, kind: type[Notification], listener: Listener, error: Exception) -> None:
        """Say so once: a listener that always fails would fill the log."""
        if (kind, listener.plugin) not in self._failed:
            self._failed.add((kind, listener.plugin))
            log_unexpected(log, "listener.raised", error, plugin=listener.plugin, hook=HOOKS[kind])

"""Room for llama.cpp's tokenizers, which recurse as deep as a text is long.

Many pre-tokenizers run through ``std::regex``, whose matcher takes a stack frame for each
character of a run of one kind: 8 MB of stack end the process at some 26,000 equal letters, the
512 KB of a thread on macOS at 1,500 (measured). A message is enough to have such a run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from erllama_core.errors import InvalidPrompt

SMALL_TEXT_BYTES: Final = 1000
"""Texts up to this long fit any stack."""
_STACK_BYTES: Final = 256 << 20
"""Reserved, not used, until a text needs it; about 300 bytes for a character of a run."""
_LONGEST_RUN: Final = 500_000
_SPACES: Final = re.compile(rb"\s+")

_T = TypeVar("_T")
_starting: Final = threading.Lock()
"""threading.stack_size is the process's, not a thread's."""


class _Call(Generic[_T]):
    """A call whose outcome another thread brings about."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._result: _T
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
            self._error = error

    def outcome(self) -> _T:
        if self._error is not None:
            raise self._error
        return self._result


def on_large_stack(call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises, run on a thread of its own with a large stack."""
    waiting = _Call(call)
    thread = threading.Thread(target=waiting.run, name="erllama-tokenize", daemon=True)
    with _starting:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return waiting.outcome()


def check_runs(data: bytes) -> None:
    """Raise InvalidPrompt for a run of characters that is too long even for a large stack."""
    if len(data) <= _LONGEST_RUN:
        return
    longest = max(map(len, data.split()), default=0)
    blank = max((len(run) for run in _SPACES.findall(data)), default=0)
    if max(longest, blank) > _LONGEST_RUN:
        raise InvalidPrompt(
            f"the text has a run of {max(longest, blank)} bytes without "
            f"{'a space' if longest >= blank else 'anything but spaces'}; "
            f"{_LONGEST_RUN} at most"
        )

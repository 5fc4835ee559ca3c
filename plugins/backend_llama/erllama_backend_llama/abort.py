"""Ending a running decode early, from any thread."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from llama_cpp import llama_cpp

# llama.cpp asks before each node of a graph. libc's strlen over one character and a zero is the
# answer, 0 or 1, without the interpreter's lock, which the thread that aborts may well hold.
_ASK: Final = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)


class AbortFlag:
    """Set on any thread; it must live as long as the context that asks it."""

    def __init__(self, context: Any) -> None:
        self._text = ctypes.create_string_buffer(2)
        llama_cpp.llama_set_abort_callback(context, _ASK, ctypes.addressof(self._text))

    def set(self) -> None:
        self._text[0] = b"\1"

    def reset(self) -> None:
        self._text[0] = b"\0"

"""What ``erllama run`` writes, and where: replies on standard output, the rest where it belongs."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from typing import Final

PICTURES: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}
"""What stands for control characters, with which a reply could steer the terminal."""
_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"


class Console:
    """Standard output and standard error. Thread-safe enough for a line from another thread."""

    def __init__(self, *, interactive: bool) -> None:
        self.interactive: Final = interactive
        """A person types. Otherwise nothing but replies and what was asked for is written."""
        self._on_terminal: Final = sys.stdout.isatty()
        self._column_0 = True
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if interactive:
            with contextlib.suppress(ImportError):  # input() is poorer without it
                importlib.import_module("readline")

    def ask(self, prompt: str) -> str | None:
        """A line that a person types; None at the end."""
        try:
            if self._on_terminal:
                line = input(prompt)
            else:  # what is written there is for somebody else
                sys.stderr.write(prompt)
                sys.stderr.flush()
                line = input()
        except EOFError:
            self.line("")
            return None
        # What was typed in another encoding than the terminal's.
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def reply(self, text: str) -> None:
        """A piece of a reply, at once."""
        self._write(text.translate(PICTURES) if self._on_terminal else text)

    def aside(self, text: str) -> None:
        """A piece of what a model thinks: for a terminal alone."""
        if self._on_terminal:
            self._write(f"{_DIM}{text.translate(PICTURES)}{_PLAIN}")

    def end_reply(self) -> None:
        """The next thing begins on a line of its own."""
        if not self._column_0:
            self._write("\n")

    def line(self, text: str) -> None:
        """Something that was asked for."""
        self._write(f"{text.translate(PICTURES) if self._on_terminal else text}\n")

    def remark(self, text: str) -> None:
        """Something that nobody asked for, and that a person likes to know."""
        if self.interactive and self._on_terminal:
            self._write(f"{_DIM}{text}{_PLAIN}\n")

    def complain(self, text: str) -> None:
        """An error; on standard error."""
        tell(text)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._column_0 = text.endswith("\n")


def tell(text: str) -> None:
    """A line on standard error, from any thread; nothing when that is gone."""
    with contextlib.suppress(OSError, ValueError):
        print(f"erllama: {text}", file=sys.stderr, flush=True)

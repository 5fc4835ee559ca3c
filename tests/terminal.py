"""A program in a terminal of its own, for tests."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Self

_START = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that what is typed can be a signal
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """Runs a program as a person at a terminal would; what it shows is read as it comes."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._master, slave = os.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""
        """All that was shown, without escapes."""
        self._seen = 0

    def expect(self, text: str, timeout_s: float = 30.0) -> str:
        """Wait until ``text`` is shown, behind what was expected before; what came until then."""
        deadline = time.monotonic() + timeout_s
        while (at := self.shown.find(text, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                rest = self.shown[self._seen :]
                raise AssertionError(f"{text!r} was not shown; instead: {rest!r}")
        before = self.shown[self._seen : at]
        self._seen = at + len(text)
        return before

    def expect_more(self, n_characters: int, timeout_s: float = 30.0) -> None:
        """Wait until so much has been shown behind what was expected before."""
        deadline = time.monotonic() + timeout_s
        while len(self.shown) < self._seen + n_characters:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no more was shown than {self.shown[self._seen :]!r}")

    def _read(self, timeout_s: float) -> bool:
        """More of the output; False at its end, or when time is out."""
        if timeout_s <= 0 or not select.select([self._master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.shown = _ESCAPES.sub("", self.shown + data.decode("utf-8", "replace"))
        return bool(data)

    def type(self, text: str) -> None:
        """Type something, control characters included."""
        os.write(self._master, text.encode())

    def send(self, number: signal.Signals) -> None:
        """Send the program a signal, from outside."""
        self._process.send_signal(number)

    def exit_code(self, timeout_s: float = 30.0) -> int:
        """Wait until the program ends, and read the rest of what it shows."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            pass
        return self._process.wait(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

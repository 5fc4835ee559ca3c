"""Who wrote a temporary file, and whether that process can still be writing it.

A process id alone says little: it comes round again, after a reboot at once, and in another
container it names another process. So a temporary file's name says boot, pid namespace,
process id and the process's start time.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

import attrs

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE: Final = Path("/proc/self/ns/pid")
_UNKNOWN_BOOT: Final = "unknown"

FOREIGN_GRACE_S: Final = 3600.0
"""How long a file of another container, whose processes cannot be seen, counts as in use."""


@attrs.frozen(slots=True)
class Owner:
    """A process, named so that no other one has the same name."""

    boot: str
    """The kernel's id of this boot, or ``unknown``."""
    namespace: int
    """Inode number of the pid namespace; 0 where there are none."""
    pid: int
    started: int
    """Clock ticks from boot to the start of the process; 0: not known."""

    def __str__(self) -> str:
        return f"{self.boot}.{self.namespace}.{self.pid}.{self.started}"

    @classmethod
    def parse(cls, text: str) -> Owner:
        """The inverse of ``str``; ValueError if the text is not such a name."""
        boot, *numbers = text.split(".")
        namespace, pid, started = (int(number) for number in numbers)
        owner = cls(boot, namespace, pid, started)
        if not boot.isalnum() or pid <= 0 or str(owner) != text:
            raise ValueError(f"not the name of a process: {text!r}")
        return owner

    def may_live(self, age_s: float) -> bool:
        """Whether the process may still be there; ``age_s`` is that of its file."""
        here = this_process()
        if self.boot != here.boot:
            return False
        if self.namespace != here.namespace:
            return abs(age_s) < FOREIGN_GRACE_S
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # it lives, as another user
        started = _start_ticks(self.pid)
        return not (self.started and started and here.started) or self.started == started


def this_process() -> Owner:
    """The calling process; right after a fork, too."""
    return _describe(os.getpid())


@functools.lru_cache(maxsize=1)
def _describe(pid: int) -> Owner:
    try:
        boot = _BOOT_ID.read_text("utf-8").strip().replace("-", "")
    except (OSError, ValueError):
        boot = ""
    try:
        namespace = _PID_NAMESPACE.stat().st_ino
    except OSError:
        namespace = 0
    return Owner(boot if boot.isalnum() else _UNKNOWN_BOOT, namespace, pid, _start_ticks(pid))


def _start_ticks(pid: int) -> int:
    """Field 22 of ``/proc/<pid>/stat`` (proc_pid_stat(5)); 0 where it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        # The second field, the command, is in parentheses and may hold anything.
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0

"""The folders of a store: made when missing, private whatever the umask is."""

from __future__ import annotations

import os
from pathlib import Path

from erllama_core.errors import TierError
from erllama_tier_disk.failure import is_full, tier_error
from erllama_tier_disk.layout import OBJECTS, temporary_name


def absolute_root(root: Path) -> Path:
    """``root`` with its ``~`` resolved, and independent of the working directory."""
    if "\0" in str(root):
        raise TierError(f"the root {str(root)!r} has a zero byte in it; no folder can")
    try:
        return root.expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise TierError(f"cannot resolve the root {root}: {error}. Give it in full.") from error


def open_root(root: Path, *, read_only: bool) -> None:
    """See to it that ``root`` can be used as asked. Raises TierError, which says what to do."""
    if read_only:
        if not os.access(root, os.R_OK | os.X_OK) or not root.is_dir():
            raise TierError(
                f"cannot open the root {root} for reading: it is not a folder that this user can "
                f"read. A read-only tier creates nothing; create the folder, or remove read_only."
            )
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        make_private(root)
        make_private(root / OBJECTS)
        # Permission bits do not tell all: access lists, read-only mounts, other users' rights.
        probe = root / OBJECTS / temporary_name()
        os.close(create_private(probe))
        probe.unlink()
    except OSError as error:
        if not is_full(error):
            raise tier_error("use the root", root, error) from error


def why_unusable(root: Path, *, read_only: bool) -> str | None:
    """Why :func:`open_root` would fail, as far as looking tells; None when it would not."""
    try:
        root = absolute_root(root)
    except TierError as error:
        return str(error)
    if read_only:
        if root.is_dir() and os.access(root, os.R_OK | os.X_OK):
            return None
        return f"{root} is not a folder that this user can read, and read_only creates none"
    there = root
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there == root else "does not let it be created"
        return f"{there} {what} by this user"
    return None


def make_private(folder: Path) -> bool:
    """Make a folder of mode 0700; False, and nothing done, if it is there. Raises OSError."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if folder.is_dir():
            return False
        raise
    folder.chmod(0o700)
    return True


def create_private(path: Path) -> int:
    """A descriptor, for writing, of a new file of mode 0600. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd

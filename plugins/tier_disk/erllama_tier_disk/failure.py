"""What an OSError becomes: a TierError that says what was tried, where, and what to do."""

from __future__ import annotations

import errno
import os
from typing import Final

from erllama_core.errors import TierError, TierFull

_FULL: Final = {
    errno.ENOSPC: "the device is full; free some of it, or give the tier a quota_bytes below it",
    errno.EDQUOT: "the user's disk quota is used up; raise it, or give the tier a smaller "
    "quota_bytes",
}
_ADVICE: Final = {
    errno.EACCES: "let this user read and write the tier's root, or choose another root",
    errno.EPERM: "let this user read and write the tier's root, or choose another root",
    errno.EROFS: "the file system is mounted read-only; set read_only = true or choose another "
    "root",
    errno.ENOTDIR: "a file is where a folder belongs; choose another root or move the file away",
    errno.EEXIST: "a file is where a folder belongs; choose another root or move the file away",
    errno.EISDIR: "a folder is where a file belongs; move it away",
    errno.ELOOP: "a symbolic link is where a file or folder belongs; move it away",
    errno.EMFILE: "this process has too many open files; raise its limit (ulimit -n)",
    errno.EFBIG: "the file is larger than this process or file system may write",
}


def is_full(error: OSError) -> bool:
    """Whether the device, or the user's share of it, has no room."""
    return error.errno in _FULL


def tier_error(action: str, path: str | os.PathLike[str], error: OSError) -> TierError:
    """The error to raise from ``error``; ``action`` completes "cannot …"."""
    reason = error.strerror or str(error) or type(error).__name__
    message = f"cannot {action} {os.fspath(path)}: {reason}"
    if error.errno in _FULL:
        return TierFull(f"{message} ({_FULL[error.errno]})")
    advice = _ADVICE.get(error.errno) if error.errno is not None else None
    return TierError(f"{message} ({advice})" if advice else message)

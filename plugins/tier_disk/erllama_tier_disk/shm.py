"""The default root of ``ram_file``: a folder of one user's own on the shared tmpfs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from erllama_core.errors import TierError

SHARED_MEMORY = Path("/dev/shm")


def private_folder(parent: Path = SHARED_MEMORY) -> Path:
    """``<parent>/erllama-<user id>``, made when it is missing, mode 0700.

    Everybody may create names in ``parent``, so a folder that someone else put there first is
    refused: its owner could change what models are restored from. Raises TierError.
    """
    folder = parent / f"erllama-{os.geteuid()}"
    if not parent.is_dir():
        raise TierError(
            f"{parent} is not there, so a ram_file tier has no default place: "
            f"set its root to a folder on a tmpfs"
        )
    try:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            folder.chmod(0o700)
        status = folder.lstat()
    except OSError as error:
        raise TierError(
            f"cannot create {folder}: {error.strerror}. Set the root of the ram_file tier to a "
            f"folder on a tmpfs that this user can write to."
        ) from error
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or stat.S_IMODE(status.st_mode) & 0o077
    ):
        raise TierError(
            f"{folder} is not a private folder of user {os.geteuid()} (owner {status.st_uid}, "
            f"mode {stat.filemode(status.st_mode)}). Remove it, or set the root of the ram_file "
            f"tier to another folder."
        )
    return folder

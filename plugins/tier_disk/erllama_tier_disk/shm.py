"""The default root of ``ram_file``: a folder of one user's own on the shared tmpfs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from erllama_core.errors import TierError
from erllama_tier_disk.folders import make_private

SHARED_MEMORY = Path("/dev/shm")


def private_folder(parent: Path = SHARED_MEMORY, *, create: bool = True) -> Path:
    """``<parent>/erllama-<user id>``, mode 0700; made when it is missing, if ``create``.

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
        if create:
            make_private(folder)
        status = folder.lstat()
    except FileNotFoundError as error:
        raise TierError(
            f"there is no {folder} to read. A read-only tier creates nothing; set the root of the "
            f"ram_file tier, or remove read_only."
        ) from error
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

"""Pins beside the objects: one empty file for each, named by the key that it protects."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from erllama_core.errors import TierError
from erllama_tier_disk.failure import tier_error
from erllama_tier_disk.folders import create_private, make_private
from erllama_tier_disk.transfer import sync_directory

_NAME: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def record_pin(folder: Path, key: bytes) -> None:
    """Keep a pin, also across a power cut. Raises TierError."""
    path = _path(folder, key)
    try:
        if make_private(folder):
            sync_directory(folder.parent)
        try:
            os.close(create_private(path))
        except FileExistsError:
            return
        sync_directory(folder)
    except OSError as error:
        raise tier_error("record the pin", path, error) from error


def erase_pin(folder: Path, key: bytes) -> None:
    """Forget a pin that may be there. Raises TierError."""
    path = _path(folder, key)
    try:
        path.unlink()
        sync_directory(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise tier_error("erase the pin", path, error) from error


def list_pins(folder: Path) -> list[bytes]:
    """The pins there are; what else is in the folder is passed over. Raises TierError."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names alone; Path.iterdir makes a Path of each
    except FileNotFoundError:
        return []
    except OSError as error:
        raise tier_error("list the pins in", folder, error) from error
    return [bytes.fromhex(name) for name in names if _NAME.fullmatch(name)]


def _path(folder: Path, key: bytes) -> Path:
    if len(key) != 32:
        raise TierError(f"a pin has a key of 32 bytes, not {len(key)}")
    return folder / key.hex()

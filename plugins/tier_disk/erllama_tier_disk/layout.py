"""Where things are below a root.

::

    <root>/objects/<first two hex digits of the key>/<object id>.kvc
                                                    /.<owner>.<random>.tmp
    <root>/pins/<key>
    <root>/janitor.lock
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from erllama_core.interfaces.block import ObjectId
from erllama_tier_disk.owner import Owner, this_process

OBJECTS: Final = "objects"
PINS: Final = "pins"
JANITOR_LOCK: Final = "janitor.lock"
SUFFIX: Final = ".kvc"
_TEMPORARY_SUFFIX: Final = ".tmp"

_SHARD: Final = re.compile(r"[0-9a-f]{2}", re.ASCII)
_RANDOM: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)


def shard_of(object_id: ObjectId) -> str:
    """The name of the folder that the object is in."""
    return object_id.key[:1].hex()


def is_shard(name: str) -> bool:
    """Whether a folder of this name may hold objects."""
    return _SHARD.fullmatch(name) is not None


def object_path(root: Path, object_id: ObjectId) -> Path:
    """The object's file."""
    return root / OBJECTS / shard_of(object_id) / f"{object_id}{SUFFIX}"


def parse_object_name(name: str) -> ObjectId:
    """The object whose file has this name; ValueError if none can."""
    if not name.endswith(SUFFIX):
        raise ValueError(f"not the name of a stored object: {name!r}")
    return ObjectId.parse(name.removesuffix(SUFFIX))


def temporary_name() -> str:
    """A new name, this process's alone, for a file that is being written."""
    return f".{this_process()}.{os.urandom(8).hex()}{_TEMPORARY_SUFFIX}"


def parse_temporary_name(name: str) -> Owner | None:
    """Who writes the temporary file of this name; None if it is no temporary file's name."""
    if not (name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)):
        return None
    owner, _, random = name[1:].removesuffix(_TEMPORARY_SUFFIX).rpartition(".")
    if _RANDOM.fullmatch(random) is None:
        return None
    try:
        return Owner.parse(owner)
    except ValueError:
        return None

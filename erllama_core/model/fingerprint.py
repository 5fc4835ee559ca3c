"""Which weights a file holds: the SHA-256 of it, computed once per file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from erllama_core.errors import ModelLoadError
from erllama_core.user_cache import user_cache_folder


def file_fingerprint(path: Path, memory: Path | None = None) -> bytes:
    """The SHA-256 of a file, remembered by its device, inode, size and modification time.

    ``memory`` is the folder of the record, by default the user's cache folder; a record that
    cannot be read or written only costs the time of another hash. Raises ModelLoadError.
    """
    record = (user_cache_folder() if memory is None else memory) / "fingerprints.json"
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            identity = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
            known = _recall(record).get(identity)
            if known is not None:
                return bytes.fromhex(known)
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ModelLoadError(f"cannot read the model file {path}", reason=str(error)) from error
    _remember(record, identity, digest.hex())
    return digest


def _recall(record: Path) -> dict[str, str]:
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        key: value
        for key, value in known.items()
        if isinstance(value, str) and len(value) == 64 and _is_hex(value)
    }


def _is_hex(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True


def _remember(record: Path, identity: str, digest: str) -> None:
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        known = {**_recall(record), identity: digest}
        with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
            json.dump(known, file, indent=0)
        Path(file.name).replace(record)

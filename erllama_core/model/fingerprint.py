"""Which weights a file holds: a SHA-256 of all of it, or of the part that tells models apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from erllama_core.errors import ModelLoadError
from erllama_core.model.gguf import read_layout
from erllama_core.user_cache import user_cache_folder

_CHUNK_BYTES: Final = 1 << 20

_SETTLED_NS: Final = 2_000_000_000
"""The coarsest step of modification times, that of FAT. Within it a file can change again and
keep its time, so what was hashed that soon after a change is not remembered."""

_PART: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def file_fingerprint(path: Path, memory: Path | None = None) -> bytes:
    """The SHA-256 of a file, remembered by its device, inode, size and modification time.

    ``memory`` is the folder of the record, by default the user's cache folder; a record that
    cannot be read or written only costs the time of another hash. Raises ModelLoadError.
    """
    record = _record(memory)
    try:
        with path.open("rb") as file:
            identity = file_identity(os.fstat(file.fileno()))
            known = _recall(record).get(identity)
            if known is not None:
                return bytes.fromhex(known)
            digest = hashlib.file_digest(file, "sha256").digest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise _unreadable(path, error) from error
    if (
        file_identity(after) == identity
        and not 0 <= time.time_ns() - after.st_mtime_ns < _SETTLED_NS
    ):
        _remember(record, identity, digest.hex())
    return digest


def chunked_fingerprint(path: Path) -> bytes:
    """The SHA-256 of a GGUF file's bytes up to the end of its first tensor, and of its size.

    The bytes are the header, all metadata, all tensor infos and the first tensor's data with its
    padding; the size follows them as 8 bytes, little-endian. Files of one size that differ in
    later tensors alone have the same fingerprint. Raises ModelLoadError, also for a file that is
    not GGUF.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            left = read_layout(file, size, str(path)).first_tensor_end
            digest = hashlib.sha256()
            file.seek(0)
            while left > 0:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ModelLoadError(f"the model file {path} became shorter while it was read")
                digest.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    digest.update(size.to_bytes(8, "little"))
    return digest.digest()


def weights_files(path: Path) -> tuple[Path, ...]:
    """The files that hold a model's weights: all parts of a split one, in their order.

    llama.cpp names the parts ``NAME-00001-of-00003.gguf`` (its gguf-split tool) and loads them
    all when it is given the first. Raises ModelLoadError when one is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, count = match["stem"], int(match["count"])
    parts = tuple(
        path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)
    )
    for part in parts:
        if not part.is_file():
            raise ModelLoadError(
                f"{path} is one of {count} parts of a model, and {part} is missing"
            )
    return parts


def combined(digests: Sequence[bytes]) -> bytes:
    """One fingerprint for several files; that of a single file is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def _unreadable(path: Path, error: OSError) -> ModelLoadError:
    return ModelLoadError(f"cannot read the model file {path}", reason=str(error))


def file_identity(stat: os.stat_result) -> str:
    """What changes when a file is replaced or written to."""
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"


# ------------------------------------------------------------------- the record


def _record(memory: Path | None) -> Path | None:
    if memory is None:
        try:
            memory = user_cache_folder()
        except RuntimeError:  # a user without a home
            return None
    return memory / "fingerprints.json"


def _recall(record: Path | None) -> dict[str, str]:
    if record is None:
        return {}
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        key: value
        for key, value in known.items()
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    }


def _remember(record: Path | None, identity: str, digest: str) -> None:
    if record is None:
        return
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        # Processes that write at once lose an entry at most: a rename is whole or not at all.
        known = {**_recall(record), identity: digest}
        with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
            written = Path(file.name)
            try:
                json.dump(known, file, indent=0)
                file.close()
                written.replace(record)
            except BaseException:
                written.unlink(missing_ok=True)
                raise

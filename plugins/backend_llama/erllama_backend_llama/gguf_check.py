"""What can be said about a model file before llama.cpp sees it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from erllama_core.errors import ModelLoadError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER: Final = struct.Struct("<4sIQQ")
# The shortest metadata entry: an empty key, a type, one byte. The shortest tensor record: an
# empty name, no dimensions, a type, an offset.
_MIN_ENTRY_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 4 + 8


def check_gguf(path: Path) -> int:
    """How many tensors the file says that it has.

    Raises ModelLoadError if ``path`` is missing, not GGUF, or ends within its own header.
    Whether every tensor is there is for llama.cpp to say.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: no such file; set model_path to a GGUF file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelLoadError(f"{path}: the model file cannot be read", reason=str(error)) from error
    if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not head:
        raise ModelLoadError(
            f"{path}: not a GGUF file (it starts with {head[:4]!r}, not {_MAGIC!r}); "
            f"convert the model to GGUF or download a GGUF version of it"
        )
    if len(head) < _HEADER.size:
        raise ModelLoadError(
            f"{path}: truncated within its header ({size} bytes); download or copy it again"
        )
    _, version, tensors, entries = _HEADER.unpack(head)
    if version not in _VERSIONS:
        swapped = int.from_bytes(struct.pack("<I", version), "big")
        hint = (
            "it is big-endian; convert it for this machine"
            if swapped in _VERSIONS
            else "convert the model again with a current llama.cpp"
        )
        raise ModelLoadError(f"{path}: GGUF version {version} cannot be read; {hint}")
    if size < _HEADER.size + entries * _MIN_ENTRY_BYTES + tensors * _MIN_TENSOR_BYTES:
        raise ModelLoadError(
            f"{path}: truncated: {size} bytes cannot hold the {entries} metadata entries and "
            f"{tensors} tensors that its header announces; download or copy it again"
        )
    return int(tensors)

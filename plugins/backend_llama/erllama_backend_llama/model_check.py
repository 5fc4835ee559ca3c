"""What can be said of a model's metadata and tensors before llama.cpp sees them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from erllama_backend_llama.gguf_check import check_gguf
from erllama_backend_llama.gguf_file import GgufFile, NotGguf, Tensor
from erllama_core.errors import ModelLoadError

_PART: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the files of a model that is split (its gguf-split tool)."""


def check_model(path: Path) -> dict[str, Tensor]:
    """Raise ModelLoadError for a file that llama.cpp would refuse badly; the model's tensors."""
    tensors: dict[str, Tensor] = {}
    for part in _parts(path):
        check_gguf(part)
        try:
            with GgufFile(part) as file:
                tensors.update(file.tensors())
        except NotGguf as error:
            raise ModelLoadError(
                f"{part}: llama.cpp could not read the file", reason=str(error)
            ) from error
    return tensors


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match["stem"], int(match["count"])
    names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    return [path.with_name(name) for name in names]

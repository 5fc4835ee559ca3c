"""GGUF files: models and adapters, as the core reads them and as llama.cpp does."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from target import Run, Target
from targets_store import in_memory

from erllama_core.errors import ErllamaError, ModelLoadError
from erllama_core.model.gguf import read_layout
from llama_user import fate_of

_WORDS = (
    *(b"GGUF", b"general.alignment", b"general.architecture", b"tokenizer.ggml.tokens", b"llama."),
    *(b"\x09\0\0\0\x08\0\0\0", b"\x08\0\0\0", b"\x04\0\0\0", b"\x09\0\0\0", bytes(8)),
    *((n).to_bytes(8, "little") for n in (1, 2, 4, 5, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1)),
)
_SEPARATOR = b"\0tensors\0"


@contextmanager
def _layout() -> Iterator[Run]:
    def run(data: bytes) -> None:
        with suppress(ModelLoadError):
            found = read_layout(io.BytesIO(data), len(data), "x.gguf")
            assert found.first_tensor_end <= len(data)
            if found.tensors:
                assert 24 <= found.data_start <= found.first_tensor_end

    yield run


@contextmanager
def _model_file() -> Iterator[Run]:
    """What is not refused is loaded and computed with; the process lives on."""
    from erllama_backend_llama.model_check import check_model
    from llama_user import use

    with _files(check_model, use) as run:
        yield run


@contextmanager
def _adapter_file() -> Iterator[Run]:
    """The same of an adapter, beside a model that it is for."""
    from erllama_backend_llama.model import load_model
    from erllama_backend_llama.options import LlamaOptions
    from erllama_core.interfaces.backend import BackendRequest, ContextOptions, Row
    from tiny_gguf import write_tiny_gguf

    folder = in_memory()
    context = ContextOptions(n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1)
    path = write_tiny_gguf(folder / "model.gguf", "llama")
    request = BackendRequest(model_path=path, options=LlamaOptions(), context=context)

    def use(adapter: Path) -> None:
        model = load_model(request)
        made = model.load_adapter(adapter)
        opened = model.open_context()
        model.attach(opened, [(made, 1.0)])
        opened.step([Row(0, 0, bytes(32), logits=True)])
        model.close()

    try:
        with _files(lambda _: None, use) as run:
            yield run
    finally:
        shutil.rmtree(folder)


@contextmanager
def _files(check: Callable[[Path], object], use: Callable[[Path], None]) -> Iterator[Run]:
    """``check`` in this process, and ``use`` in one of its own, as it may compute for long."""
    folder = in_memory()
    path = folder / "file.gguf"

    def run(data: bytes) -> None:
        head, _, tensors = data.partition(_SEPARATOR)
        path.write_bytes(head)
        if tensors:  # how many bytes of them, zeros, as they are the most of a file
            size = min(int.from_bytes(tensors[:4], "little"), 1 << 23)
            os.truncate(path, len(head) + -len(head) % 32 + size)
        with suppress(ErllamaError):
            check(path)
            end = fate_of(use, path)
            assert end in {"used", "refused"}, end

    try:
        yield run
    finally:
        shutil.rmtree(folder)


def shortened(path: Path) -> bytes:
    """A file as a seed: its header, and how many bytes of tensors follow."""
    data = path.read_bytes()
    with path.open("rb") as file:
        start = read_layout(file, len(data), str(path)).data_start
    return data[:start] + _SEPARATOR + (len(data) - start).to_bytes(4, "little")


TARGETS = (
    Target(name="gguf", open=_layout, words=_WORDS),
    Target(
        name="model_file",
        open=_model_file,
        words=_WORDS,
        seconds=40.0,
        base_bytes=64 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=20,
    ),
    Target(
        name="adapter_file",
        open=_adapter_file,
        words=_WORDS,
        seconds=40.0,
        base_bytes=64 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=20,
    ),
)

"""LoRA adapters: what can be said of a file before llama.cpp sees it, and one in memory.

llama.cpp aborts the process on a wrong type in an adapter's metadata, and at the first step on
shapes that it does not compare when it loads one. So all of both is compared here. What the
format means is read from llama.cpp's src/llama-adapter.cpp and src/llama-graph.cpp.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_backend_llama.gguf_check import check_gguf
from erllama_backend_llama.gguf_file import GgufFile, NotGguf, Tensor, Value
from erllama_core.errors import AdapterLoadError, ModelLoadError

_PATIENCE_S: Final = 60.0
"""Longer than reading an adapter takes, which is in the page cache by then."""
_PARTS: Final = (".lora_a", ".lora_b")
_IGNORED: Final = "_norm.weight"
"""Tensors of this ending may be there, and have no effect."""
_TOKENS: Final = "token_embd.weight"
_LOGITS: Final = "output.weight"
_NVFP4: Final = 40
"""``GGML_TYPE_NVFP4``: weights that llama.cpp cannot combine with an adapter."""
# enum ggml_type of ggml.h: numbers that matrices can be made of.
_FLOATS: Final = frozenset({0, 1, 30})  # f32, f16, bf16
_QUANTISED: Final = frozenset({2, 3, 6, 7, 8, 10, 11, 12, 13, 14})  # q4_0 to q8_0, q2_K to q6_K


class NativeLock:
    """Guards what llama.cpp keeps of a model's adapters without a lock of its own.

    ``llama_model.loras`` is changed when an adapter is loaded or freed, and read when a context
    is opened and in the first step after its adapters were changed. Re-entrant. Raises
    ModelLoadError when whoever has it does not come back.
    """

    def __init__(self) -> None:
        self._lock: Final = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=_PATIENCE_S):
            raise ModelLoadError("a call of llama.cpp in this model's adapters does not return")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class LlamaAdapter:
    """A ``llama_adapter_lora``; freed once it is closed and no context computes with it."""

    def __init__(self, native: Any, lock: NativeLock) -> None:
        self.native: Any = native
        """None when it is freed."""
        self._lock: Final = lock
        self._users = 0
        self._is_closed = False

    def attached(self) -> None:
        """A context computes with it from now on."""
        with self._lock:
            self._users += 1

    def detached(self) -> None:
        """That context no longer does."""
        with self._lock:
            self._users -= 1
            self._free_if_unused()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._free_if_unused()

    def gone(self) -> None:
        """The model was freed, and this with it."""
        self.native = None

    def _free_if_unused(self) -> None:
        if self._is_closed and not self._users and self.native is not None:
            llama_cpp.llama_adapter_lora_free(self.native)
            self.native = None


def check_adapter(path: Path, architecture: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterLoadError for an adapter that is damaged or not for a model.

    ``tensors`` are the model's own.
    """
    try:
        check_gguf(path)
        with GgufFile(path) as file:
            _check_metadata(path, file.metadata(), architecture)
            _check_tensors(path, file.tensors(), tensors)
    except NotGguf as error:
        raise AdapterLoadError(f"{path} cannot be read as GGUF", reason=str(error)) from error
    except AdapterLoadError:
        raise
    except ModelLoadError as error:
        raise AdapterLoadError(f"not an adapter: {error}") from error


def read_ahead(path: Path) -> None:
    """Have a file in the page cache, so that llama.cpp reads it as quickly as memory is copied:
    what it holds a lock for, or makes a worker wait for, must not take as long as a slow disk.
    """
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _check_metadata(path: Path, metadata: Mapping[str, Value], architecture: str) -> None:
    general, kind = _text(path, metadata, "general.type"), _text(path, metadata, "adapter.type")
    if general != "adapter":
        what = "a model" if general in {None, "model"} else f"of type {general!r}"
        raise AdapterLoadError(f"{path} is {what}, not an adapter (general.type)")
    if kind != "lora":
        raise AdapterLoadError(f"{path} is an adapter of type {kind!r}; LoRA adapters are known")
    made_for = _text(path, metadata, "general.architecture")
    if made_for != architecture:
        raise AdapterLoadError(
            f"{path} is for models of architecture {made_for!r}; this one is {architecture!r}"
        )
    alpha = metadata.get("adapter.lora.alpha", Value("f32", 0.0))
    if alpha.type != "f32" or not math.isfinite(alpha.content):
        raise AdapterLoadError(
            f"{path}: adapter.lora.alpha is {alpha.content} of type {alpha.type}; a finite f32 "
            f"is needed"
        )
    if "adapter.alora.invocation_tokens" in metadata:
        raise AdapterLoadError(
            f"{path} is an activated LoRA, which works from certain tokens on; only adapters "
            f"that work everywhere can be used"
        )


def _text(path: Path, metadata: Mapping[str, Value], key: str) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value.content, str):
        raise AdapterLoadError(f"{path}: {key} is of type {value.type}, not a string")
    return value.content


def _check_tensors(path: Path, found: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None and name.endswith(_IGNORED):
            continue
        base = name.removesuffix(part or "")
        if part is None or any(other in base for other in _PARTS):
            raise AdapterLoadError(f"{path}: the tensor {name!r} is no part of a LoRA adapter")
        if tensor.type not in _FLOATS | _QUANTISED:
            raise AdapterLoadError(f"{path}: {name} is of ggml type {tensor.type}, not supported")
        pairs.setdefault(base, {})[part] = tensor
    if not pairs:
        raise AdapterLoadError(f"{path} has no tensors of a LoRA adapter")
    for base, parts in pairs.items():
        if len(parts) < len(_PARTS):
            (there,) = parts
            raise AdapterLoadError(f"{path}: of {base} there is only {there}; both are needed")
        if base not in model:
            raise AdapterLoadError(
                f"{path}: the model has no tensor {base}; the adapter is for another model"
            )
        _check_pair(path, base, model, parts[".lora_a"].shape, parts[".lora_b"].shape)


def _check_pair(
    path: Path,
    base: str,
    model: Mapping[str, Tensor],
    a: tuple[int, ...],
    b: tuple[int, ...],
) -> None:
    weights = model[base]
    columns, rows, *others = weights.shape
    if weights.type == _NVFP4:
        raise AdapterLoadError(f"{path}: {base} is NVFP4, which cannot be combined with adapters")
    if base.endswith(_TOKENS):
        # Rows are looked up in it, so that the two parts come the other way round.
        if base == _TOKENS and _LOGITS not in model:
            raise AdapterLoadError(
                f"{path}: {base} also makes this model's logits, for which llama.cpp cannot "
                f"adapt it; leave it out when the adapter is made"
            )
        expected_a, expected_b = (a[0], rows, *others), (a[0], columns, *others)
    else:
        expected_a, expected_b = (columns, a[1], *others), (a[1], rows, *others)
    if a != expected_a or b != expected_b or not b[0]:
        raise AdapterLoadError(
            f"{path}: its parts for {base} are {_shown(a)} and {_shown(b)}, which do not fit the "
            f"model's {_shown(weights.shape)}; the adapter is for another model"
        )


def _shown(shape: tuple[int, ...]) -> str:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return " x ".join(map(str, shape))

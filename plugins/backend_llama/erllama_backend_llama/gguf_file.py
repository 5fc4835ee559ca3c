"""A GGUF file's metadata and tensor records, as llama.cpp's own reader finds them.

Checks are made on what the same code has read that will read it again, so that nothing can look
one way to them and another way to llama.cpp. The functions are those of ggml's gguf.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import attrs
from llama_cpp import llama_cpp

from erllama_backend_llama import native

# enum gguf_type of gguf.h.
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, tuple[str, Any]]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}
_MOST_DIMENSIONS: Final = 4
_MOST_NUMBERS: Final = 4096
"""Of an array whose values are looked at: one for each layer or so, not one for each token."""


class _InitParams(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    # The library that has them is loaded with llama.cpp's, and found through it.
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    return prototype((name, llama_cpp._lib))  # noqa: SLF001 - there is no public name for it


_HANDLE: Final = ctypes.c_void_p
_ID: Final = ctypes.c_int64
_init_from_file: Final = _function("gguf_init_from_file", _HANDLE, ctypes.c_char_p, _InitParams)
_free: Final = _function("gguf_free", None, _HANDLE)
_n_kv: Final = _function("gguf_get_n_kv", _ID, _HANDLE)
_key: Final = _function("gguf_get_key", ctypes.c_char_p, _HANDLE, _ID)
_kv_type: Final = _function("gguf_get_kv_type", ctypes.c_int, _HANDLE, _ID)
_array_type: Final = _function("gguf_get_arr_type", ctypes.c_int, _HANDLE, _ID)
_array_length: Final = _function("gguf_get_arr_n", ctypes.c_size_t, _HANDLE, _ID)
_array_data: Final = _function("gguf_get_arr_data", ctypes.c_void_p, _HANDLE, _ID)
_string_value: Final = _function("gguf_get_val_str", ctypes.c_char_p, _HANDLE, _ID)
_values: Final = {
    kind: _function(f"gguf_get_val_{name}", type_, _HANDLE, _ID)
    for kind, (name, type_) in _SCALARS.items()
}
_data_offset: Final = _function("gguf_get_data_offset", ctypes.c_size_t, _HANDLE)
_n_tensors: Final = _function("gguf_get_n_tensors", _ID, _HANDLE)
_tensor_name: Final = _function("gguf_get_tensor_name", ctypes.c_char_p, _HANDLE, _ID)
_tensor_shape: Final = _function("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), _HANDLE, _ID)
_tensor_type: Final = _function("gguf_get_tensor_type", ctypes.c_int, _HANDLE, _ID)


class NotGguf(ValueError):
    """llama.cpp's reader refuses the file; the text is what it said."""


@attrs.frozen
class Value:
    """A value of the metadata."""

    type: str
    """``"u32"`` and so on, ``"string"``, or ``"array"``."""
    content: Any
    """A number, a truth value or a text; of an array of up to 4,096 numbers, a tuple of them."""
    length: int | None = None
    """How many values an array has."""


@attrs.frozen
class Tensor:
    """What a file says of a tensor."""

    type: int
    """``enum ggml_type``."""
    shape: tuple[int, int, int, int]
    """In ggml's order, the fastest dimension first; 1 where it has fewer."""


class GgufFile:
    """An open header; a context manager. Raises NotGguf."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._handle: Any = None
        native.start()
        with native.collect_log() as lines:
            handle = _init_from_file(os.fsencode(path), _InitParams(True, None))
        if not handle:
            raise NotGguf(native.reason(lines) or "llama.cpp cannot read the header")
        self._handle = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free it. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _free(handle)

    def metadata(self) -> dict[str, Value]:
        """All of it, by key."""
        found = {}
        for index in range(_n_kv(self._handle)):
            key = _key(self._handle, index).decode("utf-8", "replace")
            found[key] = self._value(index)
        return found

    def _value(self, index: int) -> Value:
        kind = _kv_type(self._handle, index)
        if kind == _STRING:
            return Value("string", _string_value(self._handle, index).decode("utf-8", "replace"))
        if kind == _ARRAY:
            return self._array(index)
        name, _ = _SCALARS[kind]
        return Value(name, _values[kind](self._handle, index))

    def _array(self, index: int) -> Value:
        length = _array_length(self._handle, index)
        kind = _array_type(self._handle, index)
        if kind not in _SCALARS or length > _MOST_NUMBERS:
            return Value("array", None, length)
        _, type_ = _SCALARS[kind]
        data = _array_data(self._handle, index)
        numbers = tuple((type_ * length).from_address(data)) if length else ()
        return Value("array", numbers, length)

    def texts(self, key: str) -> list[bytes]:
        """The values of an array of strings; empty when the key is none. Raises NotGguf.

        Read by walking along the header, which llama.cpp's reader has found in order: asking it
        for each of 150,000 tokens would take as long as loading them.
        """
        with self._path.open("rb") as file:
            header = file.read(self.data_offset)
        try:
            return _texts(header, key.encode())
        except (struct.error, IndexError, KeyError) as error:
            raise NotGguf("the file was changed while it was read") from error

    @property
    def data_offset(self) -> int:
        """Where the tensors' data begins, bytes."""
        return int(_data_offset(self._handle))

    def tensors(self) -> dict[str, Tensor]:
        """All records, by name."""
        found = {}
        for index in range(_n_tensors(self._handle)):
            name = _tensor_name(self._handle, index).decode("utf-8", "replace")
            shape = _tensor_shape(self._handle, index)
            ne0, ne1, ne2, ne3 = shape[:_MOST_DIMENSIONS]
            found[name] = Tensor(_tensor_type(self._handle, index), (ne0, ne1, ne2, ne3))
        return found


_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_FIRST_KEY: Final = 4 + 4 + 8 + 8


def _texts(header: bytes, wanted: bytes) -> list[bytes]:
    at = _FIRST_KEY
    for _ in range(_U64(header, at - 8)[0]):
        (length,) = _U64(header, at)
        at += 8 + length
        is_wanted = header[at - length : at] == wanted
        (kind,) = _U32(header, at)
        at += 4
        count = 1
        if kind == _ARRAY:
            (kind,), (count,) = _U32(header, at), _U64(header, at + 4)
            at += 12
        if kind != _STRING:
            at += count * ctypes.sizeof(_SCALARS[kind][1])
            continue
        found = []
        for _ in range(count):
            (length,) = _U64(header, at)
            at += 8 + length
            if is_wanted:
                found.append(header[at - length : at])
        if is_wanted:
            return found
    return []

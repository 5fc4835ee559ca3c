"""The GGUF header reader: real files against the ``gguf`` package, and damaged ones."""

from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_core.errors import ModelLoadError
from erllama_core.model.gguf import MAX_HEADER_BYTES, GgufLayout, read_layout
from tiny_gguf import ARCHS, Arch, write_tiny_gguf

U32, I32, STRING, ARRAY, U64 = 4, 5, 8, 9, 10
HUGE = (1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def parse(data: bytes) -> GgufLayout:
    return read_layout(io.BytesIO(data), len(data), "x.gguf")


def write_small(path: Path, *, alignment: int | None = None, big: bool = False) -> Path:
    """Every value type that the writer knows, in 1 KB."""
    order = GGUFEndian.BIG if big else GGUFEndian.LITTLE
    writer = GGUFWriter(path, "small", endianess=order)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for width in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{width}")(f"a.{width}", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "grüße")
    writer.add_array("a.strings", ["x", "", "long" * 9])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("one", np.arange(30, dtype=np.float32).reshape(5, 6))
    writer.add_tensor("two", np.arange(7, dtype=np.float16))
    writer.add_tensor("three", np.arange(9, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


# ------------------------------------------------------- files made by hand


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key_value(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(offset: int, *, dimensions: tuple[int, ...] = (8,), name: bytes = b"t") -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", 0, offset)


def gguf_bytes(
    key_values: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(128),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    key_values, tensors = key_values or [], tensors or []
    announced = counts or (len(tensors), len(key_values))
    head = b"GGUF" + struct.pack("<IQQ", version, *announced) + b"".join(key_values + tensors)
    return head + bytes(-len(head) % 32) + data


# --------------------------------------------------------------- real files


def check_against_reference(path: Path) -> None:
    reader: Any = GGUFReader(path)
    with path.open("rb") as file:
        found = read_layout(file, path.stat().st_size, str(path))
    assert found.version == reader.fields["GGUF.version"].parts[-1][0]
    assert found.tensors == len(reader.tensors)
    assert found.key_values == reader.fields["GGUF.kv_count"].parts[-1][0]
    assert found.alignment == reader.alignment
    assert found.data_start == reader.data_offset == reader.tensors[0].data_offset
    assert found.first_tensor_end == reader.tensors[1].data_offset


@pytest.mark.parametrize("arch", ARCHS)
def test_models_are_read_as_the_reference_reads_them(arch: Arch, tmp_path: Path) -> None:
    """Data and first tensor lie where the gguf package finds them, for every architecture."""
    check_against_reference(write_tiny_gguf(tmp_path / "model.gguf", arch))


@pytest.mark.parametrize("alignment", [None, 8, 32, 256])
def test_every_type_and_alignment_is_read_as_the_reference_reads_it(
    alignment: int | None, tmp_path: Path
) -> None:
    """All scalar types, strings and arrays, and an alignment that the file chooses."""
    check_against_reference(write_small(tmp_path / "small.gguf", alignment=alignment))


@pytest.mark.real_model
def test_the_demo_model_is_read_as_the_reference_reads_it(demo_model_path: Path) -> None:
    """A model as it is published."""
    check_against_reference(demo_model_path)


# --------------------------------------------------- what the format permits


def test_version_2_is_read() -> None:
    """Version 2 has the layout of version 3."""
    assert parse(gguf_bytes(tensors=[tensor(0), tensor(64)], version=2)).version == 2


def test_the_first_tensor_is_the_one_whose_data_comes_first() -> None:
    """The order of the tensor infos does not matter, nor does an empty tensor at the start."""
    data = gguf_bytes(tensors=[tensor(96), tensor(32), tensor(0), tensor(0, dimensions=(0,))])
    found = parse(data)
    assert found.data_start == len(data) - 128
    assert found.first_tensor_end == found.data_start + 32


def test_one_tensor_or_none_ends_with_the_file() -> None:
    """Without a second tensor there is nothing after the first but the file's end."""
    for data in (gguf_bytes(tensors=[tensor(0)]), gguf_bytes(), gguf_bytes()[:24]):
        assert parse(data).first_tensor_end == len(data)


def test_nested_arrays_are_passed_over() -> None:
    """Arrays of arrays are legal up to a depth, and what follows them is still found."""
    nested = array(ARRAY, 2, array(I32, 1, bytes(4)) + array(STRING, 2, text(b"") + text(b"xy")))
    aligned = key_value(b"general.alignment", U32, struct.pack("<I", 64))
    assert parse(gguf_bytes([key_value(b"k", ARRAY, nested), aligned])).alignment == 64


# ------------------------------------------------------------ what it forbids

DEEP: Final = array(ARRAY, 1) * 5 + array(I32, 0)
ALIGNMENT: Final = b"general.alignment"

BAD: Final = {
    "nothing": (b"", "begin with the bytes GGUF"),
    "other magic": (b"GGML" + bytes(60), "begin with the bytes GGUF"),
    "magic alone": (b"GGUF", "the version"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 4": (gguf_bytes(version=4), "version 4"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "type": (gguf_bytes([key_value(b"k", 13, b"")]), "unknown type 13"),
    "array type": (gguf_bytes([key_value(b"k", ARRAY, array(13, 1))]), "unknown type 13"),
    "depth": (gguf_bytes([key_value(b"k", ARRAY, DEEP)]), "nested"),
    "key": (gguf_bytes([key_value(b"k" * 65536, U32, bytes(4))]), "65536 bytes"),
    "alignment 0": (gguf_bytes([key_value(ALIGNMENT, U32, bytes(4))]), "power of two"),
    "alignment 48": (
        gguf_bytes([key_value(ALIGNMENT, U32, struct.pack("<I", 48))]),
        "power of two",
    ),
    "alignment type": (
        gguf_bytes([key_value(ALIGNMENT, U64, struct.pack("<Q", 32))]),
        "of type 10",
    ),
    "alignment twice": (
        gguf_bytes([key_value(ALIGNMENT, U32, struct.pack("<I", 32))] * 2),
        "twice",
    ),
    "alignment above the file": (
        gguf_bytes([key_value(ALIGNMENT, U32, struct.pack("<I", 1 << 31))], [tensor(0)]),
        "begins at byte 2147483648",
    ),
    "dimensions": (gguf_bytes(tensors=[tensor(0, dimensions=(1,) * 5)]), "5 dimensions"),
    "offset unaligned": (gguf_bytes(tensors=[tensor(0), tensor(33)]), "no multiple"),
    "offset not 0": (gguf_bytes(tensors=[tensor(32)]), "at offset 32"),
    "offset beyond": (gguf_bytes(tensors=[tensor(0), tensor(32), tensor(160)]), "begins at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_malformed_is_named(case: str) -> None:
    """Each mistake is a ModelLoadError with the file's name and what is wrong."""
    data, what = BAD[case]
    with pytest.raises(ModelLoadError, match=what) as caught:
        parse(data)
    assert "x.gguf" in str(caught.value)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """A file as the gguf package writes it for the other byte order."""
    data = write_small(tmp_path / "big.gguf", big=True).read_bytes()
    with pytest.raises(ModelLoadError, match="big-endian"):
        parse(data)


class Counting(io.BytesIO):
    """Counts the bytes asked for, which a reader may have to hold."""

    asked = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0
        self.asked += size
        return super().read(size)


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "place", ["tensors", "key_values", "key", "string", "array", "strings", "arrays", "name"]
)
def test_a_huge_count_is_refused_before_anything_is_read_for_it(place: str, count: int) -> None:
    """Counts and lengths beyond the file cost neither memory nor steps."""
    length = struct.pack("<Q", count)
    data = {
        "tensors": gguf_bytes(counts=(count, 0)),
        "key_values": gguf_bytes(counts=(0, count)),
        "key": gguf_bytes([length + bytes(32)]),
        "string": gguf_bytes([key_value(b"k", STRING, length)]),
        "array": gguf_bytes([key_value(b"k", ARRAY, array(U32, count))]),
        "strings": gguf_bytes([key_value(b"k", ARRAY, array(STRING, count))]),
        "arrays": gguf_bytes([key_value(b"k", ARRAY, array(ARRAY, count))]),
        "name": gguf_bytes(tensors=[length + bytes(32)]),
    }[place]
    file = Counting(data)
    with pytest.raises(ModelLoadError, match=str(count)):
        read_layout(file, len(data), "x.gguf")
    assert file.asked <= len(data)


class Zeros(io.RawIOBase):
    """A file of ``size`` bytes, zeros after its head, that exists nowhere."""

    def __init__(self, head: bytes, size: int) -> None:
        self.head, self.size, self.at, self.asked = head, size, 0, 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.at = offset + (self.at if whence == 1 else 0)
        return self.at

    def read(self, size: int = -1, /) -> bytes:
        self.asked += size
        assert self.asked < 100, "read on"
        data = self.head[self.at : self.at + size].ljust(size, b"\0")
        self.at += size
        return data


def test_a_header_has_a_limit_however_large_the_file_is() -> None:
    """A terabyte of announced strings or numbers is refused before the first is read."""
    for kind in (STRING, U64, ARRAY):
        head = gguf_bytes([key_value(b"k", ARRAY, array(kind, 1 << 36))])
        file: Any = Zeros(head, 1 << 41)
        with pytest.raises(ModelLoadError, match=str(MAX_HEADER_BYTES)):
            read_layout(file, file.size, "x.gguf")


def test_memory_does_not_grow_with_the_header() -> None:
    """A header of 480 KB with 20,000 tensors is read in a few KB."""
    tensors = [tensor(0, dimensions=(), name=b"")] * 20_000
    data = gguf_bytes(tensors=tensors)
    tracemalloc.start()
    try:
        file = io.BytesIO(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        read_layout(file, len(data), "x.gguf")
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000


def test_a_file_that_shrinks_under_the_reader_is_an_error(small: bytes) -> None:
    """Fewer bytes than the size promised are noticed, wherever they end."""
    padding = 31  # at most, between the tensor infos and the data
    for cut in range(parse(small).data_start - padding):
        file: BinaryIO = io.BytesIO(small[:cut])
        with pytest.raises(ModelLoadError):
            read_layout(file, len(small), "x.gguf")


# -------------------------------------------------------------------- fuzzing


def parse_or_refuse(data: bytes) -> GgufLayout | None:
    """Nothing but a ModelLoadError or a layout that lies within the file."""
    try:
        found = parse(data)
    except ModelLoadError:
        return None
    assert found.first_tensor_end <= len(data)
    if found.tensors:
        assert 24 <= found.data_start <= found.first_tensor_end
    return found


def test_every_truncation_is_refused_or_read_as_a_shorter_file(small: bytes) -> None:
    """Cut anywhere before the last tensor's data begins, a file is refused."""
    whole = parse(small)
    last = whole.data_start + 128 + 32  # after "one" of 120 bytes and "two" of 14
    for cut in range(len(small)):
        found = parse_or_refuse(small[:cut])
        assert (found is None) == (cut < last)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_survived(small: bytes, bit: int) -> None:
    """One wrong bit anywhere gives an error or a layout within the file."""
    for position in range(parse(small).data_start):
        damaged = bytearray(small)
        damaged[position] ^= 1 << bit
        parse_or_refuse(bytes(damaged))


def test_a_huge_number_anywhere_is_survived(small: bytes) -> None:
    """Eight bytes of any place as a huge count, length or offset."""
    for position in range(parse(small).data_start):
        for number in (0, *HUGE):
            parse_or_refuse(small[:position] + struct.pack("<Q", number) + small[position + 8 :])


def any_values() -> st.SearchStrategy[bytes]:
    counts = st.one_of(st.integers(0, 5), st.sampled_from(HUGE))
    kinds = st.integers(0, 14)
    arrays = st.builds(array, kinds, counts, st.binary(max_size=60))
    return st.one_of(st.binary(max_size=40), arrays, st.builds(text, st.binary(max_size=20)))


def any_files() -> st.SearchStrategy[bytes]:
    """Structured enough to get deep into the reader, wrong enough to matter."""
    return st.builds(
        gguf_bytes,
        st.lists(
            st.builds(
                key_value,
                st.one_of(st.just(ALIGNMENT), st.binary(max_size=20)),
                st.integers(0, 13),
                any_values(),
            ),
            max_size=4,
        ),
        st.lists(
            st.builds(
                tensor,
                st.one_of(st.integers(0, 6).map(lambda n: n * 32), st.sampled_from(HUGE)),
                dimensions=st.lists(st.integers(0, (1 << 64) - 1), max_size=6).map(tuple),
            ),
            max_size=4,
        ),
        st.binary(max_size=256),
        version=st.sampled_from([2, 3]),
    )


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(b"GGUF\3\0\0\0".__add__)))
def test_random_bytes_are_survived(data: bytes) -> None:
    """Bytes without any order, with and without a right beginning."""
    parse_or_refuse(data)


@given(any_files())
def test_random_files_are_survived(data: bytes) -> None:
    """Headers made of right parts with wrong values."""
    parse_or_refuse(data)


@pytest.mark.fuzz
@settings(max_examples=20_000)
@given(any_files())
def test_many_random_files_are_survived(data: bytes) -> None:
    """The same, for long."""
    parse_or_refuse(data)

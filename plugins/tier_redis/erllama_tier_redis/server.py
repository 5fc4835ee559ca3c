"""The connection: commands in, errors in one shape, and a rest for a server that is gone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from erllama_core.errors import TierError, TierFull
from erllama_tier_redis.options import RedisOptions

_T = TypeVar("_T")

_UNREACHABLE: Final = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)


class Server:
    """A server and its connections. Thread-safe. Raises TierError when it is made, for a password
    that cannot be read; the server itself is not asked for before the first command.

    After a command that got no answer, further ones fail at once for ``retry_s``: what has to
    wait for a server that is gone would only be computed later.
    """

    def __init__(self, options: RedisOptions) -> None:
        parts = urlsplit(options.url)
        self.place: Final = options.url.partition("?")[0].replace(
            f"{parts.username}@" if parts.username else "\0", ""
        )
        """The server for a person, without credentials."""
        self._retry_s: Final = options.retry_s
        self._rests_until = 0.0
        self._lock: Final = threading.Lock()
        self._closed = False
        self._client: Final[Any] = redis.Redis.from_url(
            options.url,
            username=options.username,
            password=_password(options),
            socket_timeout=options.timeout_s,
            socket_connect_timeout=options.timeout_s,
            # A command that was sent twice counts twice; the core asks again by itself.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    def script(self, code: str) -> Callable[..., Any]:
        """A Lua script as a function of ``keys`` and ``args``, to be called within :meth:`run`."""
        registered: Callable[..., Any] = self._client.register_script(code)
        return registered

    def run(self, what: str, commands: Callable[[Any], _T]) -> _T:
        """Run commands on the client. Raises TierError, TierFull.

        ``what`` completes "cannot …".
        """
        if self._closed:
            raise TierError(f"cannot {what}: the tier was closed")
        left_s = self._rests_until - time.monotonic()
        if left_s > 0:
            raise TierError(
                f"cannot {what}: {self.place} did not answer, and is asked again in {left_s:.1f} s"
            )
        with self._in_one_shape(what):
            return commands(self._client)

    @contextlib.contextmanager
    def _in_one_shape(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.AuthenticationError as error:
            raise TierError(
                f"cannot {what}: {self.place} refused the login ({error}); check username and "
                "password_file"
            ) from error
        except _UNREACHABLE as error:
            with self._lock:
                self._rests_until = time.monotonic() + self._retry_s
            raise TierError(
                f"cannot {what}: {self.place} cannot be reached ({error}); see that it runs and "
                "that url is right"
            ) from error
        except redis.exceptions.OutOfMemoryError as error:
            raise TierFull(
                f"cannot {what}: {self.place} has reached its maxmemory; raise it, or give the "
                "tier a quota_bytes below it"
            ) from error
        except redis.exceptions.RedisError as error:
            if "OOM" in str(error):  # from within a script
                raise TierFull(
                    f"cannot {what}: {self.place} has reached its maxmemory; raise it, or give "
                    "the tier a quota_bytes below it"
                ) from error
            raise TierError(f"cannot {what}: {self.place} answered {error}") from error

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            self._client.close()
            self._client.connection_pool.disconnect()


def _password(options: RedisOptions) -> str | None:
    if options.password_file is None:
        return None
    path = options.password_file.expanduser()
    try:
        return path.read_text("utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TierError(f"cannot read the password_file {path}: {error}") from error

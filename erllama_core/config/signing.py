"""The engine's signing key, from where the configuration says it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Final

from erllama_core.config.classes import EngineSettings
from erllama_core.errors import ConfigError, ConfigProblem
from erllama_core.signing import MIN_KEY_BYTES, SigningKey

_FILE: Final = "engine.thinking_signing_key_file"
_VARIABLE: Final = "engine.thinking_signing_key_env"
_MOST_BYTES: Final = 1 << 16
"""A file beyond it is no key, but something that was named by mistake; some have no end."""


def read_signing_key(
    settings: EngineSettings, environ: Mapping[str, str] | None = None
) -> SigningKey | None:
    """None when none is configured. Raises ConfigError, which does not show the key.

    A line end behind the key does not count, unless the key is too short without it.
    ``environ``: the process's own when None.
    """
    path, variable = settings.thinking_signing_key_file, settings.thinking_signing_key_env
    if path is not None:
        field = _FILE
        try:
            with path.expanduser().open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise _refused(field, f"{path}: {error.strerror or error}") from None
        if len(data) > _MOST_BYTES:
            raise _refused(field, f"{path}: more than {_MOST_BYTES} bytes, which is no key")
    elif variable is not None:
        field = _VARIABLE
        text = (os.environ if environ is None else environ).get(variable)
        if text is None:
            raise _refused(field, f"there is no environment variable {variable}")
        data = os.fsencode(text)
    else:
        return None
    stripped = data.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return SigningKey(stripped if len(stripped) >= MIN_KEY_BYTES else data)
    except ValueError as error:
        raise _refused(field, str(error)) from None


def signing_key_warnings(settings: EngineSettings) -> list[ConfigProblem]:
    """What is unwise about where the key is: a file that others may read or write."""
    path = settings.thinking_signing_key_file
    if path is None:
        return []
    try:
        status = path.expanduser().stat()
    except OSError:
        return []  # which reading it tells
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or not mode & 0o077:
        return []
    message = f"{path} can be used by others than its owner (mode {mode:04o}): chmod 600 {path}"
    return [ConfigProblem(_FILE, message)]


def _refused(field: str, message: str) -> ConfigError:
    return ConfigError([ConfigProblem(field, message)])

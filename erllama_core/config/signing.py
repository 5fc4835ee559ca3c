"""The engine's signing key, from where the configuration says it is."""

from __future__ import annotations

import os
from collections.abc import Mapping

from erllama_core.config.classes import EngineSettings
from erllama_core.errors import ConfigError, ConfigProblem
from erllama_core.signing import MIN_KEY_BYTES, SigningKey


def read_signing_key(
    settings: EngineSettings, environ: Mapping[str, str] | None = None
) -> SigningKey | None:
    """None when none is configured. Raises ConfigError, which does not show the key.

    A line end behind the key does not count, unless the key is too short without it.
    ``environ``: the process's own when None.
    """
    path, variable = settings.thinking_signing_key_file, settings.thinking_signing_key_env
    if path is not None:
        field = "engine.thinking_signing_key_file"
        try:
            data = path.expanduser().read_bytes()
        except OSError as error:
            raise _refused(field, f"{path}: {error.strerror or error}") from None
    elif variable is not None:
        field = "engine.thinking_signing_key_env"
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


def _refused(field: str, message: str) -> ConfigError:
    return ConfigError([ConfigProblem(field, message)])

"""The key that thinking is signed with, and signatures of it."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from erllama_core import Engine, load_config, verify_thinking
from erllama_core.config import check_config, read_signing_key
from erllama_core.config.classes import EngineSettings
from erllama_core.errors import ConfigError
from erllama_core.host import PluginHost
from erllama_core.signing import SigningKey

SECRET = b"not to be seen anywhere, at all!"


def test_a_signature_holds_for_its_thinking_alone() -> None:
    """Text or bytes verify with the key that signed them; anything else does not."""
    signature = hmac.new(SECRET, "hm, é".encode(), hashlib.sha256).digest()
    assert verify_thinking("hm, é", signature, SECRET)
    assert verify_thinking("hm, é".encode(), signature, SECRET)
    assert not verify_thinking("hm, e", signature, SECRET)
    assert not verify_thinking("hm, é", signature, SECRET[::-1])
    assert not verify_thinking("hm, é", b"", SECRET)
    assert not verify_thinking("", b"", SECRET)


def test_a_short_key_is_refused() -> None:
    """31 bytes are no key, also to verify with."""
    with pytest.raises(ValueError, match="32 bytes at least; this one has 31"):
        verify_thinking("x", b"", SECRET[1:])


def test_a_key_does_not_show() -> None:
    """Neither repr nor str of a key, or of what holds one, has a part of it."""
    key = SigningKey(SECRET)
    for text in (repr(key), str(key), repr([key]), repr(key.begin)):
        assert "seen" not in text


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (SECRET, SECRET),
        (SECRET + b"\n", SECRET),
        (SECRET + b"\r\n", SECRET),
        (SECRET + b"\n\n", SECRET + b"\n"),
        (SECRET[:31] + b"\n", SECRET[:31] + b"\n"),
    ],
)
def test_a_key_from_a_file(tmp_path: Path, content: bytes, key: bytes) -> None:
    """The file's bytes, without a line end that an editor put there."""
    file = tmp_path / "key"
    file.write_bytes(content)
    found = read_signing_key(EngineSettings(thinking_signing_key_file=file))
    assert found == SigningKey(key)


def test_a_key_from_the_environment() -> None:
    """The variable's text; none configured, no key."""
    settings = EngineSettings(thinking_signing_key_env="KEY")
    assert read_signing_key(settings, {"KEY": SECRET.decode()}) == SigningKey(SECRET)
    assert read_signing_key(EngineSettings(), {"KEY": SECRET.decode()}) is None


@pytest.mark.parametrize("content", [b"", b"too short", None])
def test_a_key_that_cannot_be_used(tmp_path: Path, content: bytes | None) -> None:
    """A missing or short key stops the engine and is told by the check; its text is not."""
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    config = load_config({"engine": {"thinking_signing_key_file": str(file)}}, environ={})
    with capture_logs() as logs, pytest.raises(ConfigError) as caught:
        Engine(config)
    (problem,) = caught.value.problems
    assert problem.path == "engine.thinking_signing_key_file"
    assert "too short" not in str(caught.value) + repr(logs)
    assert check_config(config, PluginHost(discover=False)) == [problem]


def test_a_variable_that_is_not_set() -> None:
    """The error names the variable."""
    with pytest.raises(ConfigError, match="no environment variable NO_SUCH_KEY"):
        read_signing_key(EngineSettings(thinking_signing_key_env="NO_SUCH_KEY"), {})

"""``erllama bench``, on a tiny real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from erllama_core.cli.app import app
from tiny_gguf import write_tiny_gguf


def test_it_tells_what_was_reused_and_how_long_it_took(tmp_path: Path) -> None:
    """Every scenario has its row, with the tokens that were not computed again."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    arguments = ["bench", "--model", str(path), "--tokens", "128,256", "--agents", "3"]
    result = CliRunner().invoke(app, [*arguments, "--repeat", "2", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    reused = {(one["scenario"], one["prompt_tokens"]): one["reused_tokens"] for one in figures}
    for n_tokens in (128, 256):
        assert reused["cold", n_tokens] == 0
        assert reused["exact", n_tokens] == reused["from disk", n_tokens] == n_tokens
        assert reused["longer", n_tokens + 12] >= n_tokens
    *_, alone, together = figures
    assert alone["scenario"] == "3 agents, one by one, no cache"
    assert alone["reused_tokens"] == 0
    assert together["reused_tokens"] >= 256
    for one in figures:
        assert 0 < one["least_s"] <= one["seconds"] <= one["most_s"]
        assert 0 < one["speed_up_least"] <= one["speed_up"] <= one["speed_up_most"]
        if one["scenario"] in {"cold", "3 agents, one by one, no cache"}:
            assert one["speed_up_least"] == one["speed_up_most"] == 1.0
    shown = CliRunner().invoke(app, [*arguments, "--repeat", "1"])
    assert shown.exit_code == 0
    assert "speed-up" in shown.output
    assert "1.0 to 1.0" in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "12"], "64 or more"),
        (["--tokens", "many"], "64 or more"),
        (["--agents", "1"], "--agents"),
        (["huge"], "'huge' is not"),
        (["tiny", "--model", __file__], "not both"),
        (["--model", "missing.gguf"], "missing.gguf"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], words: str) -> None:
    """Each is refused before anything is fetched or loaded."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert words in result.output

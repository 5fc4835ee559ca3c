"""The command line: output, exit codes, and that nothing is imported for nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from erllama_core.cli.app import LazyGroup, app
from erllama_core.errors import ErllamaError

GOOD = '[models.m]\nbackend = "no_such_module:thing"\n'


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The developer's environment stays out, and the log, which ``main`` configures, too."""
    for name in list(os.environ):
        if name.startswith("ERLLAMA_") and "__" in name:
            monkeypatch.delenv(name)
    with capture_logs():
        yield


def command(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, without the packages in ``blocked``."""
    code = (
        f"import sys; sys.argv = {['erllama', *arguments]!r}\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from erllama_core.cli import main; main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_version(runner: CliRunner) -> None:
    """--version tells the version of the installed distribution."""
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (
        0,
        f"erllama, version {version('erllama-core')}\n",
    )


def test_help_lists_the_commands(runner: CliRunner) -> None:
    """--help shows every command with a summary."""
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("plugins", "check"):
        assert f"\n  {name} " in result.output


def test_unknown_command(runner: CliRunner) -> None:
    """A command that does not exist is a usage error."""
    result = runner.invoke(app, ["chek"])
    assert result.exit_code == 2


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra(package: str) -> None:
    """Without click or rich the command says what to install, and fails."""
    done = command("plugins", blocked=(package,))
    assert done.returncode == 1
    assert f"needs {package}: pip install 'erllama-core[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------- plugins


def test_plugins_json_shape(runner: CliRunner) -> None:
    """The JSON is a list of objects with exactly these keys; other programs read it."""
    result = runner.invoke(app, ["plugins", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.output)
    for row in rows:
        assert list(row) == [
            "name",
            "kind",
            "distribution",
            "version",
            "state",
            "reason",
            "summary",
        ]
        assert row["state"] in {"ok", "unavailable", "failed", "blocked"}
        assert row["kind"] in {"backend", "tier", "pressure", "processor", None}
        assert (row["reason"] is None) == (row["state"] == "ok")
    (ram,) = (row for row in rows if row["name"] == "ram")
    assert (ram["kind"], ram["distribution"], ram["state"]) == ("tier", "erllama-core", "ok")


def test_plugins_loads_nothing_native() -> None:
    """Listing plugins imports neither a native library nor the other commands."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from erllama_core.cli.app import app\n"
        "assert CliRunner().invoke(app, ['plugins', '--json']).exit_code == 0\n"
        "heavy = {'erllama_core.cli.check', 'llama_cpp', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failed_plugin_is_shown_and_standard_output_stays_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken plugin is in the list, the log is on standard error, the exit code is 0."""
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('[bold]no luck')")
    info = tmp_path / "broken_dist-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-dist\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[erllama]\nbroken = broken_plugin\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = command("plugins", "--json")
    assert done.returncode == 0
    (row,) = (row for row in json.loads(done.stdout) if row["name"] == "broken")
    assert row["state"] == "failed"
    assert row["reason"] == "import: RuntimeError: [bold]no luck"
    assert "plugin.failed" in done.stderr
    table = command("plugins")
    assert table.returncode == 0
    assert "[bold]no luck" in table.stdout


def test_plugins_of_a_configuration(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --config, what the configuration blocks is shown as blocked."""
    info = tmp_path / "some_dist-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-dist\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[erllama]\nsomething = not_importable\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    file = tmp_path / "erllama.toml"
    file.write_text('[plugins]\nblock = ["some-dist"]\n')
    result = runner.invoke(app, ["plugins", "--json", "--config", str(file)])
    (row,) = (row for row in json.loads(result.stdout) if row["name"] == "something")
    assert (row["state"], row["reason"]) == ("blocked", "blocked by plugins.block")


# ------------------------------------------------------------------------- check


def test_check_ok(runner: CliRunner, tmp_path: Path) -> None:
    """A good file is ok, with exit code 0, and its warnings are shown."""
    file = tmp_path / "c.toml"
    file.write_text('[pressure]\nenabled = true\nsource = "noop"\nevict_tiers = "ram_file"\n')
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 0
    warning = (
        "pressure.evict_tiers: no configured tier is one of these (ram_file), so there is nothing "
        "to evict"
    )
    assert result.output.splitlines() == [f"{file}: warning: {warning}", f"{file}: ok"]


def test_check_tells_every_problem(runner: CliRunner, tmp_path: Path) -> None:
    """Every problem is a line, and the exit code is 1."""
    file = tmp_path / "c.toml"
    file.write_text("[cache]\nmin_tokenz = 1\nwriter_threads = 0\n[models.m]\ntier = 'x'\n")
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert f"{file}: cache.min_tokenz: unknown key (did you mean 'min_tokens'?)" in lines
    assert f"{file}: cache.writer_threads: 0 is too small; at least 1" in lines
    assert any(line.startswith(f"{file}: models.m.tier: no tier is named 'x'") for line in lines)


def test_check_json_shape(runner: CliRunner, tmp_path: Path) -> None:
    """The JSON report has these keys; other programs read it."""
    file = tmp_path / "c.toml"
    file.write_text('[caches]\n[plugins]\nallow = ["erllama-teir-disk"]\n')
    result = runner.invoke(app, ["check", str(file), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output) == {
        "file": str(file),
        "ok": False,
        "problems": [{"path": "caches", "message": "unknown key", "suggestion": "cache"}],
        "warnings": [
            {
                "path": "plugins.allow",
                "message": "no plugin and no distribution 'erllama-teir-disk' is installed",
                "suggestion": "erllama-tier-disk",
            }
        ],
    }


@pytest.mark.parametrize("text", [None, "[cache\n"])
def test_check_of_what_is_no_toml(runner: CliRunner, tmp_path: Path, text: str | None) -> None:
    """A missing or broken file is a problem like any other, in both forms of output."""
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_text(text)
    plain = runner.invoke(app, ["check", str(file)])
    assert plain.exit_code == 1
    assert plain.output.endswith("1 problem\n")
    report = json.loads(runner.invoke(app, ["check", str(file), "--json"]).output)
    assert (report["ok"], len(report["problems"])) == (False, 1)


# ------------------------------------------------------------------------ errors


def test_error_is_one_line(runner: CliRunner) -> None:
    """An ErllamaError of a command is its message on standard error, exit code 1."""
    group = LazyGroup("erllama", params=list(app.params), callback=app.callback)

    @group.command()
    def fails() -> None:
        raise ErllamaError("the model is not there; try another one")

    result = runner.invoke(group, ["fails"])
    assert result.exit_code == 1
    assert result.stderr == "erllama: the model is not there; try another one\n"
    assert result.stdout == ""
    result = runner.invoke(group, ["--debug", "fails"])
    assert isinstance(result.exception, ErllamaError)


def test_a_command_of_another_module(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lazily added command is imported when it is run, and no sooner."""
    (tmp_path / "late_command.py").write_text(
        "import click\n@click.command()\ndef late():\n    click.echo('here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    group = LazyGroup("erllama")
    group.add_lazy_command("late", "late_command:late")
    assert "late_command" not in sys.modules
    assert runner.invoke(group, ["late"]).output == "here\n"


def test_why_wants_text(tmp_path: Path) -> None:
    """A prompt that is not UTF-8 is refused with the file, the byte and the option."""
    config, prompt = tmp_path / "erllama.toml", tmp_path / "prompt.bin"
    config.write_text('[models.stub]\nbackend = "stub"\n')
    prompt.write_bytes(b"text \xff")
    arguments = ["--config", str(config), "--model", "stub", "--prompt-file", str(prompt)]
    result = CliRunner().invoke(app, ["why", *arguments])
    assert result.exit_code == 2
    assert "not UTF-8 at byte 5" in result.output
    assert "--prompt-file" in result.output

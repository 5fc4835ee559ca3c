"""The command line on files of anybody's: an exit code and a message, never a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from structlog.testing import capture_logs
from target import Run, Target
from targets_store import MAGIC, in_memory, made_stores, write_root

_CONFIG = """
[[tiers]]
name = "disk"
kind = "disk"
root = {root!r}
[models.stub]
backend = "stub"
tier = ["disk"]
context_opts = {{ n_ctx = 256 }}
"""


@contextmanager
def _command() -> Iterator[Run]:
    from click.testing import CliRunner

    from erllama_core.cli.app import app

    folder = in_memory()
    root = folder / "root"
    good, bad, prompt = folder / "good.toml", folder / "bad.toml", folder / "prompt.txt"
    good.write_text(_CONFIG.format(root=str(root)))
    commands = (
        *(["cache", "ls", "--root", str(root)], ["cache", "stats", "--root", str(root)]),
        *(["cache", "verify", "--root", str(root)], ["cache", "ls", "--json", "--root", str(root)]),
        ["cache", "verify", "--delete", "--json", "--root", str(root)],
        *(["check", str(bad)], ["check", "--json", str(bad)]),
        ["cache", "stats", "--config", str(bad)],
        ["why", "--config", str(good), "--model", "stub", "--prompt-file", str(prompt)],
        ["run", "--config", str(good)],
    )

    def run(data: bytes) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        arguments = commands[(data[:1] or b"\0")[0] % len(commands)]
        write_root(root, data[1:])
        bad.write_bytes(data[1:])
        prompt.write_bytes(data[1:])
        stray = root / "objects" / "ab"
        stray.mkdir(parents=True, exist_ok=True)
        name = data[1:].partition(MAGIC)[0][:40].replace(b"/", b"").replace(b"\0", b"")
        if name not in {b"", b".", b".."}:
            (stray / name.decode("utf-8", "surrogateescape")).touch()
        with capture_logs():
            result = CliRunner().invoke(app, arguments, input=data[1:])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in {0, 1, 2}, result.exit_code

    try:
        yield run
    finally:
        shutil.rmtree(folder)


def _made() -> dict[str, bytes]:
    stores = made_stores()
    return {
        f"{number}-{name}": bytes([number]) + data
        for number in range(5)
        for name, data in stores.items()
    }


TARGETS = (
    Target(
        name="command",
        open=_command,
        made=_made,
        words=(MAGIC, b"\xff", b"\x1b", b"[[tiers]]\n", b"/stats\n", b"/help\n", b"/set "),
        seconds=20.0,
        base_bytes=64 << 20,
        needs=("click", "rich"),
        quick_runs=25,
    ),
)

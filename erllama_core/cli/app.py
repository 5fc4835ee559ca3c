"""The group of all commands. Each command's module is imported when the command is run."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any, Final

import click

from erllama_core.errors import ErllamaError


class LazyGroup(click.Group):
    """A group whose commands are imported at their first use.

    So ``erllama plugins`` imports no engine. An ErllamaError ends the program with its message
    and exit code 1; ``--debug`` lets the traceback through.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy: dict[str, str] = {}

    def add_lazy_command(self, name: str, reference: str) -> None:
        """Add the command at ``"package.module:attribute"``."""
        self._lazy[name] = reference

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        reference = self._lazy.get(cmd_name)
        if reference is None:
            return super().get_command(ctx, cmd_name)
        module_name, _, attribute = reference.partition(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ErllamaError as error:
            if ctx.params.get("debug"):
                raise
            raise _Refused(str(error)) from error


class _Refused(click.ClickException):
    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo(f"erllama: {self.format_message()}", err=file is None, file=file)


_COMMANDS: Final = {
    "bench": "erllama_core.cli.bench:bench",
    "cache": "erllama_core.cli.cache:cache",
    "check": "erllama_core.cli.check:check",
    "demo": "erllama_core.cli.demo:demo",
    "new-plugin": "erllama_core.cli.new_plugin:new_plugin",
    "plugins": "erllama_core.cli.plugins:plugins",
    "run": "erllama_core.cli.run:run",
    "why": "erllama_core.cli.why:why",
}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="erllama-core", prog_name="erllama")
def app(debug: bool) -> None:
    """Run GGUF models and never compute the same prompt prefix twice."""
    del debug  # read by LazyGroup.invoke
    # The names of files and variables need not be text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


assert isinstance(app, LazyGroup)
for _name, _reference in _COMMANDS.items():
    app.add_lazy_command(_name, _reference)

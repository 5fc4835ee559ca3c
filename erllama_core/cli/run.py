"""``erllama run``: a service from a file, and a prompt to talk to its models."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from erllama_core.cli.console import Console, tell
from erllama_core.cli.conversation import Conversation
from erllama_core.cli.run_commands import Commands, Leave, reply_remark
from erllama_core.cli.signals import INTERRUPTED, TERMINATED, Signals
from erllama_core.config import read_config
from erllama_core.config.environment import parse_value
from erllama_core.engine import Engine
from erllama_core.errors import (
    ConfigError,
    ConfigProblem,
    ErllamaError,
    ModelNotFound,
    PromptTooLong,
    unknown_name,
)
from erllama_core.interfaces.stream import (
    Done,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCallDelta,
)
from erllama_core.logs import configure_logging
from erllama_core.results import Stats

_REFUSALS = (ErllamaError, TypeError, ValueError)
"""What a prompt or a command can be refused with; the last two for options."""


@click.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="The configuration of the service.",
)
@click.option("--model", "model_id", metavar="ID", help="The model to talk to; the file's first.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A request option, such as temperature=0.7. May be repeated.",
)
def run(
    config_file: Path, model_id: str | None, system: str | None, settings: tuple[str, ...]
) -> None:
    """Open the service of a configuration, and talk to its models.

    On a terminal: type prompts, /help for commands; Ctrl-C ends a reply, Ctrl-D leaves. From a
    pipe or a file: each line is a prompt or a command, and replies are printed one after another;
    the exit code is 1 when one of them was refused. SIGHUP reloads the configuration.
    """
    loaded = read_config(config_file)
    configure_logging(loaded.config.logging)
    console = Console(interactive=sys.stdin.isatty())
    with Engine.from_config(config_file) as engine:
        chosen = _chosen_model(engine, config_file, model_id)
        conversation = Conversation(engine, chosen, system=system)
        for setting in settings:
            _apply_setting(conversation, setting)
        shell = _Shell(engine, conversation, console)
        status = shell.serve()
    sys.exit(status)


def _chosen_model(engine: Engine, config_file: Path, model_id: str | None) -> str:
    names = [info.id for info in engine.models()]
    if not names:
        problem = ConfigProblem("models", "there is none to talk to: add a [models.<id>] table")
        raise ConfigError([problem], str(config_file))
    if model_id is None:
        return names[0]
    if model_id not in names:
        raise ModelNotFound(f"{config_file}: {unknown_name('model', model_id, names)}")
    return model_id


def _apply_setting(conversation: Conversation, setting: str) -> None:
    name, equals, value = setting.partition("=")
    try:
        if not equals:
            raise ValueError(f"{setting!r}: NAME=VALUE is needed")
        conversation.set_option(name.strip(), parse_value(value.strip()))
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--set") from error


class _Shell:
    """Reads lines, and does what they say."""

    def __init__(self, engine: Engine, conversation: Conversation, console: Console) -> None:
        self._engine = engine
        self._conversation = conversation
        self._console = console
        self._commands = Commands(engine, conversation, console)
        self._signals = Signals(self._reload)
        self._refused = False

    def serve(self) -> int:
        """Until the end of input; the exit code."""
        self._console.remark(
            f"talking to {self._conversation.model_id!r}; /help lists the commands"
        )
        with self._signals.installed(), contextlib.suppress(Leave):
            while True:
                try:
                    line = self._read()
                    if line is None:
                        break
                    self._do(line)
                except KeyboardInterrupt:
                    self._console.end_reply()
                    if not self._console.interactive:
                        return INTERRUPTED
                    self._console.remark("Ctrl-D or /quit leaves")
                if self._signals.terminated:
                    return TERMINATED
        return 1 if self._refused and not self._console.interactive else 0

    def _read(self) -> str | None:
        """The next line; None at the end of input."""
        if not self._console.interactive:
            line = sys.stdin.readline()
            return line or None
        return self._console.ask(f"{self._conversation.model_id}> ")

    def _do(self, line: str) -> None:
        text = line.strip()
        if not text:
            return
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._commands.run(text)
            else:
                self._converse(text.removeprefix("/") if text.startswith("//") else text)
        except PromptTooLong as error:
            self._refuse(f"{error} /reset forgets the conversation.")
        except _REFUSALS as error:
            self._refuse(str(error))

    def _refuse(self, text: str) -> None:
        self._refused = True
        self._console.end_reply()
        self._console.complain(text)

    # ----------------------------------------------------------------- replies

    def _converse(self, text: str) -> None:
        """Ask, and show the reply as it comes."""
        with self._signals.replying():
            try:
                stats = self._reply_to(text)
            except KeyboardInterrupt:
                self._conversation.abandoned()
                raise
        self._console.end_reply()
        if self._signals.interrupted and not self._signals.terminated:
            if not self._console.interactive:
                raise KeyboardInterrupt
            self._console.remark("[cancelled]")
        else:
            self._console.remark(reply_remark(stats))

    def _reply_to(self, text: str) -> Stats:
        said: list[str] = []
        with self._conversation.ask(text) as stream:
            self._signals.watch(stream)
            for event in stream:
                if isinstance(event, TextDelta):
                    said.append(event.text)
                    self._console.reply(event.text)
                elif isinstance(event, ToolCallDelta):
                    self._console.reply(event.data.decode("utf-8", "replace"))
                elif isinstance(event, ThinkingDelta):
                    self._console.aside(event.text)
                elif isinstance(event, ThinkingEnd):
                    self._console.aside("\n")
                elif isinstance(event, Done):
                    self._conversation.answered(text, "".join(said), event.stats)
                    return event.stats
        raise AssertionError("a stream ends with Done or with an error")

    def _reload(self) -> None:
        """On SIGHUP, on a thread of its own."""
        try:
            done = self._engine.reload()
        except (ErllamaError, ValueError, OSError) as error:
            tell(f"not reloaded, nothing has changed: {error}")
        else:
            tell(f"reloaded: {'; '.join(str(done).splitlines())}")

"""The commands at the prompt of ``erllama run``: lines that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import attrs

from erllama_core.cache.budget import in_words
from erllama_core.cli.cache_tables import count
from erllama_core.cli.console import Console
from erllama_core.cli.conversation import SETTABLE, Conversation
from erllama_core.cli.explained import explanation_lines
from erllama_core.config.environment import parse_value
from erllama_core.engine import Engine
from erllama_core.errors import ErllamaError, nearest
from erllama_core.model.options import RequestOptions
from erllama_core.pressure.status import PressureStatus
from erllama_core.results import ModelInfo, Stats


class Leave(Exception):
    """The person wants to go."""


class NoSuchCommand(ErllamaError):
    """A line begins with a slash, and with nothing that is known."""


@attrs.frozen
class _Command:
    argument: str
    """What is told of its argument; empty for none."""
    summary: str
    run: Callable[[Commands, str], Iterable[str]]


class Commands:
    """Carries them out. For one thread."""

    def __init__(self, engine: Engine, conversation: Conversation, console: Console) -> None:
        self._engine: Final = engine
        self._conversation: Final = conversation
        self._console: Final = console

    def run(self, line: str) -> None:
        """Carry out a line that begins with a slash.

        Raises Leave, ErllamaError, TypeError and ValueError for what cannot be done.
        """
        name, _, argument = line.removeprefix("/").partition(" ")
        command = _COMMANDS.get(_ALIASES.get(name, name))
        if command is None:
            guess = nearest(name, [*_COMMANDS, *_ALIASES])
            hint = f"did you mean /{guess}?" if guess else "/help lists the commands"
            raise NoSuchCommand(
                f"unknown command /{name}; {hint} (a prompt that begins with a slash: //...)"
            )
        for text in command.run(self, argument.strip()):
            self._console.line(text)

    # -------------------------------------------------------------------- talk

    def help(self, _: str) -> Iterator[str]:
        shown = {name: f"/{name} {command.argument}".strip() for name, command in _COMMANDS.items()}
        width = max(map(len, shown.values()))
        for name, command in _COMMANDS.items():
            yield f"{shown[name]:<{width}}  {command.summary}"
        yield "Ctrl-C ends a reply, Ctrl-D leaves. A prompt that begins with a slash: //..."

    def leave(self, _: str) -> list[str]:
        raise Leave

    def reset(self, _: str) -> Iterator[str]:
        self._conversation.reset()
        yield "the conversation begins anew"

    def system(self, text: str) -> Iterator[str]:
        self._conversation.system = text or None
        yield "the system prompt is set" if text else "there is no system prompt"

    def set(self, argument: str) -> Iterator[str]:
        name, _, value = argument.replace("=", " ", 1).partition(" ")
        if name:
            self._conversation.set_option(name, _option_value(value.strip()))
        options = RequestOptions.of(self._conversation.request_options())
        for shown in [name] if name else SETTABLE:
            yield f"{shown} = {_shown(getattr(options, shown))}"

    # ------------------------------------------------------------------- models

    def models(self, _: str) -> Iterator[str]:
        loaded = {info.id: info for info in self._engine.models()}
        for name in sorted({*loaded, *self._engine.config.models}):
            mark = "*" if name == self._conversation.model_id else " "
            yield f"{mark} {name}: {_model(loaded[name]) if name in loaded else 'not loaded'}"

    def model(self, name: str) -> Iterator[str]:
        if name:
            self._conversation.use_model(name)
        yield f"model {self._conversation.model_id}"

    def reload(self, _: str) -> Iterator[str]:
        yield str(self._engine.reload())

    # ------------------------------------------------------------------- cache

    def why(self, text: str) -> Iterator[str]:
        if text:
            explanation = self._conversation.why(text)
        else:
            last = self._conversation.last
            if last is None or last.explain is None:
                yield "nothing was asked yet; /why TEXT tells what that would reuse"
                return
            explanation = last.explain
        yield f"{explanation.kind}, {explanation.reused_tokens} tokens reused"
        for line in explanation_lines(explanation):
            yield f"  {line}"

    def stats(self, _: str) -> Iterator[str]:
        last = self._conversation.last
        if last is not None:
            yield from _last_reply(last)
        for info in self._engine.models():
            yield f"model {info.id}: {_model(info)}"
        counters = self._engine.cache.counters()
        saves = (
            counters.saves_cold
            + counters.saves_continued
            + counters.saves_finish
            + counters.saves_evict
            + counters.saves_shutdown
        )
        yield (
            f"cache: {count(counters.hits_exact, 'exact hit')}, "
            f"{counters.hits_longest_prefix + counters.hits_resume} partial, "
            f"{counters.misses} missed; {count(saves, 'object')} saved, "
            f"{counters.saves_dropped} dropped, {counters.evictions} evicted"
        )
        for usage in self._engine.cache.usage():
            of = "" if usage.quota_bytes is None else f" of {in_words(usage.quota_bytes)}"
            yield f"tier {usage.tier}: {in_words(usage.used_bytes)}{of}"
        memory = self._engine.cache.memory()
        if memory.budget_bytes is not None:
            budget = in_words(memory.budget_bytes)
            yield f"memory budget: {in_words(memory.used_bytes)} of {budget}"
        yield _pressure(self._engine.pressure.status())


def _pressure(status: PressureStatus) -> str:
    if not status.enabled:
        return "pressure: not watched"
    top = status.tightest
    now = "no reading yet" if top is None else f"{top.resource} {top.usage:.0%}"
    freed = f"given back {count(status.releases, 'time')}, {in_words(status.freed_bytes)}"
    return f"pressure: {now}, {freed}"


def _last_reply(stats: Stats) -> Iterator[str]:
    yield (
        f"last reply: {count(stats.prompt_tokens, 'prompt token')}, {stats.completion_tokens} "
        f"generated, ended by {stats.finish_reason}"
    )
    yield (
        f"  {stats.cache_hit_kind}: {stats.cache_delta.read} tokens reused, "
        f"{in_words(stats.restored_bytes)} restored; {stats.cache_delta.created} tokens saved"
    )
    first = "never" if stats.first_token_s is None else f"{stats.first_token_s:.3f} s"
    yield (
        f"  first token {first}: queue {stats.queue_s:.3f}, restore {stats.restore_s:.3f}, "
        f"prompt {stats.prefill_s:.3f}; reply {stats.decode_s:.3f} s{_speed(stats)}"
    )


def reply_remark(stats: Stats) -> str:
    """How a reply went, in a line."""
    reused = f"{stats.cache_delta.read} of {stats.prompt_tokens} prompt tokens reused"
    first = "" if stats.first_token_s is None else f", first token {stats.first_token_s:.3f} s"
    return f"[{stats.cache_hit_kind}: {reused}{first}{_speed(stats)}]"


def _speed(stats: Stats) -> str:
    if stats.completion_tokens < 2 or stats.decode_s <= 0.0:
        return ""
    return f", {(stats.completion_tokens - 1) / stats.decode_s:.0f} tokens/s"


def _model(info: ModelInfo) -> str:
    return (
        f"{info.description} ({info.backend}), {info.status}, context {info.context_size}, "
        f"{info.available_seqs} of {info.n_seq_max} sequences free, "
        f"prompts {info.prefill_tokens_per_s:.0f} tokens/s, "
        f"replies {info.decode_tokens_per_s:.0f}"
    )


def _shown(value: object) -> str:
    """An option's value as it could be typed."""
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _option_value(text: str) -> object:
    return None if text in {"", "none"} else parse_value(text)


_COMMANDS: Final = {
    "help": _Command("", "show this", Commands.help),
    "stats": _Command("", "the last reply, the models, the cache", Commands.stats),
    "why": _Command("[TEXT]", "what the last prompt, or this one, reuses", Commands.why),
    "models": _Command("", "the models, and what they are doing", Commands.models),
    "model": _Command("[ID]", "go on with another model", Commands.model),
    "system": _Command(
        "[TEXT]", "set the system prompt; without TEXT there is none", Commands.system
    ),
    "set": _Command("[NAME VALUE]", "show or set request options", Commands.set),
    "reset": _Command("", "forget the conversation", Commands.reset),
    "reload": _Command("", "read the configuration again", Commands.reload),
    "quit": _Command("", "leave", Commands.leave),
}
_ALIASES: Final = {"?": "help", "exit": "quit", "bye": "quit", "clear": "reset"}

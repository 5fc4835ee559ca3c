"""A conversation with a model of an engine: its turns, its options, its session."""

from __future__ import annotations

import itertools
import os
from typing import Any, Final, cast

from erllama_core.engine import Engine
from erllama_core.errors import unknown_name
from erllama_core.model.options import RequestKwargs, RequestOptions
from erllama_core.prompt import Prompt
from erllama_core.results import Explanation, Stats
from erllama_core.stream.stream import Stream

SETTABLE: Final = (
    "response_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop_sequences",
    "thinking",
    "thinking_budget_tokens",
    "cache_salt",
    "timeout_s",
)
"""Request options that a person at the prompt may want to change."""


class Conversation:
    """Turns with one model at a time. For one thread.

    The whole of it is rendered anew for every turn; what was computed before is reused.
    """

    def __init__(self, engine: Engine, model_id: str, *, system: str | None = None) -> None:
        self._engine: Final = engine
        self.model_id = model_id
        self.system = system
        self.turns: list[dict[str, str]] = []
        """What was said, alternately by the user and by the model."""
        self.last: Stats | None = None
        """How the last reply went."""
        self._chosen: dict[str, Any] = {}
        self._sessions: Final = itertools.count(1)
        self._session = self._new_session()

    # ----------------------------------------------------------------- talking

    def render(self, text: str) -> Prompt:
        """The conversation with one more turn of the user's. Raises TemplateError and the like."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*opening, *self.turns, {"role": "user", "content": text}]
        return self._engine.apply_chat_template(self.model_id, messages)

    def ask(self, text: str) -> Stream:
        """Start a reply; :meth:`answered` takes it into the conversation."""
        options = self.request_options()
        options["explain"] = True
        options["session_id"] = self._session
        return self._engine.infer(self.model_id, self.render(text), **options)

    def answered(self, text: str, reply: str, stats: Stats) -> None:
        """A turn has ended. One that was cancelled before anything was said never was."""
        self.last = stats
        if reply or not stats.cancelled:
            self.turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": reply},
            ]

    def abandoned(self) -> None:
        """A reply is not waited for any more; its session may be busy for a while."""
        self._end_session()

    def why(self, text: str) -> Explanation:
        """What a next turn with this text would reuse now."""
        return self._engine.why(
            self.model_id, self.render(text), cache_salt=self._chosen.get("cache_salt")
        )

    # ---------------------------------------------------------------- changing

    def request_options(self) -> RequestKwargs:
        """Options of the next request. Thinking is told apart where the model marks it."""
        configured = self._engine.config.models.get(self.model_id)
        marks = configured is not None and configured.thinking_markers is not None
        options: dict[str, Any] = {"thinking": marks, **self._chosen}
        return cast("RequestKwargs", options)  # each of them was checked

    def set_option(self, name: str, value: Any) -> None:
        """Choose an option for all later requests. Raises TypeError, ValueError."""
        if name not in SETTABLE:
            raise TypeError(unknown_name("option", name, SETTABLE))
        given: dict[str, Any] = {name: value}
        RequestOptions.of(cast("RequestKwargs", given))
        self._chosen[name] = value

    def use_model(self, model_id: str) -> None:
        """Go on with another model, from the same turns. Raises ModelNotFound."""
        self._engine.model(model_id)
        self._end_session()
        self.model_id = model_id

    def reset(self) -> None:
        """Forget the turns, but not the system prompt."""
        self._end_session()
        self.turns.clear()
        self.last = None

    def _end_session(self) -> None:
        self._engine.end_session(self.model_id, self._session)
        self._session = self._new_session()

    def _new_session(self) -> str:
        return f"erllama-run-{os.getpid()}-{next(self._sessions)}"

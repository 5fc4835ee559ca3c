"""What is asked: prompts of exact lengths, and conversations as a chat template renders them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from serving_load import Prompts

from compare.words import Question
from erllama_core import Engine, load_config

Message = dict[str, Any]


class Texts:
    """Tokenises and renders for everybody alike, with the vocabulary of the model's file."""

    def __init__(self, path: Path) -> None:
        self._engine = Engine(load_config({}, environ={}))
        self._model = self._engine.load_model(
            "texts", backend="llama", model_path=str(path), tier=[], context_opts={"n_ctx": 256}
        )
        self.prompts: Final = Prompts(self._model.tokenize)

    def render(self, messages: Sequence[Message], reply_tokens: int) -> Question:
        """A conversation in full, up to where the next reply begins."""
        prompt = self._model.apply_chat_template(list(messages))
        return Question(
            tokens=tuple(prompt),
            reply_tokens=reply_tokens,
            text=prompt.text,
            opening_tokens=prompt.opening_tokens,
        )

    def with_reply(self, question: Question, reply: str) -> tuple[int, ...]:
        """The tokens of a rendered conversation, and of the reply as it stands in a later one."""
        text = (question.text or "") + reply
        return tuple(self._model.tokenize(text, add_bos=False))

    def close(self) -> None:
        """Free the vocabulary."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

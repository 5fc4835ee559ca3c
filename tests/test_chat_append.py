"""Templates that say earlier turns differently later: they are noticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from structlog.testing import capture_logs

from erllama_core import Engine, Model
from erllama_core.model import chat_append
from stub_engine import make_engine
from test_replay import TEMPLATE as DROPS_THINKING

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The turn after the last question keeps what was thought; earlier ones lose it.
LAST_KEEPS = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}",
)
TOOLS_AT_LAST = CHATML.replace(
    "{{ m.content }}",
    "{% if m is eq((messages | selectattr('role', 'eq', 'user') | list)[-1]) %}TOOLS {% endif %}"
    "{{ m.content }}",
)
COUNTS = "{{ messages | length }}" + CHATML
OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def model_with(engine: Engine, template: str) -> Model:
    return engine.load_model(backend="stub", chat_template=template)


def chat(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def warnings(model: Model, *chats: list[dict[str, Any]], **variables: Any) -> list[dict[str, Any]]:
    with capture_logs() as logs:
        for messages in chats:
            model.apply_chat_template(messages, **variables)
    return [dict(entry) for entry in logs if entry["event"] == "chat.not_append_only"]


TURNS = [
    chat("one?"),
    chat("one?", "<think>hm</think>1.", "two?"),
    chat("one?", "<think>hm</think>1.", "two?", "<think>so</think>2.", "three?"),
]


@pytest.mark.parametrize(
    ("template", "message"),
    [(LAST_KEEPS, 1), (TOOLS_AT_LAST, 0), (COUNTS, 0), (OPENS, 1)],
)
def test_a_rewritten_turn_is_told_of_once(engine: Engine, template: str, message: int) -> None:
    """A warning names the model, the first message that is said differently, and what to do."""
    model = model_with(engine, template)
    found = warnings(model, *TURNS, *TURNS)
    (warning,) = found
    assert (warning["model"], warning["message"]) == (model.id, message)
    assert warning["log_level"] == "warning"
    assert "put_replay" in warning["advice"]
    assert not any("one?" in str(value) or "hm" in str(value) for value in warning.values())
    # Another model is told of by itself.
    assert len(warnings(model_with(engine, template), *TURNS)) == 1


@pytest.mark.parametrize(
    "template", [CHATML, CHATML + "{{ '' if add_generation_prompt else '<|eos|>' }}"]
)
def test_templates_that_append_are_not(engine: Engine, template: str) -> None:
    """Neither one that only appends, nor one that ends every chat in the same way."""
    assert warnings(model_with(engine, template), *TURNS) == []


def test_dropping_from_all_turns_is_append_only(engine: Engine) -> None:
    """A template that never shows thinking says a turn the same now and later."""
    assert warnings(model_with(engine, DROPS_THINKING), *TURNS) == []


def test_a_shape_is_looked_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat like one before costs no second rendering; one with thinking is another shape, and
    a chat of one question none at all.
    """
    looked: list[int] = []
    real = chat_append._difference

    def counted(*args: Any) -> Any:
        looked.append(len(args[0]))
        return real(*args)

    monkeypatch.setattr(chat_append, "_difference", counted)
    model = model_with(engine, CHATML)
    assert warnings(model, chat("a"), chat("a", "b", "c"), chat("x", "y", "z")) == []
    assert looked == [3]
    assert warnings(model, TURNS[1], TURNS[1], chat("a", "b", "c")) == []
    assert looked == [3, 3]
    assert warnings(model, chat("a", "b", "c"), enable_thinking=True) == []
    assert len(looked) == 3
    for number in range(200):  # shapes without end are not looked at without end
        warnings(model, [{**message, f"k{number}": 1} for message in chat("a", "b", "c")])
    assert len(looked) == chat_append._MAX_SHAPES
    assert len(model._append_only._seen) == chat_append._MAX_SHAPES


def test_a_template_that_refuses_a_part_of_a_chat(engine: Engine) -> None:
    """What cannot be rendered alone is not compared, and the chat itself is unharmed."""
    template = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    model = model_with(engine, template + COUNTS.replace("{{ messages | length }}", ""))
    assert warnings(model, *TURNS) == []


def test_turns_that_are_replayed_are_not_compared(engine: Engine) -> None:
    """Where the model's turns are kept, it does not matter how the template would say them."""
    model = model_with(engine, LAST_KEEPS)
    done = model.complete(model.apply_chat_template(chat("one?")), response_tokens=5)
    model.put_replay("1", done)
    said = {"role": "assistant", "replay": "1"}
    assert warnings(model, [*chat("one?"), said, *chat("two?")]) == []


def test_many_threads_warn_once(engine: Engine) -> None:
    """Chats that are rendered at the same time are told of once."""
    model = model_with(engine, LAST_KEEPS)
    barrier = threading.Barrier(8, timeout=30)
    chats = [[{**message, f"k{n}": 1} for message in TURNS[1]] for n in range(8)]

    def render(messages: list[dict[str, Any]]) -> None:
        barrier.wait()
        model.apply_chat_template(messages)

    with capture_logs() as logs, ThreadPoolExecutor(8) as pool:
        list(pool.map(render, chats))
    assert [entry["event"] for entry in logs] == ["chat.not_append_only"]

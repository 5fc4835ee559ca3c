"""Conversations that are sent in full with every request, as clients without a memory do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from compare.contestants import Contestant, field
from compare.samples import Sample, Samples
from compare.sizes import Sizes
from compare.texts import Message, Texts
from compare.words import common_tokens

CHAT: Final = "chat"
AGENT: Final = "agent"
TITLES: Final = {
    CHAT: "Chat of ten turns, sent in full each turn",
    AGENT: "Agent loop, a late tool result inserted into its history",
}
STEPS: Final = (
    "the task",
    "a tool's result",
    "another result",
    "a third result",
    "a late result, inserted behind the first",
    "one more result",
    "as if that had not been inserted",
)
"""Of the agent loop."""

_Known = dict[str, list[tuple[int, ...]]]
"""The contexts that each contestant has had, of other conversations too: they begin alike."""

_SUBJECTS: Final = (
    "harbour",
    "lighthouse",
    "ferry",
    "market",
    "school",
    "mill",
    "bridge",
    "chapel",
)


def measure(
    path: Path,
    names: Sequence[str],
    scenarios: Collection[str],
    rounds: int,
    sizes: Sizes,
    samples: Samples,
    threads: int,
) -> None:
    """So many rounds of each conversation, added to ``samples``."""
    first = samples.rounds
    with (
        Texts(path) as texts,
        field(path, names, n_ctx=sizes.talk_ctx, threads=threads) as everybody,
    ):
        known: _Known = {}
        for number in range(first, first + rounds):
            turn = _Turn(texts, scenarios, number, sizes, known)
            everybody.each(number, turn)
            samples.add(turn.samples, everybody.absent)


class _Turn:
    """The conversations that each of them holds in a round."""

    def __init__(
        self,
        texts: Texts,
        scenarios: Collection[str],
        number: int,
        sizes: Sizes,
        known: _Known,
    ) -> None:
        self._texts = texts
        self._scenarios = [name for name in TITLES if name in scenarios]
        self._number = number
        self._sizes = sizes
        self._known = known
        self.samples: list[Sample] = []

    def __call__(self, contestant: Contestant) -> None:
        known = self._known.setdefault(contestant.kind.name, [])
        for scenario in self._scenarios:
            talk = _Talk(contestant, self._texts, scenario, self._number, self._sizes, known)
            if scenario == CHAT:
                _chat(talk)
            else:
                _agent(talk)
            self.samples += talk.samples


class _Talk:
    """One conversation with one contestant, whose own replies are its history."""

    def __init__(
        self,
        contestant: Contestant,
        texts: Texts,
        scenario: str,
        number: int,
        sizes: Sizes,
        contexts: list[tuple[int, ...]],
    ) -> None:
        self._contestant = contestant
        self._texts = texts
        self._scenario = scenario
        self._contexts = contexts
        self.number: Final = number
        self.sizes: Final = sizes
        self.samples: list[Sample] = []

    def ask(self, messages: Sequence[Message]) -> Message:
        """Send all of it; the reply, as a message."""
        question = self._texts.render(messages, self.sizes.turn_reply_tokens)
        known = max((common_tokens(one, question.tokens) for one in self._contexts), default=0)
        answer = self._contestant.answer(question)
        self._contexts.append(self._texts.with_reply(question, answer.reply))
        self.samples.append(
            Sample(
                scenario=self._scenario,
                size=len(self.samples) + 1,
                round=self.number,
                who=self._contestant.kind.name,
                first_token_s=answer.first_token_s,
                computed_tokens=answer.computed_tokens,
                new_tokens=len(question.tokens) - known,
            )
        )
        return {"role": "assistant", "content": answer.reply}


def _chat(talk: _Talk) -> None:
    facts = " ".join(_fact(talk.number, line) for line in range(16))
    messages: list[Message] = [
        {"role": "system", "content": f"Visit {talk.number}. You know this town. {facts}"}
    ]
    for turn in range(talk.sizes.turns):
        subject = _SUBJECTS[turn % len(_SUBJECTS)]
        question = (
            f"Question {turn + 1}. I walked past the {subject} this morning and wondered how it "
            f"came to be there. Who paid for the {subject}, and what did people say about it?"
        )
        messages.append({"role": "user", "content": question})
        messages.append(talk.ask(messages))


def _agent(talk: _Talk) -> None:
    tools = " ".join(
        f"Tool {subject}(year, detail): returns what the archive has on the {subject}."
        for subject in _SUBJECTS
    )
    history: list[Message] = [
        {"role": "system", "content": f"Case {talk.number}. You may call tools. {tools}"},
        {"role": "user", "content": "Find out when each building was finished, and compare."},
    ]
    history.append(talk.ask(history))
    for number in range(3):
        history.append(_result(talk.number, number))
        history.append(talk.ask(history))
    # Behind the task's reply and the first result; what came later moves back.
    late = [*history[:4], _result(talk.number, 3), *history[4:]]
    reply = talk.ask(late)
    talk.ask([*late, reply, _result(talk.number, 4)])
    talk.ask([*history, _result(talk.number, 5)])


def _result(talk: int, number: int) -> Message:
    """About a hundred tokens."""
    lines = "\n".join(_fact(talk, 100 * number + line) for line in range(5))
    return {"role": "tool", "content": f"{_SUBJECTS[number]}:\n{lines}"}


def _fact(talk: int, number: int) -> str:
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    year = 1700 + (37 * number + 11 * talk) % 220
    return f"In {year} the {subject} was rebuilt for {90 + 7 * number} pounds."

"""One request at a time: a prompt for the first time, again, longer, branched, after a restart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from compare.contestants import BARE, Contestant, field
from compare.samples import Sample, Samples
from compare.sizes import Sizes
from compare.texts import Texts
from compare.words import Question, common_tokens

TITLES: Final = {
    "cold": "Cold: a prompt for the first time",
    "exact": "Exact: the same prompt again, at once",
    "longer": "Longer: the prompt, and more",
    "branch": "Branch: the prompt with another end",
    "returned": "Returned: the same prompt, after another one was asked",
    "restart": "Restart: the same prompt in a new process, from disk, with a warm page cache",
}
FLOOR: Final = "floor"
"""Not a scenario: what the bare loop measures of a restart."""
_OTHER_TOKENS: Final = 96
_ROOM: Final = 64
"""Cells beyond what is asked for, so that nobody rounds differently."""


def measure(
    path: Path,
    names: Sequence[str],
    scenarios: Collection[str],
    n_tokens: int,
    rounds: int,
    sizes: Sizes,
    samples: Samples,
    threads: int,
) -> None:
    """So many rounds at one length, added to ``samples``. ``names``: of contestants."""
    n_ctx = n_tokens + sizes.tail_tokens + sizes.reply_tokens + _ROOM
    first = samples.rounds
    with Texts(path) as texts, field(path, names, n_ctx=n_ctx, threads=threads) as everybody:
        for number in range(first, first + rounds):
            turn = _Turn(texts, scenarios, n_tokens, number, sizes)
            everybody.each(number, turn)
            samples.add(turn.samples, everybody.absent)


class _Turn:
    """What each of them is asked in a round."""

    def __init__(
        self, texts: Texts, scenarios: Collection[str], n_tokens: int, number: int, sizes: Sizes
    ) -> None:
        ledger, tail = texts.prompts.ledger, texts.prompts.tail
        self._scenarios = scenarios
        self._number = number
        self._sizes = sizes
        self._n_tokens = n_tokens
        self._prompt = ledger(number, n_tokens)
        self._longer = self._prompt + tail(0, sizes.tail_tokens)
        self._branch = self._prompt[: -sizes.tail_tokens] + tail(1, sizes.tail_tokens)
        self._other = ledger(1000 + number, _OTHER_TOKENS)
        self._warm_up = ledger(2000 + number, _OTHER_TOKENS)
        self.samples: list[Sample] = []

    def __call__(self, contestant: Contestant) -> None:
        self._ask(contestant, None, self._warm_up)
        self._ask(contestant, "cold", self._prompt, self._n_tokens)
        if "exact" in self._scenarios:
            self._ask(contestant, "exact", self._prompt)
        if "longer" in self._scenarios:
            self._ask(contestant, "longer", self._longer, self._sizes.tail_tokens)
        if "branch" in self._scenarios:
            new = self._n_tokens - common_tokens(self._prompt, self._branch)
            self._ask(contestant, "branch", self._branch, new)
        if "returned" in self._scenarios:
            self._ask(contestant, None, self._other)
            self._ask(contestant, "returned", self._prompt)
        if "restart" in self._scenarios and contestant.kind.survives:
            # It is what was asked last, for those who keep nothing else.
            self._ask(contestant, None, self._prompt)
            contestant.restart()
            contestant.recall()
            self._ask(contestant, "restart", self._prompt)
            if contestant.kind.name == BARE:
                for seconds in contestant.floor(self._sizes.floor_runs):
                    self._note(contestant, FLOOR, seconds, 0, 0)

    def _ask(
        self, contestant: Contestant, scenario: str | None, tokens: tuple[int, ...], new: int = 0
    ) -> None:
        answer = contestant.answer(Question(tokens=tokens, reply_tokens=self._sizes.reply_tokens))
        if scenario in self._scenarios and scenario is not None:
            self._note(contestant, scenario, answer.first_token_s, answer.computed_tokens, new)

    def _note(
        self, contestant: Contestant, scenario: str, seconds: float, computed: int, new: int
    ) -> None:
        self.samples.append(
            Sample(
                scenario=scenario,
                size=self._n_tokens,
                round=self._number,
                who=contestant.kind.name,
                first_token_s=seconds,
                computed_tokens=computed,
                new_tokens=new,
            )
        )

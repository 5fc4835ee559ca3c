"""Choosing the next token under a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from erllama_backend_stub.logits import LogitRow
from erllama_backend_stub.sampler import StubSampler, logits_of
from erllama_backend_stub.vocabulary import N_TOKENS, StubVocabulary
from erllama_core.errors import InvalidGrammar
from erllama_core.interfaces.backend import Constraint, Mark, PackedTokens, SamplingParams

_ALL_TOKENS: Final = range(N_TOKENS)


class ConstrainedStubSampler:
    """Draws as :class:`StubSampler` does, and once more, among what fits, where that does not."""

    def __init__(
        self,
        params: SamplingParams,
        history: PackedTokens,
        constraint: Constraint,
        vocabulary: StubVocabulary,
    ) -> None:
        self._params = params
        self._plain = StubSampler(params, history)
        self._state = constraint.grammar.begin()
        self._excluded = constraint.excluded
        self._vocabulary = vocabulary
        self._awaits_row = False
        """A token was turned down that came from a mark, and another one is still to be drawn."""
        self.turned_down = 0

    def sample_row(self, row: LogitRow, *, greedy: bool = False) -> int:
        """Draw the next token from the logits of a step and take note of it."""
        token = self._sample(_ALL_TOKENS, row.values, greedy=greedy, whole=True)
        assert token is not None
        return token

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int | None:
        """See the protocol. Raises ValueError for a mark that does not serve the parameters."""
        tokens, logits = logits_of(mark, self._params)
        return self._sample(tokens, logits, greedy=greedy, whole=mark.is_whole)

    def close(self) -> None:
        self._plain.close()

    def _sample(
        self, tokens: Sequence[int], logits: Sequence[float], *, greedy: bool, whole: bool
    ) -> int | None:
        if not self._awaits_row:
            token = self._plain.draw(tokens, logits, greedy=greedy)
            if self._fits(token):
                return self._note(token)
            self.turned_down += 1
        fitting = [place for place, token in enumerate(tokens) if self._fits(token)]
        reach = self._params.reach
        self._awaits_row = not whole and (reach is None or len(fitting) < reach)
        if self._awaits_row:
            return None
        if not fitting:
            raise InvalidGrammar("the reply cannot go on: no token of the vocabulary fits")
        return self._note(
            self._plain.draw(
                [tokens[place] for place in fitting],
                [logits[place] for place in fitting],
                greedy=greedy,
            )
        )

    def _fits(self, token: int) -> bool:
        if token in self._vocabulary.end_of_generation:
            return self._state.may_end
        return token not in self._excluded and self._state.allows(self._vocabulary.piece(token))

    def _note(self, token: int) -> int:
        self._plain.note(token)
        if token not in self._vocabulary.end_of_generation:
            state = self._state.after(self._vocabulary.piece(token))
            assert state is not None
            self._state = state
        return token

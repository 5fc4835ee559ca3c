"""Sampling under a grammar: draw first, then ask about the one token that was drawn.

Applying a grammar to a whole row takes as long as computing one; asking about a token takes
microseconds. Where a token does not fit, another one is drawn from those that do; as a rule the
1,024 largest logits hold all of them that a draw can reach.
"""

from __future__ import annotations

from typing import Final

from erllama_backend_llama.candidates import Candidates, LiveRow, of_mark, of_row
from erllama_backend_llama.grammar import LlamaGrammar
from erllama_backend_llama.logits import largest_of
from erllama_backend_llama.sampler import LlamaSampler
from erllama_backend_llama.vocabulary import LlamaVocabulary
from erllama_core.errors import InvalidGrammar
from erllama_core.interfaces.backend import Constraint, Mark, PackedTokens, SamplingParams

_FIRST_TRIED: Final = 1024
"""Of the largest logits, once a token was turned down."""


class ConstrainedLlamaSampler:
    """A chain, and a grammar that has the last word. See the protocol.

    Owns both, which ``close`` frees. Made on any thread, used by one.
    """

    def __init__(
        self,
        params: SamplingParams,
        history: PackedTokens,
        constraint: Constraint,
        vocabulary: LlamaVocabulary,
    ) -> None:
        self._n_vocab: Final = vocabulary.n_tokens
        self._reach: Final = params.reach
        self._chain: Final = LlamaSampler(params, history, self._n_vocab)
        self._grammar: Final = LlamaGrammar(vocabulary, constraint)
        self._awaits_row = False
        """A token was turned down that came from a mark, and another one is still to be drawn."""
        self.turned_down = 0

    def sample_row(self, live: LiveRow, *, greedy: bool = False) -> int:
        """Draw from a row of the context, and take note of the token.

        Raises InvalidGrammar when no token of the vocabulary fits.
        """
        if not self._awaits_row:
            token = self._chain.draw_row(live, greedy=greedy)
            if self._grammar.allows(token):
                return self._note(token)
            self.turned_down += 1
        self._awaits_row = False
        row = live.logits
        if self._reach is not None and row.size > _FIRST_TRIED:
            candidates = of_row(row)[largest_of(row, _FIRST_TRIED)]
            drawn = self._draw_fitting(candidates, whole=False, greedy=greedy)
            if drawn is not None:
                return self._note(drawn)
        drawn = self._draw_fitting(of_row(row), whole=True, greedy=greedy)
        assert drawn is not None
        return self._note(drawn)

    def sample_mark(self, mark: Mark, *, greedy: bool = False) -> int | None:
        """See the protocol. The caller has asked ``mark.serves``."""
        candidates = of_mark(mark, self._n_vocab)
        if not self._awaits_row:
            token = self._chain.draw(candidates.copy(), greedy=greedy)
            if self._grammar.allows(token):
                return self._note(token)
            self.turned_down += 1
        drawn = self._draw_fitting(candidates, whole=mark.is_whole, greedy=greedy)
        self._awaits_row = drawn is None
        return None if drawn is None else self._note(drawn)

    def close(self) -> None:
        self._chain.close()
        self._grammar.close()

    def _draw_fitting(self, candidates: Candidates, *, whole: bool, greedy: bool) -> int | None:
        """Draw one that fits; None where tokens that are no candidates could be drawn too."""
        fitting = self._grammar.allowed(candidates)
        if not whole and (self._reach is None or fitting.size < self._reach):
            return None
        if not fitting.size:
            raise InvalidGrammar("the reply cannot go on: no token of the vocabulary fits")
        return self._chain.draw(fitting, greedy=greedy)

    def _note(self, token: int) -> int:
        self._chain.note(token)
        self._grammar.accept(token)
        return token

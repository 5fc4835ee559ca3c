"""What a model promises that follows grammars: tests of the kit."""

from __future__ import annotations

import re

import pytest

from erllama_core.conformance.backend.driving import feed, pack
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.conformance.grammars import DIGITS, reply, spelling
from erllama_core.interfaces.backend import (
    BackendModel,
    ConstrainedSampler,
    Constrains,
    Constraint,
    SamplingParams,
)


class ConstrainedPromises(BackendKit):
    """What a model promises that follows grammars."""

    def test_a_grammar_shapes_a_reply(self, subject: BackendSubject, model: BackendModel) -> None:
        """Under a grammar every token fits and the reply ends where it may, whether the first
        one comes from stored logits, of any size that serves, or from a step.

        If this fails: JSON that was asked for cannot be read, or a cached prompt gives other.
        """
        if not isinstance(model, Constrains):
            pytest.skip("it follows no grammars")
        vocabulary, history = model.vocabulary, pack(subject.tokens[:20])
        constraint = Constraint(DIGITS, frozenset())
        context = model.open_context()
        try:
            for params in (
                SamplingParams(),
                SamplingParams(temperature=1.0, seed=3),
                SamplingParams(temperature=2.0, top_k=0, seed=4, repetition_penalty=1.3),
            ):
                replies = set()
                for size in (0, None, 100, 1):
                    context.drop(0)
                    feed(context, 0, subject.tokens[:20])
                    mark = context.mark(0, size) if size != 0 else None
                    if mark is not None and not mark.serves(params):
                        continue
                    sampler = model.new_constrained_sampler(params, history, constraint)
                    assert isinstance(sampler, ConstrainedSampler)
                    drawn = reply(context, sampler, mark, vocabulary.end_of_generation)
                    text = b"".join(map(vocabulary.piece, drawn[:-1]))
                    assert re.fullmatch(rb"\{[0-9]{2}\}", text), text
                    assert drawn[-1] in vocabulary.end_of_generation
                    replies.add((*drawn, sampler.turned_down))
                    sampler.close()
                assert len(replies) == 1, replies
        finally:
            context.close()

    def test_an_excluded_token_never_comes(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """A control token whose spelling a grammar asks for does not come when it is excluded.

        If this fails: a reply lacks text that its grammar requires.
        """
        if not isinstance(model, Constrains):
            pytest.skip("it follows no grammars")
        vocabulary = model.vocabulary
        tokens = {
            token: text
            for token, text in vocabulary.control_tokens.items()
            if text.isascii() and text.isprintable() and text
        }
        tokens = {t: s for t, s in tokens.items() if t not in vocabulary.end_of_generation}
        if not tokens:
            pytest.skip("it has no control tokens that are text")
        token, text = next(iter(tokens.items()))
        context = model.open_context()
        try:
            feed(context, 0, subject.tokens[:20])
            constraint = Constraint(spelling(text), frozenset(vocabulary.control_tokens))
            sampler = model.new_constrained_sampler(SamplingParams(), b"", constraint)
            drawn = context.sample(0, sampler)
            assert drawn != token
            assert text.encode().startswith(vocabulary.piece(drawn))
            sampler.close()
        finally:
            context.close()

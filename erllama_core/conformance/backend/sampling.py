"""What samplers and stored logits promise: tests of the kit."""

from __future__ import annotations

import pytest

from erllama_core.conformance.backend.driving import feed, pack
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.interfaces.backend import BackendModel, Context, SamplingParams, TellsLogits


class SamplingPromises(BackendKit):
    """What samplers and stored logits promise."""

    def test_greedy_takes_the_largest_logit(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """Temperature 0 is the arg-max, from a row and from a mark.

        If this fails: replies that should be deterministic are not.
        """
        context = model.open_context()
        try:
            row = feed(context, 0, subject.tokens[:20])
            sampler = model.new_sampler(SamplingParams(temperature=0.0), b"")
            token = context.sample(0, sampler)
            assert row[token] == max(row)
            assert sampler.sample_mark(context.mark(0, 16)) == token
            drawn = model.new_sampler(SamplingParams(temperature=1.5, seed=1), b"")
            assert context.sample(0, drawn, greedy=True) == token
            sampler.close()
            drawn.close()
        finally:
            context.close()

    def test_samplers_share_nothing(self, subject: BackendSubject, model: BackendModel) -> None:
        """Draws of one request do not depend on another request's draws in between.

        If this fails: the same seed gives another reply as soon as somebody else is served.
        """
        context = model.open_context()
        try:
            feed(context, 0, subject.tokens[:20])
            hot = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
            all_params = [
                SamplingParams(**hot, seed=3),  # type: ignore[arg-type]
                SamplingParams(**hot, seed=4, repetition_penalty=1.5),  # type: ignore[arg-type]
            ]
            alone = []
            for params in all_params:
                sampler = model.new_sampler(params, pack(subject.tokens[:20]))
                alone.append([context.sample(0, sampler) for _ in range(30)])
                sampler.close()
            assert alone[0] != alone[1]
            samplers = [model.new_sampler(p, pack(subject.tokens[:20])) for p in all_params]
            together: list[list[int]] = [[], []]
            for _ in range(30):
                for sampler, drawn in zip(samplers, together, strict=True):
                    drawn.append(context.sample(0, sampler))
            assert together == alone
            for sampler in samplers:
                sampler.close()
        finally:
            context.close()

    def test_a_mark_draws_what_the_row_draws(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """From stored logits the same tokens are drawn as from the step that gave them.

        If this fails: a cached prompt is answered otherwise than one that was computed.
        """
        context = model.open_context()
        try:
            feed(context, 0, subject.tokens[:20])
            whole, largest = context.mark(0, None), context.mark(0, 128)
            assert whole.is_whole
            assert largest.size <= 128
            assert whole.n_vocab == largest.n_vocab == model.vocabulary.n_tokens
            for params in (
                SamplingParams(temperature=1.0, seed=5),
                SamplingParams(temperature=2.0, top_k=10, top_p=1.0, min_p=0.0, seed=6),
                SamplingParams(temperature=1.0, repetition_penalty=1.3, seed=7),
            ):
                marks = [whole, *([largest] if largest.serves(params) else [])]
                history = pack(subject.tokens[:20])
                samplers = [model.new_sampler(params, history) for _ in range(1 + len(marks))]
                for _ in range(10):
                    token = context.sample(0, samplers[0])
                    for sampler, mark in zip(samplers[1:], marks, strict=True):
                        assert sampler.sample_mark(mark) == token
                for sampler in samplers:
                    sampler.close()
        finally:
            context.close()

    def test_logits_are_told(self, subject: BackendSubject, context: Context) -> None:
        """A single logit is that of the row.

        If this fails: log-probabilities are wrong.
        """
        if not isinstance(context, TellsLogits):
            pytest.skip("it tells no logits")
        row = feed(context, 0, subject.tokens[:20])
        for token in (0, len(row) // 2, len(row) - 1):
            assert context.logit(0, token) == pytest.approx(row[token])

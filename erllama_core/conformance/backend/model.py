"""What a model promises: to be known again, to describe itself, to go without a trace."""

from __future__ import annotations

import attrs

from erllama_core.conformance.backend.driving import feed
from erllama_core.conformance.backend.subject import BackendKit, BackendSubject
from erllama_core.conformance.kit import no_leaks
from erllama_core.errors import ErllamaError
from erllama_core.interfaces.backend import (
    BackendModel,
    Context,
    ContextOptions,
    CostPrior,
    DeclaresCosts,
    Embeds,
    SamplingParams,
)


class ModelPromises(BackendKit):
    """What a model promises: to be known again, to describe itself, to go without a trace."""

    def test_identity_is_of_plain_values_and_stays(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """Two loads with the same options have the same identity, of values that can be hashed.

        If this fails: what one process stores no other one finds, or a restart is always cold.
        """
        other = subject.load(attrs.evolve(subject.options, kv_unified=subject.unified[0]))
        contexts = [model.open_context(), other.open_context()]
        try:
            identity = model.identity()
            assert dict(identity) == dict(other.identity())
            assert all(isinstance(name, str) for name in identity)
            plain = (str, int, float, bool, bytes)
            assert all(isinstance(value, plain) for value in identity.values())
        finally:
            for context in contexts:
                context.close()
            other.close()

    def test_it_describes_itself(self, model: BackendModel) -> None:
        """A model has words for a person, and says how its weights are stored.

        If this fails: ``erllama`` cannot list it, or two quantisations share one namespace.
        """
        assert model.description
        assert model.quantisation.type == model.quantisation.type.lower() != ""
        assert model.quantisation.bits > 0

    def test_abilities_are_whole(self, model: BackendModel, context: Context) -> None:
        """What an optional ability says can be used.

        If this fails: the core takes the ability for granted and a request fails in it.
        """
        if isinstance(context, DeclaresCosts):
            prior = context.cost_prior
            assert prior is None or isinstance(prior, CostPrior)
        if isinstance(model, Embeds):
            tokens = model.vocabulary.tokenize("a text", add_bos=False, parse_special=False)
            try:
                vector = list(model.embed(tokens))
            except ErllamaError:
                return  # the ability is there, and this model has no embeddings
            assert vector == list(model.embed(tokens))
            assert all(isinstance(number, float) for number in vector)

    def test_opening_and_closing_leaks_nothing(
        self, subject: BackendSubject, options: ContextOptions
    ) -> None:
        """Loading, computing and closing again and again leaves no thread and no descriptor.

        If this fails: a server that loads and unloads models dies of it.
        """
        model = subject.load(options)
        model.open_context().close()
        model.close()
        with no_leaks():
            for _ in range(5):
                model = subject.load(options)
                context = model.open_context()
                feed(context, 0, subject.tokens[:5])
                sampler = model.new_sampler(SamplingParams(), b"")
                for closing in (sampler, context, model):
                    closing.close()
                    closing.close()

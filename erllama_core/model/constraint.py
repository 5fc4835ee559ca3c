"""What a request's sampler is made of: how it draws, and what the reply has to look like."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from erllama_core.errors import NotSupported
from erllama_core.grammar.compile import compile_gbnf, compile_schema
from erllama_core.interfaces.backend import (
    BackendModel,
    Constrains,
    Constraint,
    PackedTokens,
    Sampler,
    Vocabulary,
)
from erllama_core.model.options import RequestOptions


def sampler_maker(
    backend: BackendModel, name: str, options: RequestOptions, markers: Iterable[str]
) -> Callable[[PackedTokens], Sampler]:
    """What makes a request's sampler of the tokens of its prompt.

    ``name``: the backend's. ``markers``: those that its reply is searched for. Raises
    InvalidGrammar; NotSupported for a backend without grammars.
    """
    params = options.sampling()
    if not options.is_constrained:
        return functools.partial(backend.new_sampler, params)
    if not isinstance(backend, Constrains):
        raise NotSupported(f"the backend {name!r} has no grammars")
    if options.grammar is not None:
        grammar = compile_gbnf(options.grammar)
    else:
        assert options.json_schema is not None
        grammar = compile_schema(options.json_schema)
    constraint = Constraint(grammar, _without_text(backend.vocabulary, markers))
    return functools.partial(backend.new_constrained_sampler, params, constraint=constraint)


def _without_text(vocabulary: Vocabulary, markers: Iterable[str]) -> frozenset[int]:
    """Control tokens that a reply has nothing of: they end nothing, and are in no marker."""
    texts = tuple(markers)
    return frozenset(
        token
        for token, text in vocabulary.control_tokens.items()
        if token not in vocabulary.end_of_generation and not any(text in marker for marker in texts)
    )

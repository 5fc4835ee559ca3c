"""From what a request says to a grammar that can be followed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.check import check_grammar, has_end
from erllama_core.grammar.gbnf import read_gbnf
from erllama_core.grammar.schema import gbnf_of_schema
from erllama_core.interfaces.grammar import Grammar

_REMEMBERED = 64
"""Grammars that are not read anew. A service's requests tend to have few different ones."""


@functools.lru_cache(_REMEMBERED)
def compile_gbnf(text: str) -> Grammar:
    """A grammar in GBNF, read and checked. Raises InvalidGrammar. Thread-safe."""
    grammar = read_gbnf(text)
    check_grammar(grammar)
    return grammar


def compile_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
    """The grammar of the JSON texts that a JSON schema describes. Thread-safe.

    ``schema``: as Python's ``json`` would read it, or its text. Raises InvalidGrammar for one
    that is wrong, or says what a grammar cannot, with the path within it.
    """
    text = gbnf_of_schema(schema)
    try:
        grammar = compile_gbnf(text)
    except InvalidGrammar as error:
        what = f"what the schema becomes cannot be followed: {error.problem}"
        raise InvalidGrammar(what, path="#") from error
    if not has_end(grammar):
        raise InvalidGrammar("no value that ends: it needs itself as a part of itself", path="#")
    return grammar

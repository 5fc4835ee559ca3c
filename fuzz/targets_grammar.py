"""Grammars and JSON schemas: read by the core, then by llama.cpp, which must agree."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from target import Run, Target
from targets_chat import text_of
from targets_store import in_memory

from erllama_core.errors import InvalidGrammar
from erllama_core.grammar.compile import compile_gbnf, compile_schema
from erllama_core.interfaces.grammar import Grammar
from grammars import some_text

WORDS = (
    *(b"root ::= ", b"\nx ::= ", b"root", b" | ", b"(", b")", b"[", b"]", b"[^", b'"', b'"a"'),
    *(b"*", b"+", b"?", b"{2,3}", b"{0,1999}", b"{1,}", b"\\x00", b"\\u00e9", b"\\U0001F600"),
    *(b".", b"# c\n", b"\n", b"[a-z]", b"-", b"x", b"::=", b"\xc3\xa9", b"<[1]>"),
)
SCHEMA_WORDS = (
    *(b'{"type":"object","properties":{"a":', b'"anyOf":[', b'"allOf":[', b'"$ref":"#/$defs/a"'),
    *(b'"pattern":"^a+$"', b'"(a|b)*"', b'{"type":"integer","minimum":', b'"enum":[', b'"const":'),
    *(b'"multipleOf":0.1', b'"maxLength":', b'"uniqueItems":true', b'"format":"date"', b"["),
    *(b'"prefixItems":[', b'"items":', b'"minItems":', b'"required":["a"]', b'"$defs":{"a":', b"{"),
    *(b'"patternProperties":{"^x":', b'"propertyNames":', b'"additionalProperties":false', b"}"),
    *(b'"oneOf":[', b"true", b"false", b"null", b"1e400", b'"\\ud800"', b"0.30000000000000004"),
)

Follow = Callable[[Grammar, random.Random], None]


@contextmanager
def _gbnf() -> Iterator[Run]:
    def run(data: bytes) -> None:
        _read(compile_gbnf, text_of(data))

    yield run


@contextmanager
def _schema() -> Iterator[Run]:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        grammar = _read(compile_schema, text)
        if grammar is None:
            return
        schema = json.loads(text)
        said = some_text(grammar, random.Random(len(data)))
        if said is None:
            return
        with suppress(RecursionError):  # of the checker itself, in schemas that refer to others
            _validate(schema, json.loads(said))

    yield run


def _validate(schema: Any, value: Any) -> None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return  # e.g. of another draft
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


def _read(read: Callable[[Any], Grammar], given: Any) -> Grammar | None:
    try:
        return read(given)
    except InvalidGrammar:
        return None


@contextmanager
def _llama() -> Iterator[Run]:
    """What the core accepts is accepted by llama.cpp, and followed alike."""
    import numpy as np

    from erllama_backend_llama.candidates import CANDIDATE
    from erllama_backend_llama.grammar import LlamaGrammar
    from erllama_backend_llama.model import load_model
    from erllama_backend_llama.options import LlamaOptions
    from erllama_backend_llama.vocabulary import LlamaVocabulary
    from erllama_core.interfaces.backend import BackendRequest, Constraint, ContextOptions
    from tiny_gguf import write_tiny_gguf

    folder = in_memory()
    context = ContextOptions(n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1)
    path = write_tiny_gguf(folder / "model.gguf", "llama")
    model = load_model(BackendRequest(model_path=path, options=LlamaOptions(), context=context))
    vocabulary = model.vocabulary
    assert isinstance(vocabulary, LlamaVocabulary)
    everything = np.zeros(vocabulary.n_tokens, dtype=CANDIDATE)
    everything["id"] = np.arange(vocabulary.n_tokens)

    def run(data: bytes) -> None:
        text = data[1:].decode("utf-8", "replace")
        compile_ = compile_schema if data[:1] == b"s" else compile_gbnf
        grammar = _read(compile_, text)
        if grammar is None:
            return
        native = LlamaGrammar(vocabulary, Constraint(grammar=grammar, excluded=frozenset()))
        try:
            _follow(grammar, native, random.Random(len(data)))
        except InvalidGrammar as error:
            assert "took" in error.problem, error  # noqa: PT017 - slow, and told so
        finally:
            native.close()

    def _follow(grammar: Grammar, native: LlamaGrammar, rng: random.Random) -> None:
        state = grammar.begin()
        for _ in range(12):
            allowed = native.allowed(everything)["id"].tolist()
            told = set(allowed) - vocabulary.end_of_generation
            ours = {
                token
                for token in range(vocabulary.n_tokens)
                if token not in vocabulary.control_tokens
                and vocabulary.piece(token)
                and state.allows(vocabulary.piece(token))
            }
            told -= set(vocabulary.control_tokens)
            assert told <= ours, told - ours
            # Where a token ends within a character, llama.cpp goes by whether all that it can
            # become lies outside of a negated set; the core by whether any of it does.
            for token in ours - told:
                after = state.after(vocabulary.piece(token))
                assert after is not None, token
                assert after.pending, token
            assert bool(set(allowed) & vocabulary.end_of_generation) == state.may_end
            if not told:
                return
            token = rng.choice(sorted(told))
            native.accept(token)
            after = state.after(vocabulary.piece(token))
            assert after is not None
            state = after

    try:
        yield run
    finally:
        model.close()
        shutil.rmtree(folder)


TARGETS = (
    Target(
        name="gbnf", open=_gbnf, words=WORDS, seconds=10.0, base_bytes=200 << 20, quick_runs=150
    ),
    Target(
        name="schema",
        open=_schema,
        is_json=True,
        words=SCHEMA_WORDS,
        seconds=20.0,
        base_bytes=400 << 20,
        needs=("jsonschema",),
        quick_runs=100,
    ),
    Target(
        name="llama_grammar",
        open=_llama,
        is_json=True,
        words=(*WORDS, *SCHEMA_WORDS),
        seconds=20.0,
        base_bytes=400 << 20,
        native=True,
        needs=("llama_cpp",),
        quick_runs=40,
    ),
)

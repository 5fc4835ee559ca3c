"""Questions about documents that were computed before anybody asked."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
from figure import Figure
from report import Section
from scenario_sizes import Sizes
from serving_load import Ask, Prompts
from serving_peer import LlamaServerPeer, PeerUnavailable

from erllama_core import Engine, Model, load_config


@attrs.frozen
class _Question:
    """About one document; ``tokens`` are the whole prompt."""

    document: int
    tokens: tuple[int, ...]


def measure(sizes: Sizes, path: Path) -> Section:
    """The first token of each question, asked in turn, in an order that is mixed but fixed.

    llama-server has one slot, as we have one sequence, and keeps the states of other prompts in
    its memory (its default, up to 8 GiB). It has no call that only computes, so its documents are
    computed by asking for one token. Recomputing is our own engine without tiers.
    """
    n_ctx = sizes.instruction_tokens + sizes.document_tokens + sizes.question_tokens
    n_ctx += sizes.reply_tokens + 64
    ours: list[float] = []
    theirs: list[float] = []
    anew: list[float] = []
    prefilled = peer_prefilled = 0.0
    absent = ""
    with _models(path, n_ctx) as (engine, cached, bare), contextlib.ExitStack() as stack:
        documents, questions = _prompts(sizes, Prompts(cached.tokenize))
        peer = None
        try:
            peer = stack.enter_context(LlamaServerPeer(path, unified=True, n_ctx=n_ctx, n_seq=1))
        except PeerUnavailable as error:
            absent = str(error)
        began = time.perf_counter()
        for document in documents:
            cached.prefill_only(document)
        engine.flush()
        prefilled = time.perf_counter() - began
        if peer is not None:
            began = time.perf_counter()
            for document in documents:
                peer.ask([Ask(tokens=document, reply_tokens=1)])
            peer_prefilled = time.perf_counter() - began
        for question in questions:
            reply = cached.complete(question.tokens, response_tokens=sizes.reply_tokens)
            assert reply.cache_delta.read >= sizes.instruction_tokens + sizes.document_tokens
            ours.append(reply.stats.first_token_s or 0.0)
            engine.flush()
            if peer is not None:
                [told] = peer.ask([Ask(tokens=question.tokens, reply_tokens=sizes.reply_tokens)])
                theirs.append(told.first_token_s)
        compared = []
        for question in questions:
            if question.document < sizes.recomputed:
                compared.append(ours[questions.index(question)])
                reply = bare.complete(question.tokens, response_tokens=1)
                assert reply.cache_hit_kind == "cold"
                anew.append(reply.stats.first_token_s or 0.0)
    figures = [
        _ms(f"{len(questions)} questions about {sizes.documents} documents: first token", ours),
        _ms("    computed again, no cache", anew),
        _times("    sooner by", anew, compared),
        Figure(name="    all documents computed before", measured=prefilled, unit="s", digits=1),
    ]
    if peer is not None:
        figures += [
            _ms("    llama-server", theirs),
            _times("    sooner by than llama-server", theirs, ours),
            Figure(
                name="    all documents computed before, llama-server",
                measured=peer_prefilled,
                unit="s",
                digits=1,
            ),
        ]
    return Section(
        name="rag",
        title="Questions about documents that were computed before",
        figures=tuple(figures),
        notes=(f"llama-server was not measured: {absent}",) if absent else (),
    )


def _prompts(sizes: Sizes, prompts: Prompts) -> tuple[list[tuple[int, ...]], list[_Question]]:
    instructions = prompts.ledger(0, sizes.instruction_tokens)
    documents = [
        instructions + prompts.ledger(1 + number, sizes.document_tokens)
        for number in range(sizes.documents)
    ]
    questions = [
        _Question(document, tokens + prompts.tail(number, sizes.question_tokens))
        for document, tokens in enumerate(documents)
        for number in range(sizes.questions)
    ]
    random.Random(9).shuffle(questions)
    return documents, questions


@contextlib.contextmanager
def _models(path: Path, n_ctx: int) -> Iterator[tuple[Engine, Model, Model]]:
    """An engine, a model with everything at its default, and one that stores nothing."""
    with Engine(load_config({}, environ={})) as engine:
        cached = engine.load_model(
            "cached", backend="llama", model_path=str(path), context_opts={"n_ctx": n_ctx}
        )
        bare = engine.load_model(
            "bare",
            backend="llama",
            model_path=str(path),
            tier=[],
            context_opts={"n_ctx": n_ctx, "resident_cells_max": 0},
        )
        yield engine, cached, bare


def _ms(name: str, seconds: list[float]) -> Figure:
    return Figure.of_runs(name, [1000 * one for one in seconds], unit="ms", digits=1)


def _times(name: str, slower: list[float], sooner: list[float]) -> Figure:
    ratios = [a / b for a, b in zip(slower, sooner, strict=True)]
    return Figure.of_runs(name, ratios, unit="times", digits=1)

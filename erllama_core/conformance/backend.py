"""Whether a backend keeps its promises: see :mod:`erllama_core.interfaces.backend`.

::

    from erllama_core.conformance import BackendConformance, BackendSubject

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def subject(self):
            return BackendSubject(load=lambda context: open_my_model(context))

A subject's contexts are of one KV class; derive once for each that the backend has.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import attrs
import pytest

from erllama_core.conformance.grammars import DIGITS, reply, spelling
from erllama_core.conformance.kit import ConformanceKit, no_leaks
from erllama_core.errors import AdapterLoadError, DecodeFailed, ErllamaError, StateRejected
from erllama_core.interfaces.backend import (
    Adapter,
    Adapts,
    BackendModel,
    ConstrainedSampler,
    Constrains,
    Constraint,
    Context,
    ContextOptions,
    CostPrior,
    DeclaresCosts,
    Embeds,
    KVClass,
    Mark,
    RangeExport,
    RangeImport,
    Row,
    SamplingParams,
    TellsLogits,
)

REFUSED: Final = (ErllamaError, ValueError)
"""What a call that makes no sense may raise."""


def _default_tokens() -> tuple[int, ...]:
    return tuple((7 * index + index // 13) % 200 for index in range(300))


def _default_options() -> ContextOptions:
    return ContextOptions(n_ctx=512, n_seq_max=3, n_batch=512)


@attrs.frozen(kw_only=True)
class BackendSubject:
    """A backend to be tested, by one of its models."""

    load: Callable[[ContextOptions], BackendModel]
    """Loads the model with these context options. The test closes what it has loaded."""
    tokens: Sequence[int] = attrs.field(factory=_default_tokens)
    """A context of 300 ordinary tokens, all different from their neighbours."""
    text: str = "The quick brown fox jumps over the lazy dog. Größe, 日本, 🙂."
    """A text that the vocabulary can spell."""
    rounding: float = 0.0
    """How far logits of equal contexts may lie apart that were computed in other batches."""
    restores_exactly: bool = True
    """Whether a restored sequence computes the very logits that the stored one does, where both
    are alone in equal steps; else within ``rounding``."""
    options: ContextOptions = attrs.field(factory=_default_options)
    """Of the contexts; ``kv_unified`` is set by the tests."""
    unified: tuple[bool, ...] = (True, False)
    """The modes of ``kv_unified`` that it has."""
    write_adapter: Callable[[Path], object] | None = None
    """Writes an adapter that fits the model to a path; needed where models have adapters."""


# ------------------------------------------------------------- helpers of tests


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32."""
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def unpack(packed: bytes | memoryview) -> list[int]:
    """The inverse of :func:`pack`."""
    data = bytes(packed)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def feed(context: Context, seq: int, tokens: Sequence[int]) -> list[float]:
    """Append tokens in one step; the logits after the last one, by token id."""
    context.step([Row(seq, context.length(seq), pack(tokens), logits=True)])
    return row_of(context.mark(0, None))


def row_of(mark: Mark) -> list[float]:
    """A whole mark's logits by token id; checks its form."""
    ids, logits = unpack(mark.tokens), list(array("f", mark.logits))
    assert len(ids) == len(logits) == mark.n_vocab, "a mark of size None has all logits"
    assert logits == sorted(logits, reverse=True), "the largest logit comes first"
    row = [float("nan")] * mark.n_vocab
    for token, logit in zip(ids, logits, strict=True):
        row[token] = logit
    return row


def decode(context: Context, seq: int, tokens: Sequence[int]) -> list[list[float]]:
    """Append tokens one by one; a row of logits for each."""
    return [feed(context, seq, [token]) for token in tokens]


def export(context: Context, seq: int, cuts: Sequence[int]) -> list[RangeImport]:
    """The blocks between cuts, exported by one call, as they would be imported."""
    ranges = [
        RangeExport(a, b, memoryview(bytearray(context.range_bytes(seq, a, b))))
        for a, b in itertools.pairwise(cuts)
    ]
    context.export_ranges(seq, ranges)
    return [RangeImport(r.start, r.end, r.end, r.into) for r in ranges]


def snapshot(context: Context, seq: int) -> memoryview:
    """What only exists while the sequence stands where it stands."""
    into = memoryview(bytearray(context.snapshot_bytes(seq)))
    context.export_snapshot(seq, into)
    return into


@attrs.frozen
class State:
    """All that is stored of a sequence, in whatever way its class has."""

    length: int
    blocks: tuple[RangeImport, ...]
    snapshot: memoryview | None

    @classmethod
    def of(cls, context: Context, seq: int) -> State:
        """Export it, in blocks as long as may be, or shorter."""
        length, longest = context.length(seq), context.max_block_tokens or 100
        blocks: tuple[RangeImport, ...] = ()
        if context.kv_class is not KVClass.WHOLE:
            cuts = [*range(0, length, min(longest, 100)), length]
            blocks = tuple(export(context, seq, cuts))
        part = None if context.kv_class is KVClass.SPAN else snapshot(context, seq)
        return cls(length, blocks, part)

    def restore(self, context: Context, seq: int) -> None:
        """Import it into an empty sequence."""
        if self.blocks:
            context.import_ranges(seq, self.blocks)
        if self.snapshot is not None:
            context.import_snapshot(seq, self.length, self.snapshot)


# --------------------------------------------------------------------- the kit


class BackendConformance(ConformanceKit, abc.ABC):
    """Derive, and say with a fixture ``subject`` what is tested."""

    @pytest.fixture
    @abc.abstractmethod
    def subject(self) -> BackendSubject:
        """What is tested."""

    @pytest.fixture(params=[True, False], ids=["unified", "separate"])
    def options(self, subject: BackendSubject, request: pytest.FixtureRequest) -> ContextOptions:
        unified = bool(request.param)
        if unified not in subject.unified:
            pytest.skip("the subject says that it has no such mode")
        return attrs.evolve(subject.options, kv_unified=unified)

    @pytest.fixture
    def model(self, subject: BackendSubject) -> Iterator[BackendModel]:
        options = attrs.evolve(subject.options, kv_unified=subject.unified[0])
        model = subject.load(options)
        yield model
        model.close()

    @pytest.fixture
    def context(self, subject: BackendSubject, options: ContextOptions) -> Iterator[Context]:
        model = subject.load(options)
        context = model.open_context()
        yield context
        context.close()
        model.close()

    @pytest.fixture
    def fresh(self, subject: BackendSubject, options: ContextOptions) -> Iterator[Context]:
        """Another context with the same options, to compare with."""
        model = subject.load(options)
        context = model.open_context()
        yield context
        context.close()
        model.close()

    # ----------------------------------------------------------------- vocabulary

    def test_text_survives_the_vocabulary(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """A text that is tokenised and detokenised is the same text.

        A space in front, which some vocabularies add, is let pass.

        If this fails: prompts reach the model changed.
        """
        vocabulary = model.vocabulary
        packed = vocabulary.tokenize(subject.text, add_bos=False, parse_special=False)
        assert isinstance(packed, bytes)
        assert all(token < vocabulary.n_tokens for token in unpack(packed))
        text = vocabulary.detokenize(packed).decode()
        assert text in (subject.text, f" {subject.text}")
        assert vocabulary.detokenize(memoryview(packed)) == text.encode()
        assert vocabulary.tokenize("", add_bos=False, parse_special=False) == b""
        assert vocabulary.detokenize(b"") == b""

    def test_pieces_make_the_text(self, subject: BackendSubject, model: BackendModel) -> None:
        """The bytes that tokens append to a reply, joined, are their text.

        If this fails: streamed replies lose bytes, mostly those of characters in several tokens.
        """
        vocabulary = model.vocabulary
        packed = vocabulary.tokenize(subject.text, add_bos=False, parse_special=False)
        pieces = b"".join(map(vocabulary.piece, unpack(packed)))
        assert pieces.lstrip(b" ") == vocabulary.detokenize(packed).lstrip(b" ")

    def test_every_token_has_a_piece(self, model: BackendModel) -> None:
        """All ids from 0 to n_tokens - 1 can be asked for, control tokens too.

        If this fails: a rare token ends a request, or the load of the model.
        """
        vocabulary = model.vocabulary
        assert vocabulary.n_tokens > 0
        assert all(isinstance(vocabulary.piece(n), bytes) for n in range(vocabulary.n_tokens))
        special = {*vocabulary.end_of_generation, *vocabulary.control_tokens}
        if vocabulary.bos is not None:
            special.add(vocabulary.bos)
        assert all(0 <= token < vocabulary.n_tokens for token in special)

    def test_control_tokens_are_parsed_on_request_only(self, model: BackendModel) -> None:
        """The text of a control token is that token with ``parse_special``, else ordinary text.

        If this fails: a user who types ``<|im_end|>`` ends the system's message.
        """
        vocabulary = model.vocabulary
        for token, text in list(vocabulary.control_tokens.items())[:20]:
            typed = vocabulary.tokenize(f"a{text}b", add_bos=False, parse_special=False)
            assert not set(unpack(typed)) & set(vocabulary.control_tokens), text
            parsed = vocabulary.tokenize(f"a{text}b", add_bos=False, parse_special=True)
            assert token in unpack(parsed), text

    def test_bos_comes_first_and_once(self, subject: BackendSubject, model: BackendModel) -> None:
        """``add_bos`` puts it in front, unless the text has it already.

        If this fails: every key differs from the one under which the prompt was stored, or the
        model reads a doubled BOS.
        """
        vocabulary = model.vocabulary
        bos = vocabulary.bos
        if bos is None:
            assert not vocabulary.add_bos
            return
        without = vocabulary.tokenize(subject.text, add_bos=False, parse_special=True)
        with_bos = vocabulary.tokenize(subject.text, add_bos=True, parse_special=True)
        assert unpack(with_bos) == [bos, *unpack(without)]
        text = vocabulary.control_tokens.get(bos)
        if text is not None:
            given = vocabulary.tokenize(text + subject.text, add_bos=True, parse_special=True)
            assert unpack(given).count(bos) == 1

    def test_the_vocabulary_is_for_many_threads(
        self, subject: BackendSubject, model: BackendModel
    ) -> None:
        """Threads that tokenise at once get what each would alone.

        If this fails: callers' prompts are mixed up, as tokenising is done on their threads.
        """
        vocabulary = model.vocabulary
        texts = [subject.text[number % 7 :] * (1 + number % 3) for number in range(40)]

        def tokenize(text: str) -> bytes:
            return vocabulary.tokenize(text, add_bos=False, parse_special=False)

        alone = [tokenize(text) for text in texts]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(tokenize, texts)) == alone

    # ---------------------------------------------------------------------- model

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

    def test_adapters_change_what_is_computed(
        self, subject: BackendSubject, options: ContextOptions, tmp_path: Path
    ) -> None:
        """An adapter changes logits, each scale in its way, and leaves no trace when it is gone.

        A file that is no adapter is refused; closing one twice, or after the model, is harmless.

        If this fails: requests are answered with other adapters than they were meant to, and
        their state is stored under adapters that it was not computed with.
        """
        model = subject.load(options)
        if not isinstance(model, Adapts):
            model.close()
            return
        assert subject.write_adapter is not None, "the models have adapters: say how to write one"
        path, wrong = tmp_path / "adapter", tmp_path / "wrong"
        subject.write_adapter(path)
        wrong.write_bytes(b"nothing of the kind")
        context = model.open_context()

        def logits(*adapters: tuple[Adapter, float]) -> list[float]:
            model.attach(context, adapters)
            row = feed(context, 0, subject.tokens[:40])
            context.drop(0)
            return row

        adapter, other = model.load_adapter(path), model.load_adapter(path)
        bare = logits()
        rows = [bare, logits((adapter, 1.0)), logits((adapter, 0.5))]
        rows.append(logits((adapter, 1.0), (other, 1.0)))
        for one, another in itertools.combinations(rows, 2):
            assert apart(one, another) > subject.rounding
        assert apart(logits((other, 0.5)), rows[2]) <= subject.rounding
        assert apart(logits(), bare) <= subject.rounding
        adapter.close()
        adapter.close()
        assert apart(logits(), bare) <= subject.rounding
        with pytest.raises(AdapterLoadError):
            model.load_adapter(wrong)
        context.close()
        model.close()
        other.close()

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

    # ------------------------------------------------------------------- sampling

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

    def test_logits_are_told(self, subject: BackendSubject, context: Context) -> None:
        """A single logit is that of the row.

        If this fails: log-probabilities are wrong.
        """
        if not isinstance(context, TellsLogits):
            pytest.skip("it tells no logits")
        row = feed(context, 0, subject.tokens[:20])
        for token in (0, len(row) // 2, len(row) - 1):
            assert context.logit(0, token) == pytest.approx(row[token])

    # ------------------------------------------------------------------ computing

    def test_a_new_context_is_as_it_was_asked_for(
        self, context: Context, options: ContextOptions
    ) -> None:
        """Empty, with the sequences and cells that its options say.

        If this fails: the scheduler admits requests that do not fit, or too few.
        """
        assert context.n_seq_max == options.n_seq_max
        assert 0 < context.n_ctx <= options.n_ctx
        assert context.n_cells == context.n_ctx * (1 if options.kv_unified else options.n_seq_max)
        assert context.n_batch >= 1
        assert context.max_block_tokens is None or context.max_block_tokens >= 1
        assert [context.length(seq) for seq in range(context.n_seq_max)] == [0] * context.n_seq_max

    def test_slices_do_not_matter(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A prompt computed in one step, in parts, or token by token has the same logits.

        If this fails: a long prompt is answered otherwise when others are being served.
        """
        tokens = subject.tokens[:60]
        expected = feed(fresh, 0, tokens)
        for cuts in ((0, 60), (0, 1, 60), (0, 17, 18, 40, 60), range(61)):
            for a, b in itertools.pairwise(cuts):
                row = feed(context, 0, tokens[a:b])
            assert apart(row, expected) <= subject.rounding
            context.drop(0)

    def test_neighbours_do_not_matter(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence computes the same beside others, in one step with them or not.

        If this fails: sequences read each other's cells: one user's prompt changes another
        user's reply.
        """
        tokens, others = subject.tokens[:40], subject.tokens[100:160]
        alone = [feed(fresh, 0, tokens[:30]), *decode(fresh, 0, tokens[30:])]
        feed(context, 2, others)
        rows = [Row(1, 0, pack(others[:25]), logits=False), Row(0, 0, pack(tokens[:30]), True)]
        context.step(rows)
        together = [row_of(context.mark(1, None))]
        for step, token in enumerate(tokens[30:]):
            context.step(
                [
                    Row(2, 60 + step, pack([others[step]]), logits=True),
                    Row(0, 30 + step, pack([token]), logits=True),
                ]
            )
            together.append(row_of(context.mark(1, None)))
        assert all(apart(a, b) <= subject.rounding for a, b in zip(alone, together, strict=True))
        assert [context.length(seq) for seq in range(3)] == [40, 25, 70]

    def test_order_of_rows_does_not_matter(self, subject: BackendSubject, context: Context) -> None:
        """Each row has its own sequence's logits, whatever the order of sequences in a step.

        If this fails: two requests get each other's tokens.
        """
        alone = []
        for seq in range(3):
            alone.append(feed(context, seq, subject.tokens[seq * 30 : seq * 30 + 20]))
            context.drop(seq)
        order = [2, 0, 1]
        context.step(
            [Row(s, 0, pack(subject.tokens[s * 30 : s * 30 + 20]), logits=True) for s in order]
        )
        for number, seq in enumerate(order):
            assert apart(row_of(context.mark(number, None)), alone[seq]) <= subject.rounding
        assert apart(alone[0], alone[1]) > subject.rounding, "the prompts differ"

    def test_dropping_leaves_nothing(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence that was dropped is like a new one, and can be dropped again.

        If this fails: the next request on the sequence continues somebody else's context.
        """
        context.drop(0)
        feed(context, 0, subject.tokens[100:200])
        context.drop(0)
        assert context.length(0) == 0
        row = feed(context, 0, subject.tokens[:30])
        assert apart(row, feed(fresh, 0, subject.tokens[:30])) <= subject.rounding

    def test_logits_are_those_that_were_asked_for(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """A row without logits, and one that is not there, cannot be sampled.

        If this fails: a token is drawn from another request's logits.
        """
        rows = [Row(0, 0, pack(subject.tokens[:9]), False), Row(1, 0, pack([5, 6]), True)]
        context.step(rows)
        for number in (0, 2, -1):
            with pytest.raises(REFUSED):
                context.mark(number, None)
        context.mark(1, None)

    def test_steps_that_make_no_sense_change_nothing(
        self, subject: BackendSubject, context: Context, model: BackendModel
    ) -> None:
        """Unknown tokens, sequences and positions are refused, and what was computed stays.

        If this fails: the native library is handed what makes it abort, or goes on from a hole.
        """
        tokens = subject.tokens[:10]
        feed(context, 0, tokens)
        n_tokens = model.vocabulary.n_tokens
        for rows in (
            [Row(0, 11, pack([1]), True)],
            [Row(0, 9, pack([1]), True)],
            [Row(1, 0, b"", True)],
            [Row(1, 0, pack([n_tokens]), True)],
            [Row(3, 0, pack([1]), True)],
            [Row(-1, 0, pack([1]), True)],
            [Row(1, 0, pack([1]), True), Row(1, 1, pack([1]), True)],
        ):
            with pytest.raises(REFUSED):
                context.step(rows)
            assert context.length(1) == 0
            if context.length(0) == 0:  # after a failed step it may be empty, and is then as new
                context.drop(0)
                feed(context, 0, tokens)
            assert context.length(0) == 10

    def test_a_step_without_room_takes_nothing_away(
        self, subject: BackendSubject, context: Context, options: ContextOptions
    ) -> None:
        """When cells run out, every sequence of the step is what it was, or empty.

        If this fails: one request too many destroys those that run.
        """
        if not options.kv_unified:
            pytest.skip("each sequence has cells of its own")
        before_row = feed(context, 0, subject.tokens[:100])
        feed(context, 1, subject.tokens[:100])
        before = State.of(context, 1)
        too_many = pack([subject.tokens[n % 300] for n in range(context.n_ctx - 150)])
        try:
            context.step([Row(2, 0, too_many, logits=True)])
        except DecodeFailed:
            assert context.length(2) == 0
        else:
            pytest.skip("its sequences do not take cells away from each other")
        assert [context.length(seq) for seq in (0, 1)] == [100, 100]
        after = State.of(context, 1)
        assert [bytes(b.data) for b in after.blocks] == [bytes(b.data) for b in before.blocks]
        assert feed(context, 0, [subject.tokens[100]]) != before_row, "it goes on"

    def test_an_abort_ends_no_step_that_comes_later(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """``abort`` while nothing runs has no effect.

        If this fails: cancelling one request fails the next one.
        """
        context.abort()
        feed(context, 0, subject.tokens[:10])
        with ThreadPoolExecutor(1) as other:
            other.submit(context.abort).result()
        feed(context, 0, subject.tokens[10:20])
        assert context.length(0) == 20

    # ------------------------------------------------------------ state: restoring

    def test_what_is_restored_goes_on_the_same(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """State that was exported, in another sequence of another context, computes the same.

        If this fails: every cache hit is a wrong answer.
        """
        for length in (1, 2, 100, 257, 300):
            feed(context, 0, subject.tokens[:length])
            state = State.of(context, 0)
            expected = decode(context, 0, subject.tokens[-5:])
            state.restore(fresh, 1)
            assert fresh.length(1) == length
            got = decode(fresh, 1, subject.tokens[-5:])
            allowed = 0.0 if subject.restores_exactly else subject.rounding
            assert max(map(apart, got, expected)) <= allowed, f"{length} tokens"
            context.drop(0)
            fresh.drop(1)

    def test_exporting_changes_nothing(self, subject: BackendSubject, context: Context) -> None:
        """A sequence is exported twice with the same bytes, and goes on as if it had not been.

        If this fails: saving changes the reply that is being written.
        """
        feed(context, 0, subject.tokens[:50])
        first, second = State.of(context, 0), State.of(context, 0)
        assert [bytes(b.data) for b in first.blocks] == [bytes(b.data) for b in second.blocks]
        rows = decode(context, 0, subject.tokens[50:53])
        context.drop(0)
        first.restore(context, 0)
        assert max(map(apart, decode(context, 0, subject.tokens[50:53]), rows)) <= subject.rounding

    def test_restoring_disturbs_no_neighbour(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """While state comes in and goes, another sequence computes what it would alone.

        If this fails: a cache hit of one user changes the reply of another.
        """
        feed(context, 0, subject.tokens[:60])
        state = State.of(context, 0)
        context.drop(0)
        alone = [feed(fresh, 0, subject.tokens[100:140])]
        alone += decode(fresh, 0, subject.tokens[140:146])
        got = [feed(context, 1, subject.tokens[100:140])]
        for token in subject.tokens[140:146]:
            state.restore(context, 2)
            got += decode(context, 1, [token])
            context.drop(2)
        assert max(map(apart, got, alone)) <= subject.rounding

    def test_damaged_state_spoils_nothing_else(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """State that is too short is StateRejected; after a drop the sequence is as new.

        If this fails: a truncated object crashes the process, or is taken for a whole one.
        """
        feed(context, 0, subject.tokens[:60])
        state = State.of(context, 0)
        feed(context, 1, subject.tokens[100:130])
        for lost in (1, 2, 17, 200):
            with pytest.raises(REFUSED):
                _shortened(state, lost).restore(context, 2)
            context.drop(2)
            assert [context.length(seq) for seq in range(3)] == [60, 30, 0]
        state.restore(context, 2)
        row = feed(context, 2, [subject.tokens[60]])
        feed(fresh, 0, subject.tokens[:60])
        assert apart(row, feed(fresh, 0, [subject.tokens[60]])) <= subject.rounding

    # -------------------------------------------------------------- state: ranges

    def test_ranges_of_one_call_are_those_of_many(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """SPAN, CHECKPOINT: exported together, in any order, ranges are what each is alone.

        If this fails: a block's bytes depend on what was saved with it, and do not fit others.
        """
        if context.kv_class is KVClass.WHOLE:
            return
        feed(context, 1, subject.tokens[200:250])
        feed(context, 0, subject.tokens[:100])
        bounds = [(56, 100), (0, 56), (20, 21), (0, 60)]
        together = [
            RangeExport(a, b, memoryview(bytearray(context.range_bytes(0, a, b))))
            for a, b in bounds
        ]
        context.export_ranges(0, together)
        for item in together:
            (alone,) = export(context, 0, [item.start, item.end])
            assert alone.data == item.into

    def test_ranges_go_where_they_came_from_only(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """SPAN, CHECKPOINT: a hole, another order, or a stop outside the block is refused.

        If this fails: a context is restored with a part missing, and answers nonsense.
        """
        if context.kv_class is KVClass.WHOLE:
            return
        feed(context, 0, subject.tokens[:90])
        first, second, third = export(context, 0, [0, 30, 60, 90])
        for wrong in (
            [second],
            [first, third],
            [first, first],
            [attrs.evolve(first, stop=0)],
            [attrs.evolve(first, stop=31)],
            [attrs.evolve(first, stop=20), second],
        ):
            with pytest.raises(REFUSED):
                context.import_ranges(1, wrong)
            context.drop(1)
        assert context.length(0) == 90
        for start, end in ((0, 91), (30, 30), (40, 30), (-1, 3)):
            with pytest.raises(REFUSED):
                context.range_bytes(0, start, end)

    def test_a_block_can_be_cut_at_its_end(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """SPAN: a restored chain may stop in the middle of its last block, anywhere.

        If this fails: off by one at a block's edge: the prompt that leaves a stored one within a
        block gets a token too many or too few.
        """
        if context.kv_class is not KVClass.SPAN:
            return
        feed(context, 0, subject.tokens[:90])
        first, second = export(context, 0, [0, 45, 90])
        for stop in (46, 47, 60, 89, 90):
            context.import_ranges(1, [first, attrs.evolve(second, stop=stop)])
            assert context.length(1) == stop
            feed(fresh, 0, subject.tokens[:stop])
            got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
            assert max(map(apart, got, expected)) <= subject.rounding, stop
            context.drop(1)
            fresh.drop(0)

    def test_buffers_have_exactly_the_right_size(
        self, subject: BackendSubject, context: Context
    ) -> None:
        """An export into a buffer of another size, or one that cannot be written, is refused.

        If this fails: the native side writes beyond the buffer's end.
        """
        feed(context, 0, subject.tokens[:40])
        if context.kv_class is not KVClass.WHOLE:
            size = context.range_bytes(0, 0, 40)
            for into in (bytearray(size - 1), bytearray(size + 1), bytes(size)):
                with pytest.raises((*REFUSED, TypeError)):
                    context.export_ranges(0, [RangeExport(0, 40, memoryview(into))])
        if context.kv_class is not KVClass.SPAN:
            size = context.snapshot_bytes(0)
            for into in (bytearray(size - 1), bytearray(size + 1), bytes(size)):
                with pytest.raises((*REFUSED, TypeError)):
                    context.export_snapshot(0, memoryview(into))
        assert context.length(0) == 40

    # ------------------------------------------------------- truncating, sharing

    def test_truncating_keeps_the_beginning(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """A sequence that was cut computes as if it had never been longer; or it is not cut.

        If this fails: a branch of a conversation remembers the branch that was left.
        """
        feed(context, 1, subject.tokens[200:240])
        for length in (59, 30, 1, 0):
            feed(context, 0, subject.tokens[:60])
            if context.truncate(0, length):
                assert context.length(0) == length
                feed(fresh, 0, subject.tokens[:length]) if length else None
                got, expected = decode(context, 0, [3, 9]), decode(fresh, 0, [3, 9])
                assert max(map(apart, got, expected)) <= subject.rounding, length
                fresh.drop(0)
            else:
                assert context.kv_class is not KVClass.SPAN, "SPAN sequences can be cut"
                assert context.length(0) == 60, "False: nothing has changed"
            context.drop(0)
        assert context.length(1) == 40
        with contextlib.suppress(*REFUSED):
            assert not context.truncate(1, 41)
        assert context.length(1) == 40

    def test_a_shared_beginning_goes_on_as_a_computed_one(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """The one that shares, and the one it shares with, compute what each would alone.

        If this fails: agents with one system prompt read each other's questions.
        """
        feed(context, 0, subject.tokens[:80])
        for length in (80, 40, 1):
            if context.share(0, 1, length):
                assert context.length(1) == length
                feed(fresh, 0, subject.tokens[:length])
                got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
                assert max(map(apart, got, expected)) <= subject.rounding, length
                fresh.drop(0)
                context.drop(1)
            else:
                assert context.kv_class is not KVClass.SPAN, "SPAN sequences can be shared"
                assert context.length(1) == 0, "False: nothing has changed"
        feed(fresh, 0, subject.tokens[:80])
        got, expected = decode(context, 0, [3, 9]), decode(fresh, 0, [3, 9])
        assert max(map(apart, got, expected)) <= subject.rounding
        for source, target, length in ((0, 0, 1), (0, 1, 0), (0, 1, 83), (2, 1, 1), (0, 3, 1)):
            with pytest.raises(REFUSED):
                context.share(source, target, length)

    def test_sharers_outlive_their_source(
        self, subject: BackendSubject, context: Context, fresh: Context
    ) -> None:
        """What is shared stays when the source is dropped and used again at once.

        If this fails: a finished request takes the cells of those that go on from it.
        """
        feed(context, 0, subject.tokens[:80])
        if not context.share(0, 1, 80):
            return
        context.drop(0)
        feed(context, 0, subject.tokens[150:230])
        feed(fresh, 0, subject.tokens[:80])
        got, expected = decode(context, 1, [3, 9]), decode(fresh, 0, [3, 9])
        assert max(map(apart, got, expected)) <= subject.rounding

    # ---------------------------------------------------------------- random walks

    def test_any_way_there(self, subject: BackendSubject, context: Context, fresh: Context) -> None:
        """However sequences come about, they compute what fresh ones do.

        If this fails: some sequence of steps, cuts, shares, exports and imports leaves a trace.
        """
        rng = random.Random(3)
        held: list[list[int]] = [[] for _ in range(context.n_seq_max)]
        stored: list[tuple[list[int], State]] = []
        for _ in range(50):
            seq, other = rng.sample(range(context.n_seq_max), 2)
            tokens = held[seq]
            match rng.choice(("feed", "feed", "cut", "share", "store", "load", "drop")):
                case "feed" if len(tokens) < 120:
                    at = rng.choice((0, 150))
                    added = list(subject.tokens[at : at + rng.randrange(1, 40)])
                    held[seq] = tokens + added
                    fresh.drop(0)
                    got, expected = feed(context, seq, added), feed(fresh, 0, held[seq])
                    assert apart(got, expected) <= subject.rounding
                case "cut":
                    keep = rng.randint(0, len(tokens))
                    if context.truncate(seq, keep):
                        held[seq] = tokens[:keep]
                case "share" if tokens:
                    context.drop(other)
                    length = rng.choice((len(tokens), rng.randint(1, len(tokens))))
                    held[other] = tokens[:length] if context.share(seq, other, length) else []
                case "store" if tokens:
                    stored.append((tokens, State.of(context, seq)))
                case "load" if stored:
                    context.drop(seq)
                    tokens, state = rng.choice(stored)
                    try:
                        state.restore(context, seq)
                        held[seq] = list(tokens)
                    except StateRejected:  # too few cells
                        context.drop(seq)
                        held[seq] = []
                case "drop":
                    context.drop(seq)
                    held[seq] = []
            assert [context.length(n) for n in range(context.n_seq_max)] == list(map(len, held))


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two rows of logits; infinite where one is no number."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def _shortened(state: State, lost: int) -> State:
    """A state whose last part lacks so many bytes at its end."""
    if state.snapshot is not None:
        keep = max(0, len(state.snapshot) - lost)
        return attrs.evolve(state, snapshot=state.snapshot[:keep])
    *others, last = state.blocks
    shorter = last.data[: max(0, len(last.data) - lost)]
    return attrs.evolve(state, blocks=(*others, attrs.evolve(last, data=shorter)))

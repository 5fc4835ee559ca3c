"""What is tested: a backend, by one of its models; and what every test of it begins with."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import pytest

from erllama_core.conformance.kit import ConformanceKit
from erllama_core.interfaces.backend import BackendModel, Context, ContextOptions


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


class BackendKit(ConformanceKit, abc.ABC):
    """The fixtures of every test of a backend."""

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

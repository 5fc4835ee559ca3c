"""Models that the tests make themselves, opened and closed around each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from erllama_backend_llama.context import LlamaContext
from erllama_backend_llama.model import LlamaModel, load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.interfaces.backend import (
    BackendRequest,
    ContextOptions,
    Mark,
    RangeExport,
    RangeImport,
    Row,
)
from tiny_gguf import Arch, write_tiny_gguf

Block = tuple[int, int, bytes]


def pack(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<u4").tobytes()


def whole_row(mark: Mark) -> npt.NDArray[np.float32]:
    """A whole mark as a row of logits by token id."""
    row = np.empty(mark.n_vocab, dtype=np.float32)
    row[np.frombuffer(mark.tokens, "<u4")] = np.frombuffer(mark.logits, "<f4")
    return row


class Bench:
    """An open model, and what tests do with its sequences."""

    def __init__(self, model: LlamaModel) -> None:
        context = model.open_context()
        assert isinstance(context, LlamaContext)
        self.model = model
        self.context = context
        self.lengths = [0] * context.n_seq_max

    pack = staticmethod(pack)
    whole_row = staticmethod(whole_row)

    def feed(self, seq: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens, as many at a time as a step takes; the logits after the last one."""
        limit = self.context.n_batch
        for at in range(0, len(tokens), limit):
            part = tokens[at : at + limit]
            last = at + limit >= len(tokens)
            self.context.step([Row(seq, self.lengths[seq], pack(part), last)])
            self.lengths[seq] += len(part)
        return whole_row(self.context.mark(0, None))

    def decode(self, seq: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens one by one; a row of logits for each."""
        return np.stack([self.feed(seq, [token]) for token in tokens])

    def drop(self, seq: int) -> None:
        self.context.drop(seq)
        self.lengths[seq] = 0

    def truncate(self, seq: int, length: int) -> bool:
        done = self.context.truncate(seq, length)
        if done:
            self.lengths[seq] = length
        return done

    def export(self, seq: int, start: int, end: int) -> bytes:
        into = bytearray(self.context.range_bytes(seq, start, end))
        self.context.export_ranges(seq, [RangeExport(start, end, memoryview(into))])
        return bytes(into)

    def export_chain(self, seq: int, cuts: Sequence[int]) -> list[Block]:
        """Blocks between the cuts, which start at 0."""
        return [(a, b, self.export(seq, a, b)) for a, b in pairwise(cuts)]

    def restore(self, seq: int, blocks: Sequence[Block], stop: int | None = None) -> None:
        """Import blocks that continue ``seq``, the last one up to ``stop``."""
        ranges = [RangeImport(start, end, end, memoryview(data)) for start, end, data in blocks]
        if stop is not None:
            start, end, data = blocks[-1]
            ranges[-1] = RangeImport(start, end, stop, memoryview(data))
        self.context.import_ranges(seq, ranges)
        self.lengths[seq] = ranges[-1].stop

    def snapshot(self, seq: int) -> bytes:
        into = bytearray(self.context.snapshot_bytes(seq))
        self.context.export_snapshot(seq, memoryview(into))
        return bytes(into)

    def restore_snapshot(self, seq: int, length: int, data: bytes) -> None:
        self.context.import_snapshot(seq, length, memoryview(data))
        self.lengths[seq] = length


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(arch, **options)``: the path of a tiny model, written once per session."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def make(arch: Arch = "llama", **options: Any) -> Path:
        name = "-".join([arch, *(f"{key}={value}" for key, value in sorted(options.items()))])
        if name not in written:
            written[name] = write_tiny_gguf(folder / f"{len(written)}.gguf", arch, **options)
        return written[name]

    return make


@pytest.fixture
def load() -> Iterator[Callable[..., LlamaModel]]:
    """``load(path, **context_opts)``: loaded weights without a context, closed after the test."""
    models: list[LlamaModel] = []

    def make(path: Path, **context: Any) -> LlamaModel:
        options = ContextOptions(**{"flash_attn": False, "n_threads": 1, **context})
        model = load_model(BackendRequest(model_path=path, options=LlamaOptions(), context=options))
        models.append(model)
        return model

    yield make
    for model in models:
        model.close()


@pytest.fixture
def bench(tiny: Callable[..., Path], load: Callable[..., LlamaModel]) -> Callable[..., Bench]:
    """``bench(arch_or_path, **context_opts)``: a model with an open context.

    Flash attention is off unless asked for: without it restored state computes the very same
    logits, so tests can ask for a difference of zero.
    """

    def make(model: Arch | Path = "llama", **context: Any) -> Bench:
        path = tiny(model) if isinstance(model, str) else model
        return Bench(load(path, **context))

    return make

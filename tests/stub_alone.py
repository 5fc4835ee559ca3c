"""What a stub model computes of a context that has nothing but itself: the right answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from erllama_backend_stub.context import StubContext
from erllama_backend_stub.model import StubModel
from erllama_backend_stub.options import StubOptions
from erllama_backend_stub.sampler import StubSampler
from erllama_backend_stub.vocabulary import VOCABULARY
from erllama_core.interfaces.backend import ContextOptions, Row, SamplingParams
from erllama_core.prompt import pack

GREEDY = SamplingParams()


@functools.cache
def stub(kv_class: str, eog_rate: float = 0.0) -> StubModel:
    options = StubOptions(kv_class=kv_class, eog_rate=eog_rate, digraphs=True)  # type: ignore[arg-type]
    return StubModel(options, ContextOptions(n_ctx=4096, n_batch=4096, n_seq_max=1), None)


def computed(kv_class: str, packed: bytes, eog_rate: float = 0.0) -> StubContext:
    """A context of its own that has computed these tokens, all at once."""
    context = stub(kv_class, eog_rate).open_context()
    context.step([Row(0, 0, packed, True)])
    return context


@functools.lru_cache(maxsize=4096)
def sampled(
    kv_class: str, packed: bytes, most: int, params: SamplingParams = GREEDY, eog_rate: float = 0.0
) -> tuple[int, ...]:
    """Up to ``most`` tokens that follow a prompt, the end of generation included."""
    context = computed(kv_class, packed, eog_rate)
    sampler = StubSampler(params, packed)
    said: list[int] = []
    while len(said) < most:
        said.append(context.sample(0, sampler))
        if said[-1] in VOCABULARY.end_of_generation:
            break
        length = len(packed) // 4 + len(said)
        context.step([Row(0, length - 1, pack(said[-1:]), True)])
    return tuple(said)


def alone(kv_class: str, prompt: str | Sequence[int], most: int) -> tuple[int, ...]:
    """The greedy reply to a prompt."""
    tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
    return sampled(kv_class, pack(tokens), most)

"""Callers of a stub model, many at a time, and whether what they get is right."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import deque
from typing import Any, Final

import attrs

from erllama_core import Completion, Done, Model, Stream
from erllama_core.errors import EngineReset, StickyBusy, TimeoutExceeded
from erllama_core.interfaces.backend import SamplingParams
from erllama_core.prompt import pack
from stub_alone import sampled
from torture.tally import Tally

MOST_TOKENS: Final = 12
"""Of a reply."""
_SEEDS: Final = 3
_TALE: Final = (
    "It was told of a miller that he had three sons, a mill, a donkey and a cat, no more. "
)
PROMPTS: Final = tuple(
    (_TALE * 3)[: 3 + 7 * (n % 12) + (130 if n % 5 == 0 else 0)] + "abcdef"[n % 6] * (n % 4)
    for n in range(60)
)
"""They begin alike and part at all places, as those of a service do."""
SESSIONS: Final = tuple(range(24))
PATIENCE_S: Final = 120.0
"""Without an answer for so long, a caller never gets one."""


class Answers:
    """What is right: what a context of its own says. Learnt before anything fails.

    Contexts that are asked later would meet the faults.
    """

    def __init__(self, kv_class: str = "span") -> None:
        self._kv_class = kv_class
        for prompt in PROMPTS:
            self.of(prompt, SamplingParams())
            for seed in range(_SEEDS):
                self.of(prompt, SamplingParams(temperature=0.9, seed=seed))

    def of(self, prompt: str, params: SamplingParams) -> tuple[int, ...]:
        """The reply to one of the prompts; remembered."""
        return sampled(self._kv_class, pack(prompt.encode()), MOST_TOKENS, params)

    def is_right(self, done: Completion, prompt: str, options: dict[str, Any]) -> bool:
        """Whether a reply, or the part of it that there is, is the right one."""
        params = SamplingParams(
            temperature=options.get("temperature", 0.0), seed=options.get("seed", 0)
        )
        said = done.generated
        return (
            said == self.of(prompt, params)[: len(said)]
            and done.context_tokens == (*prompt.encode()[: len(done.context_tokens)], *said)
            and done.committed_tokens == len(done.context_tokens)
        )


@functools.cache
def answers_of(kv_class: str) -> Answers:
    """What is right for a class of state; learnt when it is first asked for."""
    return Answers(kv_class)


@attrs.frozen(kw_only=True)
class Mix:
    """How often callers do what, as probabilities."""

    timeouts: float = 0.1
    salts: float = 0.1
    seeds: float = 0.1
    """Of a reply that is sampled, with a seed of its own."""
    sessions: float = 0.2
    prefills: float = 0.08
    """Of a prompt that is computed without a reply."""
    cancels: float = 0.15
    """At once."""
    late_cancels: float = 0.02
    """After the caller has waited for others."""
    session_ends: float = 0.01
    explained: tuple[type[Exception], ...] = ()
    """Errors that the fault explains."""


class Caller(threading.Thread):
    """Keeps some streams going until it has had its number of answers.

    Notes of the tally say how requests ended; ``answered`` are the last ones, so that it can be
    seen that nothing came after their end.
    """

    def __init__(
        self,
        model: Model,
        answers: Answers,
        tally: Tally,
        *,
        seed: str,
        count: int,
        streams: int = 8,
        mix: Mix = Mix(),
    ) -> None:
        super().__init__(daemon=True, name=f"caller {seed}")
        self._model, self._answers, self._tally, self._mix = model, answers, tally, mix
        self._count, self._streams = count, streams
        self._chance = random.Random(seed)
        self._open: deque[tuple[Stream, dict[str, Any], str, float]] = deque()
        self.answered: deque[Stream] = deque(maxlen=20)
        self.waits_s: list[float] = []
        """How long each answer took."""

    @property
    def running(self) -> list[Stream]:
        """Streams that have not been read to their end; any thread."""
        return [stream for stream, *_ in tuple(self._open)]

    def run(self) -> None:
        try:
            for _ in range(self._count):
                while len(self._open) >= self._streams:
                    self._finish()
                self._begin()
            while self._open:
                self._finish()
        except BaseException as error:  # noqa: BLE001 - told by the tally
            self._tally.accuse(f"{self.name}: {error!r}")

    def _happens(self, probability: float) -> bool:
        return self._chance.random() < probability

    def _begin(self) -> None:
        chance, mix = self._chance, self._mix
        prompt = chance.choice(PROMPTS)
        options: dict[str, Any] = {"response_tokens": chance.choice([1, 1, 2, 4, MOST_TOKENS])}
        if self._happens(mix.timeouts):
            options["timeout_s"] = chance.choice([0.0, 0.005, 0.05])
        if self._happens(mix.salts):
            options["cache_salt"] = chance.choice(["one", "two"])
        if self._happens(mix.seeds):
            options |= {"temperature": 0.9, "seed": chance.randrange(_SEEDS)}
        started = time.perf_counter()
        try:
            if self._happens(mix.sessions):
                stream = self._model.infer(prompt, session_id=chance.choice(SESSIONS), **options)
            elif self._happens(mix.prefills):
                stream = self._model.start_prefill(prompt)
                options = {}
            else:
                stream = self._model.infer(prompt, **options)
        except StickyBusy:
            self._tally.survive("StickyBusy")
            return
        except mix.explained as error:
            self._tally.lose(type(error).__name__)
            return
        if self._happens(mix.cancels):
            stream.cancel()
        if self._happens(mix.session_ends):
            end = chance.choice([self._model.end_session, self._model.reset_session])
            end(chance.choice(SESSIONS))
        self._open.append((stream, options, prompt, started))

    def _finish(self) -> None:
        stream, options, prompt, started = self._open.popleft()
        if self._happens(self._mix.late_cancels):
            stream.cancel()
        try:
            while not isinstance(stream.next_event(PATIENCE_S), Done):
                pass
        except TimeoutExceeded as error:
            # What the caller asked for: what there was until then must be right.
            self._judge(error.partial, options, prompt, "TimeoutExceeded")
        except EngineReset:
            self._tally.survive("EngineReset")  # a caller did that
        except self._mix.explained as error:
            self._tally.lose(type(error).__name__)
        else:
            done = stream.result()
            self._judge(done, options, prompt, done.finish_reason)
        self.waits_s.append(time.perf_counter() - started)
        if not stream._events._items.empty():  # noqa: SLF001 - nobody can see it from outside
            self._tally.accuse(f"{self.name}: something came after the end of {prompt!r}")
        self.answered.append(stream)

    def _judge(
        self, done: Completion | None, options: dict[str, Any], prompt: str, end: str
    ) -> None:
        if done is None or self._answers.is_right(done, prompt, options):
            self._tally.survive(end)
        else:
            self._tally.accuse(f"{prompt!r} {options}: {done.generated} in {done.context_tokens}")


def run_callers(callers: list[Caller], tally: Tally) -> bool:
    """Start them and wait for all; whether each of them came to its end."""
    for caller in callers:
        caller.start()
    return join_callers(callers, tally)


def join_callers(callers: list[Caller], tally: Tally) -> bool:
    """Wait for callers that were started; whether each of them came to its end."""
    for caller in callers:
        caller.join(10 * PATIENCE_S)
        if caller.is_alive():
            tally.accuse(f"{caller.name}: never got its answer")
    return not any(caller.is_alive() for caller in callers)


def check_at_rest(model: Model, tally: Tally, *, streams: int | None = None) -> None:
    """Nobody asks any more: all that requests had was given back. The engine was flushed."""
    info = model.info()
    free = info.n_seq_max if streams is None else streams
    tally.check(
        f"{info.available_seqs} of {free} sequences are free", holds=info.available_seqs == free
    )
    tally.check(f"pending_len is {model.pending_len()}", holds=model.pending_len() == 0)
    tally.check(f"queue_depth is {model.queue_depth()}", holds=model.queue_depth() == 0)
    left = model._worker._unfinished  # noqa: SLF001 - what a leak would be in
    tally.check(f"{len(left)} requests are still known", holds=not left)

"""llama.cpp computes what is not a number, or refuses a step, at random."""

from __future__ import annotations

import ctypes
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from llama_cpp import llama_cpp

from erllama_core import Model
from erllama_core.errors import DecodeFailed
from stub_engine import make_engine
from tiny_gguf import ARCHS, Arch, write_tiny_gguf
from torture.fault import Setup
from torture.real_answers import MOST_TOKENS, QUESTIONS, RealAnswers, load_real
from torture.store import check_whole
from torture.tally import Tally

CALLERS: Final = 3
REQUESTS: Final = 25
_REFUSALS: Final = (1, -1, -2, -3)
"""What ``llama_decode`` returns: no cells, a bad batch, no memory, a failed computation."""


_Said = tuple[int, tuple[int, ...], str]
"""A question's number, the reply, and what of it was stored."""


class NativeFaults:
    """Stands before ``llama_decode``, for all contexts of this process while it is active."""

    def __init__(self, chance: random.Random, n_vocab: int, one_in: int) -> None:
        self._chance, self._n_vocab, self._one_in = chance, n_vocab, one_in
        self._decode: Final[Callable[[Any, Any], int]] = llama_cpp.llama_decode
        self.spoilt = self.refused = 0

    def decode(self, context: Any, batch: Any) -> int:
        """A step that may be refused, or leaves a NaN in its logits."""
        lot = self._chance.randrange(2 * self._one_in)
        if lot == 0:
            self.refused += 1
            return self._chance.choice(_REFUSALS)
        status = int(self._decode(context, batch))
        if lot == 1 and status == 0:
            self.spoilt += 1
            logits = llama_cpp.llama_get_logits(context)
            pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
            pointer[self._chance.randrange(self._n_vocab)] = float("nan")
        return status

    @contextmanager
    def active(self) -> Iterator[None]:
        """Meanwhile, steps of this process go through it."""
        llama_cpp.llama_decode = self.decode
        try:
            yield
        finally:
            llama_cpp.llama_decode = self._decode


class NoNumbers:
    """The fault, on tiny models, one for each kind of memory of llama.cpp."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._n_questions = setup.times(len(QUESTIONS))
        self._answers: dict[str, RealAnswers] = {}
        self._paths: dict[str, Path] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="erllama-models-")

    def _known(self, arch: Arch) -> RealAnswers:
        if arch not in self._answers:
            path = write_tiny_gguf(Path(self._folder.name) / f"{arch}.gguf", arch)
            self._paths[arch] = path
            self._answers[arch] = RealAnswers(path, QUESTIONS[: self._n_questions], **OPTIONS)
        return self._answers[arch]

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve while steps fail; then in peace, on what was stored meanwhile."""
        arch = chance.choice(ARCHS)
        answers = self._known(arch)
        tally = Tally()
        tiers = [{"name": "disk", "kind": "disk", "root": str(folder / "root")}]
        with make_engine(tiers=tiers) as engine:
            options = {**OPTIONS["context_opts"], "kv_unified": chance.random() < 0.7}
            model = load_real(
                engine, self._paths[arch], ["ram", "disk"], **OPTIONS | {"context_opts": options}
            )
            n_vocab = model.info().n_vocab
            faults = NativeFaults(random.Random(chance.random()), n_vocab, chance.choice([8, 40]))
            with faults.active():
                said = self._serve(model, answers, chance, tally, REQUESTS)
                tally.check("the engine came to no rest", holds=engine.flush(60))
            tally.note("steps with NaN", faults.spoilt)
            tally.note("steps refused", faults.refused)
            said += self._serve(model, answers, chance, tally, 8)
            tally.check("the engine came to no rest", holds=engine.flush(60))
            self._judge(said, answers, tally)  # not before: it asks an undisturbed model
            info = model.info()
            tally.check("a sequence is not free", holds=info.available_seqs == info.n_seq_max)
            refused = engine.cache.counters().state_rejected
            # A NaN in the first step after a restore makes what was restored the suspect.
            tally.check(
                "stored state was given up for nothing", holds=not refused or faults.spoilt > 0
            )
            tally.note("stored contexts given up as suspects", refused)
        check_whole(folder / "root", tally)
        answers.note_rounded(tally)
        return tally

    def _serve(
        self, model: Model, answers: RealAnswers, chance: random.Random, tally: Tally, count: int
    ) -> list[_Said]:
        said: list[_Said] = []

        def ask(own: random.Random) -> None:
            try:
                for _ in range(self._setup.times(count)):
                    number = own.randrange(len(answers.prompts))
                    prompt = list(answers.prompts[number])
                    try:
                        done = model.complete(prompt, response_tokens=MOST_TOKENS)
                    except DecodeFailed:
                        tally.lose("DecodeFailed")
                    else:
                        said.append((number, done.generated, done.cache_hit_kind))
            except BaseException as error:  # noqa: BLE001 - told by the tally
                tally.accuse(f"a caller got {error!r}")

        askers = [
            threading.Thread(target=ask, args=(random.Random(chance.random()),))
            for _ in range(CALLERS)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        return said

    def _judge(self, said: list[_Said], answers: RealAnswers, tally: Tally) -> None:
        for number, generated, kind in said:
            if answers.is_right(number, generated):
                tally.survive(f"replies, {kind}")
            else:
                tally.accuse(f"question {number}, {kind}: {generated} is not the model's")

    def close(self) -> None:
        """Free the models."""
        for answers in self._answers.values():
            answers.close()
        self._folder.cleanup()


OPTIONS: Final[dict[str, Any]] = {
    "context_opts": {"n_ctx": 2048, "n_batch": 256},
    "policy": {"snapshot_interval": 64},
}


def open_fault(setup: Setup) -> NoNumbers:
    """See ``Known.module``."""
    return NoNumbers(setup)

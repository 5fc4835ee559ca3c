"""What a real model says when nobody disturbs it, and whether a reply is that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from erllama_core import Model
from stub_engine import make_engine
from torture.tally import Tally

MOST_TOKENS: Final = 12
"""Of a reply."""
ROUNDING: Final = 0.25
"""How far below the likeliest token one may be that was drawn, as a difference of logits.

Who else is in a batch changes how sums are rounded, in llama.cpp as in every engine; a token's
place in the vocabulary is decided by that where two are all but equally likely. What is wrong with
state, a block of another context or a stale one, moves logits by whole numbers.
"""
FINE: Final = 0.05
SEPARATE: Final = {"kv_unified": False, "n_ctx": 1024}
"""Context options with which nobody else's cells change how a reply is rounded.

In one pool the cells of others lie between a sequence's own, so that its sums are added up in
another order: on the demo model that alone moves logits by up to 0.7. With cells of its own a
sequence computes the same wherever it is and whatever it is batched with, but for one thing: a
prompt's token that is computed by itself comes out otherwise than together with the next one,
and beside replies that go on llama.cpp computes the first token of each slice by itself.
"""
_TALES: Final = (
    "The keeper of the lamp climbed the stairs each evening and counted them, and wrote down ",
    "When the oil ran short, the boats of the outer harbour were called in one after another. ",
    "Nothing of it remained but the chair by the window, the light, and the sound of the sea. ",
)
QUESTIONS: Final = tuple(
    (_TALES[n % 3] * 6)[: 120 + 80 * (n % 5)] + f"On day {n} the keeper" for n in range(12)
)
"""They begin alike and part at all places."""


def load_real(engine: Any, path: Path, tier: Sequence[str], **options: Any) -> Model:
    """The model as all of these load it.

    Without flash attention, which rounds more coarsely; with one thread, as threads of llama.cpp
    that share a processor with others wait for each other most of the time.
    """
    context = {"n_ctx": 4096, "n_seq_max": 4, "n_batch": 512, "n_threads": 1, "flash_attn": False}
    policy = {
        "boundary_align_tokens": 32,
        "min_tokens": 16,
        "cold_min_tokens": 16,
        "cost_gate": "off",
    }
    model: Model = engine.load_model(
        "real",
        backend="llama",
        model_path=str(path),
        tier=list(tier),
        context_opts=context | options.pop("context_opts", {}),
        policy=policy | options.pop("policy", {}),
        **options,
    )
    return model


class RealAnswers:
    """The undisturbed model: without tiers, one request at a time. Close it."""

    def __init__(self, path: Path, questions: Sequence[str] = QUESTIONS, **options: Any) -> None:
        self._engine: Final = make_engine()
        self._model: Final = load_real(self._engine, path, [], **options)
        self.prompts: Final = [tuple(self._model.tokenize(text)) for text in questions]
        self._answers: Final = [self._say(prompt, MOST_TOKENS) for prompt in self.prompts]
        self.rounded = 0
        """Replies that differed and were right all the same."""
        self.coarsely_rounded = 0
        """Of these, the ones with a token that was more than :data:`FINE` below the likeliest."""

    def _say(self, prompt: Sequence[int], most: int) -> tuple[int, ...]:
        return self._model.complete(list(prompt), response_tokens=most).generated

    def is_right(self, number: int, said: Sequence[int]) -> bool:
        """Whether ``said`` is, or begins, a reply to the question of that number."""
        prompt, said = self.prompts[number], tuple(said)
        if said == self._answers[number][: len(said)]:
            return True
        at, right, most = 0, self._answers[number], 0.0
        # From where they part, what the undisturbed model thinks of the token that was drawn.
        while said[at:] != right[at : len(said)]:
            at = next(n for n in range(at, len(said)) if n >= len(right) or said[n] != right[n])
            most = max(most, self._below((*prompt, *said[:at]), said[at]))
            if most > ROUNDING:
                return False
            at += 1
            rest = len(said) - at
            right = (*said[:at], *(self._say((*prompt, *said[:at]), rest) if rest else ()))
        self.rounded += 1
        self.coarsely_rounded += most > FINE
        return True

    def _below(self, context: Sequence[int], token: int) -> float:
        """How far a token is below the likeliest one, as a difference of logits."""
        done = self._model.complete(list(context), response_tokens=1, logprobs=20)
        assert done.logprobs is not None
        top = done.logprobs[0].top
        found = [top[0].logprob - one.logprob for one in top if one.token == token]
        return found[0] if found else math.inf

    def note_rounded(self, tally: Tally) -> None:
        """Tell a tally how many there were since it was told last."""
        tally.note("replies that differ by rounding", self.rounded)
        tally.note(f"of these, by more than {FINE}", self.coarsely_rounded)
        self.rounded = self.coarsely_rounded = 0

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

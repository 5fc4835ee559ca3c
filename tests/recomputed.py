"""What a model says of a reply when it computes the same tokens anew."""

from __future__ import annotations

import math

from erllama_core import Completion, Model


def off_by(model: Model, done: Completion) -> float:
    """How far below the likeliest token the first, a middle and the last one of a reply are, at
    most, as a difference of logits; each is computed anew under a salt of its own.
    """
    prompt, most = done.stats.prompt_tokens, 0.0
    for at in {0, len(done.generated) // 2, len(done.generated) - 1}:
        before = list(done.context_tokens[: prompt + at])
        anew = model.complete(before, response_tokens=1, logprobs=20, cache_salt=f"anew {at}")
        assert anew.logprobs is not None
        top = anew.logprobs[0].top
        below = [top[0].logprob - one.logprob for one in top if one.token == done.generated[at]]
        most = max(most, below[0] if below else math.inf)
    return most

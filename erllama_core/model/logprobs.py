"""Log-probabilities of sampled tokens, from a step's logits or from stored ones."""

from __future__ import annotations

import struct

from erllama_core.interfaces.backend import Context, Mark, TellsLogits, Vocabulary
from erllama_core.results import TokenLogprob


def row_logprob(
    context: Context, row: int, vocabulary: Vocabulary, token: int, n_top: int
) -> TokenLogprob:
    """Of a sampled token, with the ``n_top`` most likely ones, from a row of the last step."""
    assert isinstance(context, TellsLogits)
    mark = context.mark(row, max(1, n_top))
    return _of(mark, context.logit(row, token), vocabulary, token, n_top)


def marked_logprob(mark: Mark, vocabulary: Vocabulary, token: int, n_top: int) -> TokenLogprob:
    """The same from stored logits, among which the token's is: it was drawn from them."""
    place = struct.unpack(f"<{mark.size}I", mark.tokens).index(token)
    (logit,) = struct.unpack_from("<f", mark.logits, 4 * place)
    return _of(mark, logit, vocabulary, token, n_top)


def _of(mark: Mark, logit: float, vocabulary: Vocabulary, token: int, n_top: int) -> TokenLogprob:
    count = min(n_top, mark.size)
    best = zip(
        struct.unpack_from(f"<{count}I", mark.tokens),
        struct.unpack_from(f"<{count}f", mark.logits),
        strict=True,
    )
    top = tuple(
        TokenLogprob(other, vocabulary.piece(other), value - mark.logsumexp)
        for other, value in best
    )
    return TokenLogprob(token, vocabulary.piece(token), logit - mark.logsumexp, top)

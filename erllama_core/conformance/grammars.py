"""Grammars for the kit, written down rule by rule, and replies under them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from erllama_core.interfaces.backend import ConstrainedSampler, Context, Mark, Row
from erllama_core.interfaces.grammar import CharSet, Grammar


def _sequence(text: str, sets: Sequence[CharSet]) -> Grammar:
    return Grammar(f"root ::= {text}", (*sets, None), ((0,),), 0)


def spelling(text: str) -> Grammar:
    """Of one ASCII text, and nothing else."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return _sequence(f'"{quoted}"', [CharSet(((ord(c), ord(c)),)) for c in text])


_DIGIT: Final = CharSet(((ord("0"), ord("9")),))
DIGITS: Final = _sequence(
    '"{" [0-9] [0-9] "}"',
    [CharSet(((ord("{"), ord("{")),)), _DIGIT, _DIGIT, CharSet(((ord("}"), ord("}")),))],
)
"""Two digits in braces."""


def reply(
    context: Context, sampler: ConstrainedSampler, start: Mark | None, ends: Collection[int]
) -> list[int]:
    """Tokens drawn behind sequence 0, of which the last step left the only row; 8 at most.

    ``start``: draw the first one from stored logits; from the row where they do not do.
    """
    token = None if start is None else sampler.sample_mark(start)
    if token is None:
        token = context.sample(0, sampler)
    drawn = [token]
    while drawn[-1] not in ends and len(drawn) < 8:
        row = Row(0, context.length(0), drawn[-1].to_bytes(4, "little"), logits=True)
        context.step([row])
        drawn.append(context.sample(0, sampler))
    return drawn

"""How large a grammar may be, so that reading and following it takes bounded time and memory."""

from __future__ import annotations

from typing import Final

MOST_TEXT_BYTES: Final = 1 << 20
"""Of GBNF; 400 tools with eight parameters each take a sixth of it."""
MOST_ELEMENTS: Final = 200_000
"""Characters, references and ends of all rules, repetitions written out."""
MOST_NESTING: Final = 64
"""Brackets within brackets. llama.cpp's reader calls itself for each."""
MOST_REPEATS: Final = 1999
"""Of ``{m,n}``; what is repeated counts with all rules in it. llama.cpp's own limit, beyond which
it refuses, or takes ``{0,n}`` for any number."""
MOST_LEFTMOST: Final = 4000
"""Rules that begin with one another, in a row. llama.cpp calls itself for each."""
MOST_SEARCH: Final = 2_000_000
"""Elements that llama.cpp's search for left recursion looks at. It follows every way to a rule,
of which there can be exponentially many."""
MOST_PLACES: Final = 1024
"""Places in a grammar at which a reply may stand at once; each token is tried at all of them."""

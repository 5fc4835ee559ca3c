"""How many bytes conversations take that share their beginning, against the least possible."""

from __future__ import annotations

import random

from cache_sizes import Sizes
from figure import Figure

from erllama_core import Engine, load_config
from erllama_core.cache.keys import ContextKeys
from erllama_core.interfaces.block import ObjectKind
from erllama_core.prompt import pack

CELL_BYTES = 1024
SYSTEM_TOKENS = (300, 500, 1000)


def measure(sizes: Sizes) -> list[Figure]:
    """One ratio for each length of the system prompt."""
    return [figure for length in SYSTEM_TOKENS for figure in _figures(sizes, length)]


def _figures(sizes: Sizes, system_tokens: int) -> list[Figure]:
    rng = random.Random(system_tokens)
    with Engine(load_config({"cache": {"max_inflight_bytes": "1GiB"}}, environ={})) as engine:
        model = engine.load_model(
            "storage",
            backend="stub",
            context_opts={"n_ctx": 8192, "n_seq_max": 1},
            model_opts={"cell_bytes": CELL_BYTES},
        )
        system = [rng.randrange(256) for _ in range(system_tokens)]
        prefixes: set[bytes] = set()
        contexts = [list(system) for _ in range(sizes.conversations)]
        # Turn by turn, as a server sees them, not one conversation after the other.
        for _ in range(sizes.turns):
            for context in contexts:
                context += [rng.randrange(256) for _ in range(rng.randrange(20, 120))]
                reply = model.complete(context, response_tokens=rng.randrange(20, 120))
                context[:] = reply.context_tokens
                keys = ContextKeys(bytes(32), pack(context), 1)
                prefixes.update(keys.key(n) for n in range(1, len(keys) + 1))
        engine.flush()
        catalog = engine.cache.catalog
        stored, other, cells = 0, 0, 0
        for entry in catalog.index:
            [copy] = entry.copies
            assert copy.tier.keeps is not None
            pages = copy.tier.keeps.borrow(entry.object_id)
            payload = len(pages.view)
            pages.release()
            if entry.object_id.kind is ObjectKind.KV:
                stored += payload
                cells += entry.end - entry.start
                other += copy.size_bytes - payload
            else:
                other += copy.size_bytes
    least = CELL_BYTES * len(prefixes)
    name = f"{sizes.conversations} x {sizes.turns} turns, system prompt of {system_tokens}"
    return [
        Figure(
            name=f"{name}: KV stored / KV of distinct tokens",
            measured=stored / least,
            target=1.05,
            digits=4,
        ),
        Figure(
            name="    distinct tokens that are stored",
            measured=100 * cells / len(prefixes),
            unit="%",
            digits=1,
        ),
        Figure(
            name="    headers and marks, per distinct token",
            measured=other / len(prefixes),
            unit="bytes",
            digits=1,
        ),
    ]

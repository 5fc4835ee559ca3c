"""What the process of a bare loop does; ``serving_bare`` starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from bare_loop import BareLoop
from child_loop import Commands, serve


class Bare:
    """A loop, and the states that it has computed."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._loop = BareLoop(
            Path(setup["model"]),
            unified=setup["unified"],
            n_ctx=setup["n_ctx"],
            n_seq=setup["n_seq"],
        )
        self._states: dict[tuple[int, ...], Any] = {}

    def fill(self, asked: dict[str, Any]) -> None:
        """Give the sequences their contexts."""
        contexts = [tuple(tokens) for tokens in asked["contexts"]]
        state = self._states.get(contexts[0])
        if state is None:
            state = self._states[contexts[0]] = self._loop.compute(contexts[0])
        self._loop.fill(state, contexts, shared_tokens=asked["shared_tokens"])

    def decode(self, steps: int) -> dict[str, Any]:
        """So many steps of all sequences."""
        return attrs.asdict(self._loop.decode(steps))


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    bare = Bare(setup)
    return {}, {"fill": bare.fill, "decode": bare.decode}


if __name__ == "__main__":
    serve(_start)

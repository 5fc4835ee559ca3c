"""A bare loop in a process of its own, as everybody has who is measured beside it.

llama.cpp's threads wait for one another in loops of the processor while no more of them exist in
a process than it has cores, and asleep otherwise: two contexts in one process are each some five
per cent slower than alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from bare_loop import Steps
from child_process import OURS, ChildProcess


class BareLoopProcess:
    """:class:`~bare_loop.BareLoop`, which says what ``n_ctx`` and ``n_seq`` are."""

    def __init__(self, path: Path, *, unified: bool, n_ctx: int, n_seq: int) -> None:
        setup = {"model": str(path), "unified": unified, "n_ctx": n_ctx, "n_seq": n_seq}
        self._child = ChildProcess(OURS, "serving_bare_child", setup)

    def fill(self, contexts: Sequence[Sequence[int]], *, shared_tokens: int) -> None:
        """See :meth:`BareLoop.fill`; the first one's state is computed the first time."""
        self._child.do("fill", {"contexts": contexts, "shared_tokens": shared_tokens})

    def decode(self, steps: int) -> Steps:
        """See :meth:`BareLoop.decode`."""
        return Steps(**self._child.do("decode", steps))

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

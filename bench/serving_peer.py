"""llama-server as a peer: in a child process, with its own llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import attrs
from child_process import PEERS, ChildProcess, PeerUnavailable
from serving_load import Ask, Reply

from erllama_backend_llama.context_params import default_threads

__all__ = ["LlamaServerPeer", "PeerUnavailable"]


class LlamaServerPeer:
    """The same file, threads and context as ErllamaServer; see there for ``n_ctx``.

    ``keeps_idle_slots``: what ``spread_slot`` restored stays until it is asked for. Raises
    PeerUnavailable.
    """

    def __init__(
        self,
        path: Path,
        *,
        unified: bool,
        n_ctx: int,
        n_seq: int,
        keeps_idle_slots: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="erllama-bench-")
        try:
            self._child = ChildProcess(
                PEERS,
                "serving_peer_child",
                {
                    "model": str(path),
                    "unified": unified,
                    "n_ctx": n_ctx,
                    "n_seq": n_seq,
                    "keeps_idle_slots": keeps_idle_slots,
                    "threads": default_threads(),
                    "folder": self._folder.name,
                },
            )
        except BaseException:
            self._folder.cleanup()
            raise
        self.version: str = self._child.about["version"]
        self.build: str = self._child.about["build"]

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        return [
            Reply(asked_at=reply["asked_at"], token_times=tuple(reply["token_times"]))
            for reply in self._child.do("ask", [attrs.asdict(ask) for ask in asks])
        ]

    def spread_slot(self, n_slots: int) -> None:
        """Give ``n_slots`` slots the state of the first, in cells of their own; empty the rest."""
        self._child.do("spread_slot", n_slots)

    def close(self) -> None:
        """End the process."""
        self._child.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

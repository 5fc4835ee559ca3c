"""What goes into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from erllama_core.interfaces.backend import Row
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_core.model.request import Phase, Request

_MIN_CHUNK: Final = 64


class TickComposer:
    """Composes batches: running replies first, then parts of prompts in fair turns.

    A prompt gets at most ``chunk_tokens`` of a batch (None: a quarter of it, 64 at least), so
    that a long one does not keep the others waiting.
    """

    def __init__(self, batch_tokens: int, chunk_tokens: int | None) -> None:
        self._batch_tokens: Final = batch_tokens
        self._chunk_tokens: Final = chunk_tokens or max(_MIN_CHUNK, batch_tokens // 4)
        self._turn = 0

    def compose(self, active: Sequence[Request]) -> tuple[list[Request], list[Row]]:
        """The requests that take part in the next step, and their rows, in the same order."""
        batch: list[Request] = []
        rows: list[Row] = []
        room = self._batch_tokens

        def add(request: Request, stop: int, *, logits: bool) -> int:
            start = request.computed
            tokens = bytes(request.tokens[TOKEN_BYTES * start : TOKEN_BYTES * stop])
            batch.append(request)
            rows.append(Row(request.seq, start, tokens, logits))
            return stop - start

        for request in active:
            if room and request.phase in {Phase.GENERATING, Phase.CLOSING}:
                room -= add(request, request.length, logits=True)
        prefilling = [request for request in active if request.phase is Phase.PREFILLING]
        if prefilling:
            self._turn = (self._turn + 1) % len(prefilling)
        for request in prefilling[self._turn :] + prefilling[: self._turn]:
            whole = request.prompt_tokens
            stop = min(whole, request.computed + min(self._chunk_tokens, room))
            if stop > request.computed:
                room -= add(request, stop, logits=stop == whole)
        return batch, rows

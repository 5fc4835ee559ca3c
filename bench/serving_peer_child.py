"""llama-server, run by xllamacpp in a process and an environment of its own.

Its commands come by ``child_loop``; ``serving_peer`` and ``compare`` say how to start it.
"""

from __future__ import annotations

import importlib
import json
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from child_loop import Commands, serve
from serving_load import Ask, Enough, run_at_once


class LlamaServer:
    """The server, and the requests that it understands."""

    def __init__(self, xllamacpp: Any, setup: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = setup["model"]
        params.n_ctx = setup["n_ctx"] * setup["n_seq"]
        params.n_parallel = setup["n_seq"]
        params.kv_unified = setup["unified"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
        params.slot_save_path = setup["folder"]
        params.fit_params = False  # it is to have the context that it was given
        params.verbosity = 1
        if setup.get("keeps_idle_slots"):
            # By default a new request moves idle slots' state, restored or not, into the prompt
            # cache, where a request that names its slot does not look for it.
            params.cache_idle_slots = False
        # Continuous batching, the prompt cache and automatic flash attention are its defaults.
        assert params.cont_batching
        assert params.cache_prompt
        self._n_seq: int = setup["n_seq"]
        self._server = xllamacpp.Server(params)

    def ask(self, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer all of them at once."""
        requests = [Ask(**{**ask, "tokens": tuple(ask["tokens"])}) for ask in asks]
        return [
            {"asked_at": reply.asked_at, "token_times": reply.token_times}
            for reply in run_at_once(requests, self._answer)
        ]

    def _answer(self, ask: Ask, enough: Enough) -> list[float]:
        times, _, end = self.complete(ask.tokens, ask.reply_tokens, ask.slot, enough)
        if len(times) != ask.reply_tokens and not enough():
            raise RuntimeError(f"{len(times)} tokens came, then {end[-500:]!r}")
        return times

    def complete(
        self,
        tokens: Sequence[int],
        reply_tokens: int,
        slot: int | None = None,
        enough: Enough | None = None,
    ) -> tuple[list[float], list[bytes], bytes]:
        """When tokens came, their events, and the last event, which says how it went."""
        body: dict[str, Any] = {
            "prompt": tokens,
            "n_predict": reply_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "stream": True,
            "cache_prompt": True,
        }
        if slot is not None:
            body["id_slot"] = slot
        times: list[float] = []
        events: list[bytes] = []
        end = b""

        def take(event: bytes) -> bool:
            nonlocal end
            if b'"finish_reason":null' in event:
                times.append(time.monotonic())
                events.append(event)
            else:
                end = event
            return enough is not None and enough()

        self._server.handle_completions(json.dumps(body).encode(), take)
        return times, events, end

    def spread_slot(self, n_slots: int) -> None:
        """Give slots 1 to ``n_slots`` - 1 the state of slot 0, and empty all others."""
        self.slot(0, "save")
        for slot in range(1, self._n_seq):
            self.slot(slot, "erase")
        for slot in range(1, n_slots):
            self.slot(slot, "restore")

    def slot(self, slot: int, action: str) -> None:
        """Have a slot's state saved, restored or erased: a file in the folder of the setup."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/slots/{slot}?action={action}",
            data=json.dumps({"filename": "slot"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()


def _start(setup: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    xllamacpp = importlib.import_module("xllamacpp")
    server = LlamaServer(xllamacpp, setup)
    about = {"version": xllamacpp.__version__, "build": xllamacpp.get_system_info()}
    return about, {"ask": server.ask, "spread_slot": server.spread_slot}


if __name__ == "__main__":
    serve(_start)

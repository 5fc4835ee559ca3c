"""llama-server, run by xllamacpp in a process and an environment of its own.

Reads lines of JSON from standard input and answers each on standard output; what the server
itself prints goes to standard error. The first line says how to start it, see ``serving_peer``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from serving_load import Ask, run_at_once


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

    def _answer(self, ask: Ask) -> list[float]:
        body: dict[str, Any] = {
            "prompt": ask.tokens,
            "n_predict": ask.reply_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "stream": True,
            "cache_prompt": True,
        }
        if ask.slot is not None:
            body["id_slot"] = ask.slot
        times: list[float] = []
        end = b""

        def take(event: bytes) -> bool:
            # The last event has no token, but how it went.
            nonlocal end
            if b'"finish_reason":null' in event:
                times.append(time.monotonic())
            else:
                end = event
            return False

        self._server.handle_completions(json.dumps(body).encode(), take)
        if len(times) != ask.reply_tokens:
            raise RuntimeError(f"{len(times)} tokens came, then {end[-500:]!r}")
        return times

    def spread_slot(self, n_slots: int) -> None:
        """Give slots 1 to ``n_slots`` - 1 the state of slot 0, and empty all others."""
        self._slot(0, "save")
        for slot in range(1, self._n_seq):
            self._slot(slot, "erase")
        for slot in range(1, n_slots):
            self._slot(slot, "restore")

    def _slot(self, slot: int, action: str) -> None:
        request = urllib.request.Request(
            f"{self._server.listening_address}/slots/{slot}?action={action}",
            data=json.dumps({"filename": "slot"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()


def main() -> None:
    """Serve until standard input ends."""
    # The server prints to standard output as well; only answers are to arrive there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    xllamacpp = importlib.import_module("xllamacpp")
    server = LlamaServer(xllamacpp, setup)
    answer({"version": xllamacpp.__version__, "build": xllamacpp.get_system_info()})
    commands: dict[str, Callable[..., Any]] = {"ask": server.ask, "spread_slot": server.spread_slot}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer({"done": commands[command["do"]](command["with"])})
        except Exception as error:  # noqa: BLE001 - told to the parent
            answer({"error": repr(error)})
    answers.flush()
    os._exit(0)  # its threads would run on


if __name__ == "__main__":
    main()

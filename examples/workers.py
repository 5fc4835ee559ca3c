"""Worker processes that share a cache: each serves prompts with an engine of its own.

    python examples/workers.py examples/config/worker_processes.toml [--workers 4] < prompts.txt

Each line of the input is a prompt, answered by whichever process is free. A real service would
have a web server in each process instead of a queue; what matters here is that every process
opens the same file, after it was started, and that no engine crosses a fork.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from multiprocessing.queues import Queue
from pathlib import Path

from erllama_core import Engine
from erllama_core.config import read_config
from erllama_core.logs import configure_logging

Asked = tuple[int, str]
Answered = tuple[int, int, str, int, str]


def serve(config: Path, asked: Queue[Asked | None], answered: Queue[Answered | None]) -> None:
    """One worker: answer prompts until there are no more."""
    configure_logging(read_config(config).config.logging)
    try:
        with Engine.from_config(config) as engine:
            model = engine.models()[0].id
            while (item := asked.get()) is not None:
                number, prompt = item
                done = engine.complete(model, prompt, response_tokens=16)
                engine.flush()  # so that the next one finds it, whoever is asked
                reused = done.cache_delta.read
                answered.put((number, os.getpid(), done.cache_hit_kind, reused, done.reply))
    finally:
        answered.put(None)


def main() -> int:
    """Start the workers, hand out the prompts, print what was answered, and by whom."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    asked: Queue[Asked | None] = context.Queue()
    answered: Queue[Answered | None] = context.Queue()
    workers = [
        context.Process(target=serve, args=(chosen.config, asked, answered))
        for _ in range(chosen.workers)
    ]
    for worker in workers:
        worker.start()
    for number, line in enumerate(sys.stdin):
        asked.put((number, line.rstrip("\n")))
    for _ in workers:
        asked.put(None)
    left = len(workers)
    while left:
        item = answered.get()
        if item is None:
            left -= 1
            continue
        number, process, kind, reused, reply = item
        print(f"{number}: {kind}, {reused} tokens reused, process {process}: {reply!r}", flush=True)
    for worker in workers:
        worker.join()
    return max(worker.exitcode or 0 for worker in workers)


if __name__ == "__main__":
    sys.exit(main())

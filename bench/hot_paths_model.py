"""Steps, tokens and loading: what they take, and what llama.cpp or the processor alone take."""

from __future__ import annotations

import ctypes
import queue
import statistics
import tempfile
import time
from pathlib import Path

import llama_cpp
import streams
from hot_paths_floors import Floors, median_s
from hot_paths_part import Part
from hot_paths_sizes import Sizes
from serving_bare import BareLoopProcess
from serving_engine import ErllamaServer
from serving_load import Ask
from serving_tick import watched

from erllama_backend_llama.context_params import default_threads
from erllama_core import Engine, load_config
from erllama_core.model.fingerprint import file_fingerprint

TAIL_TOKENS = 12


def tick(sizes: Sizes, path: Path) -> list[Part]:
    """A token of every running reply, with a shared prefix, greedy, its readers waiting for it."""
    return [part for streams in sizes.streams for part in _tick(sizes, path, streams)]


def _tick(sizes: Sizes, path: Path, n_streams: int) -> list[Part]:
    n_ctx = sizes.context_tokens + TAIL_TOKENS + sizes.tick_steps + 8
    with (
        ErllamaServer(path, unified=True, n_ctx=n_ctx, n_seq=n_streams) as server,
        BareLoopProcess(path, unified=True, n_ctx=n_ctx, n_seq=n_streams) as loop,
    ):
        prefix = server.prompts.ledger(0, sizes.context_tokens)

        def asks_of(run: int) -> list[Ask]:
            """Never the same twice: who finds its whole prompt stored has cells of its own."""
            tails = range(run * n_streams, (run + 1) * n_streams)
            return [
                Ask(
                    tokens=prefix + server.prompts.tail(number, TAIL_TOKENS),
                    reply_tokens=sizes.tick_steps,
                )
                for number in tails
            ]

        server.ask(asks_of(0))
        decode, passes, python, bare = [], [], [], []
        for run in range(max(1, sizes.runs // 2)):
            asks = asks_of(run + 1)
            with watched(n_streams) as ticks:
                server.ask(asks)
            decode += ticks.decode_ms
            passes += ticks.pass_ms
            python += ticks.python_ms
            loop.fill([ask.tokens for ask in asks], shared_tokens=sizes.context_tokens)
            done = loop.decode(sizes.tick_steps)
            bare.append((done.seconds - done.sampling_s) / done.steps)
    floor_s = statistics.median(bare)
    whole_ms = [sum(parts) for parts in zip(decode, passes, python, strict=True)]
    return [
        Part(
            name=f"tick of {n_streams} streams",
            seconds=statistics.median(whole_ms) / 1e3,
            floor_s=floor_s,
            floor="llama_decode in a bare loop",
        ),
        Part(
            name="    llama_decode",
            seconds=statistics.median(decode) / 1e3,
            floor_s=floor_s,
            floor="llama_decode in a bare loop",
        ),
        Part(
            name="    pass over the logits: checks them, draws greedily",
            seconds=statistics.median(passes) / 1e3,
        ),
        Part(name="    Python, backend's included", seconds=statistics.median(python) / 1e3),
    ]


def token(sizes: Sizes) -> list[Part]:
    """A token's way through the stream processors, again and again: nothing leaves the caches."""
    n_tokens = sizes.token_tokens
    data = (next(iter(streams.PARTS.values())) * 4).encode()
    vocabulary = streams.PieceVocabulary(data)

    def bare() -> float:
        items: queue.SimpleQueue[str] = queue.SimpleQueue()
        began = time.thread_time()
        for number in range(n_tokens):
            items.put(vocabulary.piece(number % vocabulary.n_tokens).decode("utf-8", "replace"))
        return time.thread_time() - began

    floor_s = min(bare() for _ in range(3)) / n_tokens
    return [
        Part(
            name=f"token through {what}",
            seconds=min(streams.seconds(vocabulary, n_tokens, names) for _ in range(3)) / n_tokens,
            floor_s=floor_s,
            floor="its text decoded and put into a queue",
        )
        for what, names in (
            ("UTF-8 assembly, which every reply has", ("utf8",)),
            ("all four processors", streams.NAMES),
        )
    ]


def load(sizes: Sizes, floors: Floors, path: Path) -> list[Part]:
    """A file in the page cache, to a model that can be asked."""
    options = {"n_ctx": 2048}
    with Engine(load_config({}, environ={})) as engine:

        def load_known() -> None:
            model = engine.load_model(
                "bench", backend="llama", model_path=str(path), context_opts=options
            )
            engine.unload(model)

        known_s = median_s(load_known, sizes.runs)
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        counter = iter(range(1 << 30))
        named_s = median_s(
            lambda: file_fingerprint(path, memory=Path(folder) / str(next(counter))),
            max(1, sizes.runs // 2),
        )
    return [
        Part(
            name="load and unload of a model whose file is known",
            seconds=known_s,
            floor_s=median_s(lambda: _load_bare(path, options["n_ctx"]), sizes.runs),
            floor="llama.cpp alone, and a first step",
        ),
        Part(
            name=f"    the first time: fingerprint of {path.stat().st_size / 1e6:.0f} MB",
            seconds=named_s,
            floor_s=path.stat().st_size / floors.sha256,
            floor="SHA-256 over the file",
        ),
    ]


def _load_bare(path: Path, n_ctx: int) -> None:
    """To the end of a first step, which is when all of the weights are there."""
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 2048, 512
    params.n_threads = params.n_threads_batch = default_threads()
    context = llama_cpp.llama_init_from_model(model, params)
    token = (ctypes.c_int32 * 1)(0)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
        raise RuntimeError("llama_decode failed in a bare context")
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)

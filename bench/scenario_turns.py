"""What a growing chat takes: each token once, or the whole of it at every turn."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
from child_process import PeerUnavailable
from compare.contestants import KINDS, Contestant
from compare.words import Question
from figure import Figure
from report import Section
from scenario_sizes import Sizes
from series import Axis, Plot, Series
from serving_load import Prompts

from erllama_backend_llama.context_params import default_threads
from erllama_core import Engine, load_config

PEER = "LlamaRAMCache"
_MB = 1e6


def kv_bytes_per_token(path: Path) -> int:
    """Keys and values of half precision, of a model with attention alone."""
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    width: int = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    width *= llama_cpp.llama_model_n_head_kv(model)
    layers: int = llama_cpp.llama_model_n_layer(model)
    llama_cpp.llama_model_free(model)
    return 2 * 2 * width * layers


def measure(sizes: Sizes, path: Path) -> Section:
    """One chat, re-sent in full at every turn; LlamaRAMCache is asked the same prompts.

    LlamaRAMCache saves the whole state when a reply ends. It counts the state alone against its
    capacity; the logits that it copies with each are told apart.
    """
    turn = sizes.turn_tokens + sizes.turn_reply_tokens
    n_ctx = sizes.system_tokens + sizes.turns * turn + 64
    lengths, ours, marks = [], [], []
    counted: list[float] = []
    held = 0
    absent = ""
    asked: list[tuple[int, ...]] = []
    with Engine(load_config({}, environ={})) as engine:
        model = engine.load_model(
            "chat", backend="llama", model_path=str(path), context_opts={"n_ctx": n_ctx}
        )
        prompts = Prompts(model.tokenize)
        context = prompts.ledger(0, sizes.system_tokens)
        for number in range(sizes.turns):
            asked.append(context + prompts.ledger(1 + number, sizes.turn_tokens))
            reply = model.complete(asked[-1], response_tokens=sizes.turn_reply_tokens)
            context = reply.context_tokens
            engine.flush()
            [ram] = [usage for usage in engine.cache.usage() if usage.tier == "ram"]
            lengths.append(len(context))
            ours.append(ram.used_bytes / _MB)
            marks.append(ram.by_kind["logits"].size_bytes / _MB)
    try:
        with Contestant(KINDS[PEER], path, n_ctx=n_ctx, threads=default_threads()) as peer:
            for tokens in asked:
                peer.answer(Question(tokens=tokens, reply_tokens=sizes.turn_reply_tokens))
                stored = peer.stored()
                counted.append(stored["counted"] / _MB)
                held = stored["held"]
    except PeerUnavailable as error:
        absent = str(error)
    x = tuple(float(1 + number) for number in range(sizes.turns))
    least = tuple(kv_bytes_per_token(path) * length / _MB for length in lengths)
    figures = [
        Figure(
            name=f"after {sizes.turns} turns, {lengths[-1]} tokens: stored",
            measured=ours[-1],
            unit="MB",
            digits=1,
        ),
        Figure(name="    of that, marks", measured=marks[-1], unit="MB", digits=2),
        Figure(
            name="    all that is stored, against the KV of its tokens",
            measured=ours[-1] / least[-1],
            digits=3,
        ),
    ]
    curves = [
        Series(who="erllama", x=x, y=tuple(ours)),
        Series(who="KV of the chat's tokens", x=x, y=least),
    ]
    if not absent:
        figures += [
            Figure(name=f"    {PEER}", measured=counted[-1], unit="MB", digits=1),
            Figure(
                name=f"    {PEER}, its copies of logits too",
                measured=held / _MB,
                unit="MB",
                digits=1,
            ),
            Figure(name=f"    {PEER}, times ours", measured=counted[-1] / ours[-1], digits=1),
        ]
        curves.append(Series(who=PEER, x=x, y=tuple(counted)))
    return Section(
        name="turns",
        title="Bytes of a chat that grows",
        figures=tuple(figures),
        plots=(
            Plot(
                name="bytes_stored_against_turns",
                title="Stored state of one chat",
                x=Axis("turns"),
                y=Axis("stored", "MB"),
                series=tuple(curves),
            ),
        ),
        notes=(f"{PEER} was not measured: {absent}",) if absent else (),
    )

"""Agents with one system prompt

Eight agents arrive together. What they all begin with is computed once, by one of them; the others
share its cells and compute their own question only.
"""

from concurrent.futures import ThreadPoolExecutor

from erllama_core import Engine

SHARED = "You are a helpful assistant who answers in one short sentence. " * 4

with Engine() as engine:
    engine.load_model("assistant", backend="stub", context_opts={"n_ctx": 8192, "n_seq_max": 8})

    def ask(number: int) -> int:
        prompt = f"{SHARED}Agent {number} asks a question."
        return engine.complete("assistant", prompt, response_tokens=8).cache_delta.read

    with ThreadPoolExecutor(8) as agents:
        reused = sorted(agents.map(ask, range(8)))
    print("computed the shared part:", sum(read < len(SHARED) for read in reused), "of 8")

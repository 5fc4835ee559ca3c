"""Many requests at once

With ``n_seq_max`` above 1 so many requests are computed together, in one native call a step, each
with its own seed and temperature. Further ones wait their turn. Long prompts are computed in
slices, so that they do not keep the others waiting.
"""

from concurrent.futures import ThreadPoolExecutor

from erllama_core import Engine

with Engine() as engine:
    options = {"n_ctx": 8192, "n_batch": 4096, "n_seq_max": 4}
    engine.load_model("chat", backend="stub", context_opts=options)

    def ask(seed: int) -> str:
        return engine.complete(
            "chat", "The same question for all.", temperature=1.0, seed=seed, response_tokens=24
        ).reply

    with ThreadPoolExecutor(8) as workers:
        together = list(workers.map(ask, [1, 2, 3, 4, 1, 2, 3, 4]))
    print("four seeds, four replies:", len(set(together)))
    print("alone the same:", [ask(seed) for seed in (1, 2, 3, 4)] == together[:4])

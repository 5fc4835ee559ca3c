"""Several models at once

All models share one cache; what they store is kept apart by all that makes KV state incompatible,
so the same prompt never mixes them up.
"""

from erllama_core import Engine

with Engine() as engine:
    engine.load_model("tiny", backend="stub", model_opts={"weights": "tiny"})
    engine.load_model("big", backend="stub", model_opts={"weights": "big"})
    prompt = "Summarise: one cache, two models, and none of them reads the other's state. " * 2
    replies = {name: engine.complete(name, prompt, response_tokens=8) for name in ("tiny", "big")}
    print("big read", replies["big"].cache_delta.read, "tokens of tiny's")
    print("replies differ:", replies["tiny"].reply != replies["big"].reply)
    engine.unload("tiny")
    print([info.id for info in engine.models()])

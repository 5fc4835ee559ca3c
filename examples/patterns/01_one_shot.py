"""Load a model and complete a prompt

The first call computes the prompt and stores its state; the same call again restores it, exactly
and in milliseconds, also after a restart. The fingerprint of the weights is computed by erllama.
"""

from erllama_core import Engine

config = {"tiers": [{"name": "my_disk", "kind": "disk", "root": "kvc", "quota_bytes": "10GiB"}]}
PROMPT = "Once upon a time, in a quiet village " + "by the sea " * 30

for run in ("first", "second"):
    with Engine.from_config(config) as engine:
        model = engine.load_model(
            model_path="model.gguf", tier=["my_disk"], context_opts={"n_ctx": 2048}
        )
        done = model.complete(PROMPT, response_tokens=16)
        print(f"{run} process: {done.cache_hit_kind}, {len(done.generated)} tokens of reply")

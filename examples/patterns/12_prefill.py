"""Warm a prompt without sampling

``prefill_only`` computes and saves a prompt, and draws nothing: before a burst of short requests,
or for a long system prompt that should always be at hand (``pin=True``).
"""

from erllama_core import Engine

with Engine() as engine:
    engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096})
    system = "You are careful, brief, and never compute the same prompt twice. " * 4
    warm = engine.prefill_only("chat", system, pin=True)
    print(warm.cache_hit_kind, warm.committed_tokens == len(system), "pinned:", warm.is_pinned)

    longer = engine.prefill_only("chat", system + "First question.", parent_key=warm.finish_key)
    print(longer.cache_hit_kind, longer.cache_delta.read == len(system))

    done = engine.complete("chat", system + "First question.", response_tokens=8)
    print(done.cache_hit_kind)
    print(engine.prefill_only("chat", "too short").finish_key)

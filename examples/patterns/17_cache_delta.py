"""What the cache did for a request

``cache_delta`` is what an API bills by: tokens that were read from what was stored, and tokens that
the request added.
"""

from erllama_core import Engine

with Engine() as engine:
    options = {"n_ctx": 4096, "resident_cells_max": 0}
    engine.load_model("chat", backend="stub", context_opts=options)
    prompt = "A prompt that is long enough to be saved, since short ones are not worth it. "
    print(f"{'':8} {'kind':8} {'read':>5} {'created':>8}   (the prompt has {len(prompt)} tokens)")
    for name, text in {
        "first": prompt,
        "again": prompt,
        "longer": prompt + "And a little more.",
        "short": "short",
    }.items():
        done = engine.complete("chat", text, response_tokens=10)
        delta = done.cache_delta
        print(f"{name:8} {done.cache_hit_kind:8} {delta.read:5} {delta.created:8}")
        engine.flush()

"""Look into the cache

Counters, every stored object, and making room by hand.
"""

from erllama_core import Engine

with Engine() as engine:
    engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096})
    engine.complete("chat", "Some context that is stored in blocks. " * 20, response_tokens=8)
    engine.flush()
    counters = engine.cache.counters()
    print("misses:", counters.misses, "saves:", counters.saves_cold + counters.saves_finish)
    for row in engine.cache.dump():
        print(f"{row.kind:7} [{row.start:4}, {row.end:4}) in {row.tier}: {row.status}")
    freed = engine.cache.evict_bytes(1, ["ram", "ram_file"])
    print("evicted:", freed.rows)
    engine.cache.gc()
    print("left:", len(engine.cache.dump()))

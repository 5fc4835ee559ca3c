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
    rows = engine.cache.dump()
    first = min((row for row in rows if row.kind == "kv"), key=lambda row: row.start)
    print(f"{first.kind} [{first.start}, {first.end}) in {first.tier}: {first.status}")
    print("tokens in blocks:", sum(row.end - row.start for row in rows if row.kind == "kv"))
    print("marks:", sum(row.kind == "logits" for row in rows))
    freed = engine.cache.evict_bytes(1, ["ram", "ram_file"])
    print("evicted:", freed.rows)
    engine.cache.gc()
    print("left:", len(engine.cache.dump()))

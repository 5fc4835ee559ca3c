"""A session that tracks its parent key

``finish_key`` names the whole context that a request leaves behind. As ``parent_key`` of the next
turn it is a hint: content decides what is reused, so a wrong one does no harm. It is None when the
context is too short to be saved (``min_tokens``).
"""

from erllama_core import CacheKey, Engine


def chat(prompt: str, parent: CacheKey | None) -> tuple[str, CacheKey | None]:
    done = engine.complete("chat", prompt, parent_key=parent, response_tokens=24)
    read, created = done.cache_delta.read, done.cache_delta.created
    print(f"{done.cache_hit_kind}: {read} read, {created} created")
    return done.reply, done.finish_key


with Engine() as engine:
    engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096})
    prompt = "User: hello, please tell me something about caches.\nAssistant:"
    reply, key = chat(prompt, None)
    prompt += f" {reply}\nUser: tell me a joke\nAssistant:"
    chat(prompt, key)
    print("resumed:", engine.cache.counters().hits_resume)

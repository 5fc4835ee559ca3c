"""Sticky sessions

A ``session_id`` keeps the context of a conversation in its very cells: the next turn goes on there,
and nothing is read from any tier. Any hashable value is an id.
"""

from erllama_core import Engine
from erllama_core.errors import StickyBusy

with Engine() as engine:
    options = {"n_ctx": 4096, "n_seq_max": 2}
    engine.load_model("chat", backend="stub", context_opts=options, model_opts={"decode_us": 1000})
    prompt = "User: tell me about sticky sessions, at some length.\nBot:"
    first = engine.complete("chat", prompt, session_id="conv-7", response_tokens=16)
    prompt += f"{first.reply}\nUser: and then?\nBot:"
    second = engine.complete("chat", prompt, session_id="conv-7", response_tokens=16)
    print(first.cache_hit_kind, "then", second.cache_hit_kind)
    print("read in place:", second.cache_delta.read == first.committed_tokens)

    stream = engine.infer("chat", prompt + "more", session_id="conv-7", response_tokens=2000)
    try:
        engine.complete("chat", prompt + "again", session_id="conv-7")
    except StickyBusy as error:
        print("busy:", type(error).__name__)
    stream.cancel()
    stream.result()
    engine.end_session("chat", "conv-7")
    engine.end_session("chat", "conv-7")  # unknown by now, and a no-op

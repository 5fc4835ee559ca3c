"""Stream tokens, and cancel

A stream is an iterator of events. ``next_event`` waits no longer than it is told to, and can be
called again. After ``cancel`` the stream still ends with ``Done``, which says so.
"""

from erllama_core import Done, Engine, TextDelta

with Engine() as engine:
    engine.load_model("chat", backend="stub", model_opts={"decode_us": 5000})
    tokens = engine.tokenize("chat", "Once upon a time, there was a cache.")
    stream = engine.infer("chat", tokens, response_tokens=200)
    n_events = 0
    while True:
        try:
            event = stream.next_event(timeout_s=30)
        except TimeoutError:
            stream.cancel()
            continue
        if isinstance(event, Done):
            break
        assert isinstance(event, TextDelta)
        n_events += 1
        if n_events == 10:
            stream.cancel()  # or engine.cancel(stream.request_id)
    print("cancelled:", event.stats.cancelled, event.stats.finish_reason)
    print("all 200 tokens:", event.stats.completion_tokens == 200)

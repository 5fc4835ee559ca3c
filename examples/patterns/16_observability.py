"""Watch without waiting

What a router asks to find the model with the least to do: none of it waits for a worker, whatever
that is computing.
"""

from erllama_core import Engine

with Engine() as engine:
    slow = {"decode_us": 2000}  # microseconds a step, so that there is something to watch
    engine.load_model("chat", backend="stub", context_opts={"n_seq_max": 1}, model_opts=slow)
    streams = [
        engine.infer("chat", f"{number} is the number of this prompt. " * 3, response_tokens=1500)
        for number in range(4)
    ]
    streams[0].next_event()
    print(engine.phase("chat"), "with", engine.pending_len("chat"), "waiting")
    print("streams:", engine.queue_depth("chat"), "of all models:", engine.queue_depth())
    hit = engine.last_cache_hit("chat")
    print("last hit:", hit and (hit.kind, hit.prefix_len))
    print("unknown:", engine.phase("nobody"), engine.pending_len("nobody"))
    for stream in streams:
        stream.cancel()

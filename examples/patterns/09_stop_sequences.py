"""Stop sequences

A reply ends where the first of the given texts begins, wherever tokens happen to be cut; nothing of
it is delivered, and the result says which one it was.
"""

from erllama_core import Engine, TextDelta

SCRIPT = ["One, two, three.\n\nUser: four?"]

with Engine() as engine:
    engine.load_model("chat", backend="stub", model_opts={"script": SCRIPT})
    prompt = engine.apply_chat_template("chat", [{"role": "user", "content": "Count."}])
    done = engine.complete("chat", prompt, stop_sequences=["END", "\n\nUser:"])
    print(repr(done.reply), done.finish_reason, repr(done.stop_sequence))

    stream = engine.infer("chat", prompt, stop_sequences=["END", "\n\nUser:"])
    text = "".join(event.text for event in stream if isinstance(event, TextDelta))
    print("streamed the same:", text == done.reply)

    whole = engine.complete("chat", prompt)
    print(whole.finish_reason, whole.stop_sequence)

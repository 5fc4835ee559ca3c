"""Chats and embeddings

A chat is rendered by the model's own template. An embedding is one vector for a text, pooled over
its tokens, from a context of its own over the same weights.
"""

import math

from erllama_core import Engine

with Engine() as engine:
    engine.load_model("assistant", model_path="model.gguf", context_opts={"n_ctx": 1024})
    prompt = engine.apply_chat_template(
        "assistant",
        [
            {"role": "system", "content": "You are concise."},
            {"role": "user", "content": "What is 2+2?"},
        ],
    )
    done = engine.infer("assistant", prompt, response_tokens=8).result()
    print("tokens of the prompt:", len(prompt), "of the reply:", len(done.generated) > 0)

    def likeness(one: str, other: str) -> float:
        a, b = engine.embed("assistant", one), engine.embed("assistant", other)
        length = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / length

    near = likeness("The quick brown fox jumps.", "A quick brown fox is jumping.")
    far = likeness("The quick brown fox jumps.", "Quarterly revenue fell by nine percent.")
    print("nearer in meaning, nearer in space:", near > far)

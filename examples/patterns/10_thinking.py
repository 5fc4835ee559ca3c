"""Extended thinking

What a model thinks between its markers comes as events of its own, can be capped, and carries a
signature with which it can be checked when a client sends it back.
"""

from pathlib import Path

from erllama_core import Engine, TextDelta, ThinkingDelta, ThinkingEnd

key = Path("signing-key")
key.write_bytes(b"a secret of at least thirty-two bytes")
key.chmod(0o600)
config = {"engine": {"thinking_signing_key_file": str(key)}}
SCRIPT = ["<think>23 * 17 is 391.</think>It is 391."]

with Engine.from_config(config) as engine:
    engine.load_model(
        "thinker",
        backend="stub",
        thinking_markers={"start": "<think>", "end": "</think>"},
        model_opts={"script": SCRIPT},
    )
    prompt = engine.apply_chat_template("thinker", [{"role": "user", "content": "23 * 17?"}])
    thinking, answer, signature = b"", b"", b""
    for event in engine.infer("thinker", prompt, thinking=True):
        match event:
            case ThinkingDelta(data=data):
                thinking += data
            case ThinkingEnd(signature=found):
                signature = found
            case TextDelta(data=data):
                answer += data
    print(thinking.decode(), "->", answer.decode())
    print("genuine:", engine.verify_thinking(thinking, signature))
    print("forged:", engine.verify_thinking(b"23 * 17 is 400.", signature))

    capped = engine.complete("thinker", prompt, thinking=True, thinking_budget_tokens=3)
    print(len(capped.thinking), "characters of thinking, then text:", repr(capped.reply[:8]))

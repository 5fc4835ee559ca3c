"""Tool calls, and putting them back byte by byte

What a model writes between its markers comes as events of its own. Kept under the tool's id, the
turn is put into the next prompt exactly as it was said, so that all of it is found in the cache.
"""

from erllama_core import Engine, ToolCallDelta, ToolCallEnd

CALL = '{"name": "weather", "arguments": {"town": "Oslo"}}'
SCRIPT = [f"<tool_call>{CALL}</tool_call>", "Cold."]

with Engine() as engine:
    engine.load_model(
        "agent",
        backend="stub",
        context_opts={"n_ctx": 4096},
        tool_call_markers={"start": "<tool_call>", "end": "</tool_call>"},
        model_opts={"script": SCRIPT},
    )
    messages = [{"role": "user", "content": "How is the weather in Oslo? " * 4}]
    stream = engine.infer("agent", engine.apply_chat_template("agent", messages))
    deltas, calls = b"", []
    for event in stream:
        match event:
            case ToolCallDelta(data=data):
                deltas += data
            case ToolCallEnd(data=data):
                calls.append(data)
    first = stream.result()
    print("whole:", calls == [CALL.encode()] == [deltas], "text:", repr(first.reply))

    print("kept:", engine.put_replay("agent", "call_1", first))
    messages.append({"role": "assistant", "content": first.reply, "replay": "call_1"})
    messages.append({"role": "tool", "content": "-4 degrees"})
    second = engine.complete("agent", engine.apply_chat_template("agent", messages))
    print(
        second.reply,
        "all of the turn before was read:",
        second.cache_delta.read >= first.committed_tokens,
    )

"""Continue a session with tokens

``continue_session`` appends tokens to what a session holds, whatever they are: nothing is compared
and nothing is looked up. ``expect_committed`` has it checked that the session holds what the caller
believes.
"""

from erllama_core import Engine
from erllama_core.errors import NoSession, TranscriptMismatch

with Engine() as engine:
    engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096})
    prompt = "User: hello, and please remember what I say.\nBot:"
    stats = engine.infer("chat", prompt, session_id=7, response_tokens=16).result().stats
    prior = stats.prompt_tokens + stats.completion_tokens

    suffix = engine.tokenize("chat", "\nUser: go on\nBot:")
    turn = engine.continue_session("chat", suffix, session_id=7, response_tokens=16).result()
    print(turn.cache_hit_kind)
    print("read:", turn.cache_delta.read == prior)
    print("created:", turn.cache_delta.created == len(suffix) + turn.stats.completion_tokens)

    try:
        engine.continue_session("chat", suffix, session_id=7, expect_committed=[1, 2, 3])
    except TranscriptMismatch as error:
        print("diverges at", error.diverge_at, "of", error.expected_len, "expected tokens")
    engine.end_session("chat", 7)
    try:
        engine.continue_session("chat", suffix, session_id=7)
    except NoSession:
        print("no session: give the whole prompt again")

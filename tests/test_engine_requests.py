"""Requests on the stub: streams, ends, cancellation, errors that stay where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from erllama_backend_stub.faults import gate
from erllama_core import Done, Engine, Model, TextDelta
from erllama_core.errors import (
    DecodeFailed,
    EngineClosed,
    InvalidPrompt,
    ModelNotFound,
    PromptTooLong,
)
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "Once upon a time, in a quiet village by the sea, there lived a keeper of lamps."
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def scripted(engine: Engine, *replies: str) -> Model:
    return load_stub(engine, "scripted", script=replies)


def test_a_stream_never_splits_a_character(engine: Engine) -> None:
    """Bytes of a character that come in several tokens leave in one delta."""
    reply = "naïve 日本 👩‍🚀 end"
    model = scripted(engine, reply)
    deltas = [e for e in model.infer(model.apply_chat_template(CHAT)) if isinstance(e, TextDelta)]
    assert "".join(delta.text for delta in deltas) == reply
    assert b"".join(delta.data for delta in deltas) == reply.encode()
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert len(deltas) == len(reply), "each character as soon as it is whole"


def test_bytes_that_are_not_text_are_replaced_and_kept(engine: Engine) -> None:
    """A reply cut inside a character is flushed: exact bytes, and U+FFFD as text."""
    model = scripted(engine, "ab日")
    done = model.complete(model.apply_chat_template(CHAT), response_tokens=4)
    assert done.reply == "ab\ufffd"
    stream = model.infer(model.apply_chat_template(CHAT), response_tokens=4)
    data = b"".join(e.data for e in stream if isinstance(e, TextDelta))
    assert data == "ab日".encode()[:4]


def test_the_end_of_generation_is_not_of_the_reply(engine: Engine) -> None:
    """A reply that ends by itself: stop, and the end token in no list."""
    model = scripted(engine, "fine.")
    prompt = model.apply_chat_template(CHAT)
    done = model.complete(prompt)
    assert (done.reply, done.finish_reason) == ("fine.", "stop")
    assert done.generated == tuple(b"fine.")
    assert done.context_tokens == (*prompt, *b"fine.")
    assert done.committed_tokens == len(prompt) + 5
    # The context that a stop leaves behind is whole, and found again.
    engine.flush()
    follow = model.complete([*done.context_tokens, *prompt], response_tokens=1)
    assert follow.cache_delta.read == done.committed_tokens


def test_a_reply_that_ends_at_once(engine: Engine) -> None:
    """A model that says nothing gives an empty reply, cold and from a mark."""
    model = scripted(engine, "")
    prompt = model.apply_chat_template(CHAT)
    for kind in ("cold", "exact"):
        done = model.complete(prompt)
        assert (done.reply, done.finish_reason, done.generated) == ("", "stop", ())
        assert done.cache_hit_kind == kind
        assert done.committed_tokens == len(prompt)
    engine.flush()
    assert model.info().available_seqs == 2


def test_a_reply_ends_with_the_context(engine: Engine) -> None:
    """Without response_tokens a reply goes on to the last cell, which is used."""
    model = load_stub(engine, context_opts={"n_ctx": 100})
    done = model.complete(PROMPT)
    assert done.finish_reason == "length"
    assert len(done.context_tokens) == done.committed_tokens == 100


def test_done_is_last_and_once(engine: Engine) -> None:
    """Done ends the stream; the result is there before, after and again."""
    model = load_stub(engine)
    stream = model.infer(PROMPT, response_tokens=5)
    events = list(stream)
    assert isinstance(events[-1], Done)
    assert [type(e) for e in events].count(Done) == 1
    assert list(stream) == []
    result = stream.result()
    assert result.reply == "".join(e.text for e in events if isinstance(e, TextDelta))
    assert result == stream.result()
    assert result.stats is events[-1].stats


def test_waiting_for_an_event_may_time_out(engine: Engine) -> None:
    """next_event raises TimeoutError when nothing comes, and the stream stays usable."""
    held = gate("timeout")
    model = load_stub(engine, faults={"hang_step": 2, "hang_gate": "timeout"})
    stream = model.infer(PROMPT, response_tokens=3)
    stream.next_event(10)
    assert held.wait_reached(10)
    with pytest.raises(TimeoutError):
        stream.next_event(0.01)
    held.open()
    assert len(stream.result().generated) == 3


def test_control_tokens_are_silent(engine: Engine) -> None:
    """A control token in a reply is generated, and has no text."""
    model = scripted(engine, "a<think>b")
    done = model.complete(model.apply_chat_template(CHAT))
    assert done.reply == "ab"
    assert len(done.generated) == 3


# ------------------------------------------------------------------ cancellation


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_cancel_ends_a_reply(engine: Engine, kv_class: str) -> None:
    """Cancel takes effect between two tokens; what was generated is whole, saved and found."""
    held = gate(f"cancel-{kv_class}")
    model = load_stub(
        engine, kv_class=kv_class, faults={"hang_step": 9, "hang_gate": f"cancel-{kv_class}"}
    )
    stream = model.infer(PROMPT)
    assert held.wait_reached(10)
    stream.cancel()
    stream.cancel()
    held.open()
    done = stream.result()
    assert (done.finish_reason, done.stats.cancelled) == ("cancelled", True)
    assert 8 <= len(done.generated) <= 9
    assert done.committed_tokens == len(done.context_tokens)
    stream.cancel()
    engine.flush()
    again = model.complete([*done.context_tokens, 65], response_tokens=1)
    assert again.cache_delta.read == done.committed_tokens
    engine.flush()
    assert model.info().available_seqs == 2


def test_cancel_while_the_prompt_is_computed(engine: Engine) -> None:
    """A prompt cut short commits what was computed of it, and has no finish key."""
    held = gate("prefill")
    model = load_stub(
        engine,
        policy={"prefill_chunk_size": 8},
        faults={"hang_step": 2, "hang_gate": "prefill"},
    )
    stream = model.infer(PROMPT)
    assert held.wait_reached(10)
    stream.cancel()
    held.open()
    done = stream.result()
    assert (done.finish_reason, done.generated, done.finish_key) == ("cancelled", (), None)
    assert done.committed_tokens == len(done.context_tokens) == 8, "the step was aborted"
    assert done.stats.first_token_s is None


def test_cancel_while_queued(engine: Engine) -> None:
    """A request that waits for a sequence is answered without having had one."""
    held = gate("queued")
    model = load_stub(
        engine, context_opts={"n_seq_max": 1}, faults={"hang_step": 1, "hang_gate": "queued"}
    )
    running = model.infer(PROMPT, response_tokens=4)
    assert held.wait_reached(10)
    waiting = model.infer(PROMPT, response_tokens=4)
    waiting.cancel()
    held.open()
    assert waiting.result().finish_reason == "cancelled"
    assert running.result().finish_reason == "length"


def test_leaving_or_dropping_a_stream_cancels(engine: Engine) -> None:
    """Neither a broken-off with block nor a forgotten stream keeps a sequence."""
    model = load_stub(engine, context_opts={"n_ctx": 100_000, "n_seq_max": 1})
    with model.infer(PROMPT) as stream:
        next(stream)
    dropped = model.infer(PROMPT)
    next(dropped)
    del dropped
    assert model.complete("next", response_tokens=2).finish_reason == "length"


def test_a_consumer_that_never_reads_slows_nobody(engine: Engine) -> None:
    """Events wait in the stream, not in the worker."""
    model = load_stub(engine)
    unread = model.infer(PROMPT, response_tokens=200)
    assert model.complete("other", response_tokens=3).finish_reason == "length"
    assert len(unread.result().generated) == 200


# ------------------------------------------------------------------- concurrency


def test_requests_together_get_their_own_results(engine: Engine) -> None:
    """Twelve callers on three sequences: each reply is the one that it would get alone."""
    model = load_stub(engine, context_opts={"n_ctx": 3000, "n_seq_max": 3})
    alone = load_stub(engine, "alone", tier=[])
    prompts = [f"{number} {PROMPT}"[: 20 + 7 * number] for number in range(12)]
    options = [{"temperature": 0.9, "seed": n} if n % 2 else {} for n in range(12)]
    results: dict[int, tuple[int, ...]] = {}

    def ask(number: int) -> None:
        done = model.complete(prompts[number], response_tokens=25, **options[number])  # type: ignore[arg-type]
        results[number] = done.generated

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(12):
        expected = alone.complete(prompts[number], response_tokens=25, **options[number])  # type: ignore[arg-type]
        assert results[number] == expected.generated
    assert engine.flush(10)
    assert model.info().available_seqs == 3
    assert model.info().status == "idle"


def test_a_small_context_serves_requests_in_turn(engine: Engine) -> None:
    """Requests whose cells do not fit together wait for each other instead of failing."""
    model = load_stub(engine, context_opts={"n_ctx": 120, "n_seq_max": 3, "kv_unified": True})
    streams = [model.infer(PROMPT, response_tokens=20) for _ in range(4)]
    assert {len(stream.result().generated) for stream in streams} == {20}


# ------------------------------------------------------------------------ errors


def test_a_failed_step_fails_its_requests_only(engine: Engine) -> None:
    """The caller gets the backend's error with its status; the next request works."""
    model = load_stub(engine, faults={"fail_step": 2})
    with pytest.raises(DecodeFailed) as caught:
        model.complete(PROMPT, response_tokens=5)
    assert caught.value.code < 0
    done = model.complete(PROMPT, response_tokens=5)
    assert done.cache_hit_kind == "exact", "what was computed before the failure is reused"
    engine.flush()
    assert model.info().available_seqs == 2


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_refused_import_is_computed_instead(engine: Engine, kv_class: str) -> None:
    """State that the backend refuses costs time, counts once, and changes no output."""
    model = load_stub(engine, kv_class=kv_class, faults={"fail_import": 1})
    first = model.complete(PROMPT, response_tokens=5)
    again = model.complete(PROMPT, response_tokens=5)
    assert (again.generated, again.cache_hit_kind) == (first.generated, "cold")
    assert engine.cache.counters().state_rejected == 1
    assert model.complete(PROMPT, response_tokens=5).cache_hit_kind == "exact"


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_refused_export_is_not_saved(engine: Engine, kv_class: str) -> None:
    """State that the backend does not give is not stored; the request does not notice."""
    model = load_stub(engine, kv_class=kv_class, faults={"fail_export": 1})
    first = model.complete(PROMPT, response_tokens=5)
    again = model.complete(PROMPT, response_tokens=5)
    assert again.generated == first.generated


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_an_export_that_lies_is_not_believed(engine: Engine, kv_class: str) -> None:
    """A stored state with a cell too few is refused when it comes back."""
    model = load_stub(engine, kv_class=kv_class, faults={"short_export": 1})
    first = model.complete(PROMPT, response_tokens=5)
    again = model.complete(PROMPT, response_tokens=5)
    assert again.generated == first.generated
    assert engine.cache.counters().state_rejected == 1


def test_prompts_that_cannot_be(engine: Engine) -> None:
    """Too long, empty, or of tokens that the model does not have: each says so."""
    model = load_stub(engine, context_opts={"n_ctx": 64})
    with pytest.raises(PromptTooLong) as long:
        model.complete("x" * 64)
    assert (long.value.prompt_tokens, long.value.limit_tokens) == (64, 64)
    assert model.complete("x" * 63).finish_reason == "length"
    with pytest.raises(InvalidPrompt, match="no tokens"):
        model.complete("")
    with pytest.raises(InvalidPrompt, match="outside the vocabulary"):
        model.complete([1, 2, 100_000])
    for wrong in ([-1], [1.5], ["a"], [2**40]):
        with pytest.raises(InvalidPrompt):
            model.complete(wrong)  # type: ignore[arg-type]


def test_options_that_cannot_be(engine: Engine) -> None:
    """An unknown option names the nearest one; a wrong value names what is needed."""
    model = load_stub(engine)
    with pytest.raises(TypeError, match="'temperature'"):
        model.complete(PROMPT, temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="response_tokens=0: a value at least 1"):
        model.complete(PROMPT, response_tokens=0)
    with pytest.raises(ValueError, match="top_p=2: a value from 0 to 1"):
        model.complete(PROMPT, top_p=2)
    with pytest.raises(TypeError, match="seed='x': an integer"):
        model.complete(PROMPT, seed="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature=nan"):
        model.complete(PROMPT, temperature=float("nan"))


def test_unknown_models_name_the_nearest(engine: Engine) -> None:
    """ModelNotFound says what is loaded, and is a LookupError."""
    load_stub(engine, "assistant")
    with pytest.raises(ModelNotFound, match="did you mean 'assistant'"):
        engine.complete("asistant", PROMPT)
    with pytest.raises(LookupError):
        engine.model("other")


# --------------------------------------------------------------------- lifecycle


def test_closing_answers_everybody() -> None:
    """Running and queued requests end with EngineClosed; closing twice is harmless."""
    engine = make_engine()
    held = gate("closing")
    model = load_stub(
        engine,
        context_opts={"n_seq_max": 1},
        faults={"hang_step": 3, "hang_gate": "closing"},
    )
    running, queued = model.infer(PROMPT), model.infer(PROMPT)
    assert held.wait_reached(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.open()
    closing.join(30)
    for stream in (running, queued):
        with pytest.raises(EngineClosed):
            stream.result()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.complete("stub", PROMPT)
    with pytest.raises(EngineClosed):
        model.complete(PROMPT)


def test_what_runs_at_the_end_is_saved(tmp_path: object) -> None:
    """A shutdown save: the next process goes on from where the last one was stopped."""
    from pathlib import Path

    root = Path(str(tmp_path))
    held = gate("shutdown")
    engine = make_engine(root)
    model = load_stub(engine, tier=["disk"], faults={"hang_step": 20, "hang_gate": "shutdown"})
    stream = model.infer(PROMPT)
    assert held.wait_reached(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.open()
    closing.join(30)
    with pytest.raises(EngineClosed):
        stream.result()
    with make_engine(root) as engine:
        model = load_stub(engine, tier=["disk"])
        whole = load_stub(engine, "plain", tier=[]).complete(PROMPT, response_tokens=40)
        again = model.complete(whole.context_tokens, response_tokens=1)
        assert again.cache_delta.read > len(PROMPT) + 10
        assert {row.save_reason for row in engine.cache.dump()} >= {"cold", "shutdown"}


def test_unload_frees_the_id(engine: Engine) -> None:
    """An unloaded model refuses, and its id can be loaded again; unknown ids are a no-op."""
    model = load_stub(engine)
    assert [info.id for info in engine.models()] == ["stub"]
    engine.unload(model)
    engine.unload(model)
    engine.unload("never loaded")
    assert engine.models() == []
    with pytest.raises(EngineClosed):
        model.complete(PROMPT)
    again = load_stub(engine)
    engine.unload(model)  # the old one: not the one that has its id now
    assert again.complete(PROMPT, response_tokens=2).finish_reason == "length"
    again.unload()
    assert engine.models() == []


def test_threads_are_joined() -> None:
    """After close no thread of the engine is left."""
    before = set(threading.enumerate())
    with make_engine() as engine:
        load_stub(engine, "a").complete(PROMPT, response_tokens=2)
        load_stub(engine, "b").complete(PROMPT, response_tokens=2)
    assert set(threading.enumerate()) <= before


def test_text_and_embeddings(engine: Engine) -> None:
    """tokenize, detokenize and embed, by model and through the engine."""
    model = load_stub(engine)
    tokens = engine.tokenize("stub", "a<|im_end|>é")
    assert len(tokens) == 4
    assert engine.detokenize(model, tokens) == "a<|im_end|>é"
    assert len(model.tokenize("a<|im_end|>", parse_special=False)) == 11
    assert engine.embed("stub", "a text") == model.embed(list(b"a text"))
    assert model.embed("a text") != model.embed("another")

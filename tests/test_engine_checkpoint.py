"""Models that cannot rewind, on real llama.cpp contexts: what is reused, and where from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erllama_core import Completion, Engine, Model
from stub_engine import make_engine
from tiny_gguf import Arch, write_tiny_gguf

SYSTEM = "You keep the lamp of a tower by the sea, and tell those who ask what you have seen. " * 4
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As most are: what opens a reply is what stands before it once it is rendered."""
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5}

WINDOWED = "lfm2 with a window"
"""A hybrid model whose attention looks back over a sliding window."""
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen35", {}),
    ("lfm2", {}),
    ("mamba", {}),
    ("gemma3", {}),
    ("gemma3", {"swa_full": False}),
    ("qwen35", {"kv_unified": False, "flash_attn": True}),
    ("lfm2", {"kv_unified": False}),
    ("mamba", {"kv_unified": False}),
    ("gemma3", {"kv_unified": False}),
    (WINDOWED, {}),
    (WINDOWED, {"swa_full": False}),
    (WINDOWED, {"kv_unified": False, "flash_attn": True}),
]
CUT = [kind for kind in KINDS if kind != ("gemma3", {})]
"""Those that cannot be cut."""

Load = Callable[..., Model]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ascii")
    archs: tuple[Arch, ...] = ("qwen35", "lfm2", "mamba", "gemma3")
    paths: dict[str, Path] = {
        arch: write_tiny_gguf(folder / f"{arch}.gguf", arch, says="text") for arch in archs
    }
    paths[WINDOWED] = write_tiny_gguf(
        folder / "windowed.gguf", "lfm2", says="text", hybrid_window=48
    )
    return paths


def load(engine: Engine, path: Path, context_opts: dict[str, Any], **options: Any) -> Model:
    """Nothing stays in the context: what is reused comes from a tier."""
    opts = {
        "n_ctx": 4096,
        "n_seq_max": 2,
        "n_threads": 1,
        "flash_attn": False,
        "resident_cells_max": 0,
    }
    chosen = {"tier": ["ram"], "policy": {"cost_gate": "off"}, "chat_template": TEMPLATE} | options
    return engine.load_model(
        backend="llama", model_path=str(path), context_opts=opts | context_opts, **chosen
    )


def question(turn: int) -> dict[str, str]:
    return {"role": "user", "content": f"And what was there to see on evening {turn}?"}


def chat(model: Model, turns: int, **options: Any) -> list[Completion]:
    """Ask, and render the whole conversation anew each turn."""
    messages = [{"role": "system", "content": SYSTEM}]
    said = []
    for turn in range(turns):
        messages.append(question(turn))
        prompt = model.apply_chat_template(messages)
        said.append(model.complete(prompt, response_tokens=48, **SAMPLED, **options))
        assert said[-1].reply.isascii()
        messages.append({"role": "assistant", "content": said[-1].reply})
    return said


@pytest.mark.parametrize(("arch", "context_opts"), KINDS, ids=str)
def test_a_chat_rendered_anew_reuses_the_turn_before(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """Over ten turns with sampled replies, 95 % of what the last turn committed is read."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        first, *others = chat(model, 10)
        assert first.cache_hit_kind == "cold"
        before = first
        for now in others:
            assert now.cache_hit_kind == "partial"
            assert now.cache_delta.read >= 0.95 * before.committed_tokens
            assert now.cache_delta.read + now.cache_delta.created == now.committed_tokens
            before = now
        assert engine.cache.counters().state_rejected == 0


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_a_reply_that_is_rendered_otherwise_costs_no_more_than_itself(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """Where a client drops or changes the reply, all before it is read."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        messages = [{"role": "system", "content": SYSTEM}, question(0)]
        model.complete(model.apply_chat_template(messages), response_tokens=30, **SAMPLED)
        asked = len(model.apply_chat_template(messages, add_generation_prompt=False))
        messages += [{"role": "assistant", "content": "Ships, as ever."}, question(1)]
        edited = model.complete(model.apply_chat_template(messages), response_tokens=5)
        assert edited.cache_delta.read >= asked


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_conversations_share_their_system_prompt(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """Another conversation reads what both begin with up to the end of a message."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        chat(model, 2)
        other = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "Who built it?"},
        ]
        prompt = model.apply_chat_template(other)
        system = len(model.apply_chat_template(other[:1], add_generation_prompt=False))
        done = model.complete(prompt, response_tokens=5)
        assert system - 4 <= done.cache_delta.read <= system + 4


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_what_others_left_becomes_a_branch_point(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """Where two prompts part in the middle of a text, a third one goes on from there."""
    text = "The keeper climbed the stairs each evening and counted them, one by one. " * 12
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        model.complete(text + "Then it rained.", response_tokens=4)
        second = model.complete(text + "So he slept.", response_tokens=4)
        third = model.complete(text + "Ten ships came.", response_tokens=4)
        parted = len(model.tokenize(text))
        assert second.cache_delta.read < parted - 100
        assert parted - 2 <= third.cache_delta.read <= parted
        assert engine.cache.counters().state_rejected == 0


@pytest.mark.parametrize(("arch", "context_opts"), KINDS, ids=str)
def test_the_same_prompt_again_computes_nothing(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path], tmp_path: Path
) -> None:
    """An exact hit samples from stored logits, in this process and in the next."""
    with make_engine(tmp_path) as engine:
        model = load(engine, weights[arch], context_opts, tier=["ram", "disk"])
        messages = [{"role": "system", "content": SYSTEM}, question(0)]
        prompt = model.apply_chat_template(messages)
        first = model.complete(prompt, response_tokens=20, **SAMPLED)
        again = model.complete(prompt, response_tokens=20, **SAMPLED)
        assert again.cache_hit_kind == "exact"
        assert again.cache_delta.read == len(prompt)
        assert again.generated[0] == first.generated[0]
    with make_engine(tmp_path) as engine:
        model = load(engine, weights[arch], context_opts, tier=["ram", "disk"])
        later = model.complete(prompt, response_tokens=20, **SAMPLED)
        assert (later.cache_hit_kind, later.generated[0]) == ("exact", first.generated[0])


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_a_prompt_that_ends_where_another_opened_its_reply_computes_nothing(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """The logits are kept there too: the chat without what opens the reply is an exact hit."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        messages = [{"role": "system", "content": SYSTEM}, question(0)]
        model.complete(model.apply_chat_template(messages), response_tokens=4)
        shorter = model.apply_chat_template(messages, add_generation_prompt=False)
        warm = model.complete(shorter, response_tokens=3)
        assert (warm.cache_hit_kind, warm.cache_delta.read) == ("exact", len(shorter))
        cold = model.complete(shorter, response_tokens=3, cache_salt="another")
        assert cold.cache_hit_kind == "cold"
        assert warm.generated == cold.generated


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_a_prompt_that_is_what_others_have_in_common_computes_nothing(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """Where two prompts part, the logits are kept beside the snapshot."""
    common = [40 + 7 * at % 80 for at in range(300)]
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        model.complete([*common, *[50] * 40], response_tokens=4)
        model.complete([*common, *[60] * 40], response_tokens=4)
        warm = model.complete(common, response_tokens=3)
        assert (warm.cache_hit_kind, warm.cache_delta.read) == ("exact", len(common))
        cold = model.complete(common, response_tokens=3, cache_salt="another")
        assert warm.generated == cold.generated


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_snapshots_of_a_context_are_bounded(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """However long a chat goes on, its snapshots and marks take what the policy says."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts)
        chat(model, 1)
        engine.flush()
        rows = engine.cache.dump()
        most = 5 * max(row.size_bytes for row in rows if row.kind == "snapshot") + 8192
        engine.cache.gc()
        assert not engine.cache.dump()
        policy = {"cost_gate": "off", "snapshot_bytes_max": most, "snapshot_interval": 64}
        bounded = load(engine, weights[arch], context_opts, policy=policy)
        said = chat(bounded, 8)
        engine.flush()
        rows = [row for row in engine.cache.dump() if row.kind in {"snapshot", "logits"}]
        held = sum(row.size_bytes for row in rows)
        assert held <= most
        assert engine.cache.counters().thinned > 8
        assert {row.end for row in rows} >= {said[-1].committed_tokens}


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_sessions_and_live_sequences_go_on_where_they_are(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """A session sticks to its cells, a resident is shared whole, and both are told as such."""
    with make_engine() as engine:
        opts = context_opts | {"resident_cells_max": None, "n_seq_max": 3}
        model = load(engine, weights[arch], opts, tier=[])
        text = model.tokenize("The lamp was lit when the first ship came around the cape. " * 4)
        first = model.complete(text, response_tokens=8, session_id="a")
        assert first.cache_hit_kind == "cold"
        more = model.continue_session([70, 71, 72], session_id="a", response_tokens=8).result()
        assert more.cache_hit_kind == "continuation"
        assert more.cache_delta.read == first.committed_tokens
        longer = [*more.context_tokens, 75, 76]
        other = model.complete(longer, response_tokens=8)
        assert other.cache_hit_kind == "partial"
        assert other.cache_delta.read == more.committed_tokens
        sticky = model.complete(longer, response_tokens=8, session_id="a")
        assert sticky.cache_hit_kind == "sticky"
        assert sticky.generated[:2] == other.generated[:2]


@pytest.mark.parametrize(("arch", "context_opts"), CUT, ids=str)
def test_requests_that_begin_alike_compute_it_once(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """The leader's slice ends where they part, and its state there is shared."""
    with make_engine() as engine:
        model = load(engine, weights[arch], context_opts | {"n_batch": 128}, tier=[])
        text = "The lamp was lit when the first ship came around the cape. " * 20
        prompts = [text + "Then it rained.", text + "So he slept."]
        streams = [model.infer(prompt, response_tokens=8) for prompt in prompts]
        done = [stream.result() for stream in streams]
        assert [one.cache_hit_kind for one in done] == ["cold", "partial"]
        assert done[1].cache_delta.read >= len(model.tokenize(text)) - 2
        alone = [model.complete(prompt, response_tokens=8) for prompt in prompts]
        assert [one.generated[0] for one in alone] == [one.generated[0] for one in done]


@pytest.mark.parametrize(
    ("arch", "context_opts"), [("qwen35", {}), ("gemma3", {"swa_full": False})]
)
def test_cells_that_run_short_are_given_up_and_come_back(
    arch: str, context_opts: dict[str, Any], weights: dict[str, Path]
) -> None:
    """A request that is set aside goes on from the snapshot that was taken of it."""
    with make_engine() as engine:
        opts = context_opts | {"n_ctx": 512, "n_seq_max": 3}
        model = load(engine, weights[arch], opts)
        texts = [f"{word} ships came around the cape. " * 3 for word in ("Ten", "Two", "No")]
        streams = [model.infer(text, response_tokens=150) for text in texts]
        done = [stream.result() for stream in streams]
        assert model.info().preemptions > 0
        assert [len(one.generated) for one in done] == [150] * 3
        counters = engine.cache.counters()
        assert (counters.state_rejected, counters.corrupt) == (0, 0)

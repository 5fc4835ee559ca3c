"""Explanations: a request, a model and the command line say why a prompt hit or missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from erllama_core import CacheKey, Explanation
from stub_engine import KV_CLASSES, load_stub, make_engine

PROMPT = "The first forty tokens are the same, and then the two of them part for good."


def explained(explanation: Explanation | None) -> Explanation:
    assert explanation is not None
    return explanation


def test_nothing_is_explained_unless_asked() -> None:
    """Without explain=True a request carries no explanation."""
    with make_engine() as engine:
        assert load_stub(engine).complete(PROMPT, response_tokens=1).stats.explain is None


@pytest.mark.parametrize("kv_class", KV_CLASSES)
def test_a_miss_and_an_exact_hit(kv_class: str) -> None:
    """Nothing stored; then everything, and where it came from."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class)
        miss = model.complete(PROMPT, response_tokens=2, explain=True).stats.explain
        assert explained(miss).kind == "cold"
        assert explained(miss).diverges_at == 0
        if kv_class == "span":
            assert explained(miss).reason.startswith("nothing is stored that begins like this")
        engine.flush()
        hit = explained(model.complete(PROMPT, response_tokens=2, explain=True).stats.explain)
        assert (hit.kind, hit.reused_tokens, hit.tiers) == ("exact", len(PROMPT), ("ram",))
        assert hit.restored_bytes > 0
        assert hit.restore_s > 0
        assert hit.reason == f"all {len(PROMPT)} tokens and the logits after them are stored"


def test_a_divergence_is_shown_with_its_text() -> None:
    """The first token that is not stored, the prompt around it, and how the stored one goes on."""
    with make_engine() as engine:
        model = load_stub(engine)
        model.complete(PROMPT, response_tokens=2)
        other = PROMPT[:40] + "XYZ and something else"
        why = model.why(other)
        assert (why.kind, why.reused_tokens, why.diverges_at) == ("partial", 40, 40)
        assert why.prompt_text == other[28:52]
        assert why.stored_text == PROMPT[40:52]
        assert "goes on differently" in why.reason
        ends = model.why([*model.complete(PROMPT, response_tokens=2).context_tokens, 65, 66])
        assert ends.stored_text is None
        assert ends.reason.endswith("the stored context ends there")
        before = engine.cache.counters()
        model.why(PROMPT)
        assert engine.cache.counters().hits_exact == before.hits_exact, "asking is no hit"


def test_what_other_tiers_hold_is_no_divergence(tmp_path: Path) -> None:
    """A context that is stored where this model does not look goes on like the prompt."""
    with make_engine(tmp_path) as engine:
        load_stub(engine, "other", tier=["disk"]).complete(PROMPT, response_tokens=2)
        assert engine.flush(10)
        why = load_stub(engine, tier=["ram"]).why(PROMPT)
        assert (why.kind, why.diverges_at) == ("cold", 0)
        assert why.stored_text == PROMPT[:12]
        assert "more is stored, in tiers that this model does not use" in why.reason


def test_what_kept_stored_state_from_being_used() -> None:
    """A sampling that no mark serves, a salt, and a backend that refuses."""
    with make_engine() as engine:
        model = load_stub(engine, faults={"fail_import": 2})
        model.complete(PROMPT, response_tokens=2)
        options = {"temperature": 1.0, "top_k": 0}
        kept = model.complete(PROMPT, response_tokens=2, explain=True, **options)  # type: ignore[arg-type]
        # The stub's vocabulary is smaller than a mark, which is therefore whole.
        assert explained(kept.stats.explain).kind == "exact"
        refused = model.complete(PROMPT, response_tokens=2, explain=True).stats.explain
        assert explained(refused).kind == "cold"
        assert "refused" in explained(refused).reason
        assert model.why(PROMPT, cache_salt="other").reused_tokens == 0


def test_a_parent_key_is_a_hint() -> None:
    """The key of the turn before counts as resumed; any other key changes nothing."""
    with make_engine() as engine:
        model = load_stub(engine)
        first = model.complete(PROMPT, response_tokens=8)
        turn = [*first.context_tokens, *b" And then?"]
        again = model.complete(turn, response_tokens=4, parent_key=first.finish_key)
        assert again.cache_delta.read == first.committed_tokens
        assert engine.cache.counters().hits_resume == 1
        engine.flush()
        unknown = model.complete(turn, response_tokens=4, parent_key=CacheKey(bytes(32)))
        assert unknown.generated == again.generated
        assert unknown.cache_delta.read == len(turn)
        assert engine.cache.counters().hits_resume == 1
        other = model.complete("Something else entirely", parent_key=first.finish_key)
        assert other.cache_hit_kind == "cold"


def test_the_command_compares_two_prompts(tmp_path: Path) -> None:
    """erllama why on a service's configuration, in words and as JSON."""
    config = tmp_path / "service.toml"
    config.write_text(
        f"""
        [[tiers]]
        name = "disk"
        kind = "disk"
        root = "{tmp_path / "root"}"

        [models.fake]
        backend = "stub"
        tier = ["disk"]
        policy = {{ min_tokens = 8, cold_min_tokens = 8, boundary_align_tokens = 32 }}
        context_opts = {{ n_ctx = 1024, n_seq_max = 2 }}
        """
    )
    with make_engine(tmp_path / "root") as engine:
        load_stub(engine, tier=["disk"]).complete(PROMPT, response_tokens=4)
    (tmp_path / "a").write_text(PROMPT)
    (tmp_path / "b").write_text(PROMPT[:40] + "but otherwise")
    command = [sys.executable, "-m", "erllama_core", "why", "--config", str(config)]
    command += ["--model", "fake", "--prompt-file", str(tmp_path / "a")]
    both = [*command, "--prompt-file", str(tmp_path / "b")]

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    answer = json.loads(run([*both, "--json"]).stdout)
    assert [p["kind"] for p in answer["prompts"]] == ["exact", "partial"]
    assert answer["prompts"][1]["reused_tokens"] == answer["parting"]["at"] == 40
    words = run(both).stdout
    assert f"exact, {len(PROMPT)} of {len(PROMPT)} tokens" in words
    assert "the two prompts share 40 tokens" in words
    wrong = run([*command[:-3], "fak", *command[-2:]])
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "did you mean 'fake'?" in wrong.stderr
    (tmp_path / "a").write_bytes(b"text\xff")
    wrong = run(command)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "a: not UTF-8 at byte 4" in wrong.stderr

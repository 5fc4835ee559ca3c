"""The comparison with others runs at tiny sizes, and makes of single measurements what it says."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import attrs
import everything
import pytest
from child_process import PEERS, ChildProcess, PeerUnavailable
from compare import judged, one_request, talks
from compare.contestants import BARE, KINDS, OWN, Contestant, Field
from compare.samples import Sample, Samples, ratios
from compare.sizes import QUICK
from compare.words import common_tokens
from figure import Figure
from report import Section, read_json, write_json

from tiny_gguf import write_tiny_gguf

SCRIPT = Path(__file__).parents[1] / "bench" / "compare"
PIECES = {piece.name: piece for piece in everything.pieces()}
MISSED = Figure(name="too slow", measured=2.0, target=1.0)
TINY = attrs.evolve(
    QUICK, rounds=MappingProxyType({128: 1}), talk_ctx=2048, turn_reply_tokens=4, turns=2
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", says="text")


def computed(samples: Samples, who: str) -> dict[str, int]:
    return {one.scenario: one.computed_tokens for one in samples.samples if one.who == who}


def requests(tiny: Path, names: list[str]) -> Samples:
    samples = Samples()
    one_request.measure(tiny, names, one_request.TITLES, 128, 1, TINY, samples, threads=1)
    return samples


def test_each_request_computes_what_it_must(tiny: Path) -> None:
    """A cold prompt is computed whole, an exact hit and a restart not at all; by hand one token."""
    samples = requests(tiny, [OWN, BARE])
    assert samples.absent == {}
    ours, by_hand = computed(samples, OWN), computed(samples, BARE)
    assert ours["cold"] == by_hand["cold"] == by_hand["returned"] == 128
    assert ours["exact"] == ours["returned"] == ours["restart"] == 0
    assert by_hand["exact"] == by_hand["restart"] == 1
    assert by_hand["longer"] == by_hand["branch"] == TINY.tail_tokens
    assert len(samples.runs(one_request.FLOOR, 128, BARE)) == 1
    found = {section.name: section for section in judged.sections(samples)}
    assert list(found) == list(one_request.TITLES)
    names = [figure.name.strip() for figure in found["restart"].figures]
    assert "sooner than cold by" in names
    assert "of the floor" in names


def test_talks_are_held_with_everybody(tiny: Path) -> None:
    """Each step of both conversations is asked, and nothing that was computed counts as new."""
    samples = Samples()
    talks.measure(tiny, [OWN, BARE], talks.TITLES, 1, TINY, samples, threads=1)
    assert samples.absent == {}
    assert list(samples.sizes(talks.CHAT)) == [1, 2]
    assert len(samples.sizes(talks.AGENT)) == len(talks.STEPS)
    by_hand = [samples.runs(talks.AGENT, step, BARE)[0] for step in samples.sizes(talks.AGENT)]
    # It holds one context: going back to the history without the late result computes more.
    assert by_hand[-1].computed_tokens > by_hand[-1].new_tokens + 100
    assert all(one.computed_tokens >= one.new_tokens for one in by_hand)
    sections = judged.sections(samples)
    assert [section.name for section in sections] == [talks.CHAT, talks.AGENT]
    assert sections[0].figures[0].target == judged.COMPUTED_OF_NEW


def test_a_command_adds_to_what_an_earlier_one_left(tiny: Path, tmp_path: Path) -> None:
    """Two commands with one file of samples measure two rounds, and report both."""
    kept, written = tmp_path / "samples.json", tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "exact", "--who", OWN]
    command += ["--model", str(tiny), "--samples", str(kept), "--json", str(written)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert "128 tokens" in done.stdout
    assert sorted(Samples.read(kept).runs("exact", 128, OWN)) == [0, 1]
    assert '"exact"' in written.read_text()


def sample(who: str, number: int, first_token_s: float, scenario: str = "exact") -> Sample:
    return Sample(
        scenario=scenario,
        size=2048,
        round=number,
        who=who,
        first_token_s=first_token_s,
        computed_tokens=10,
        new_tokens=8,
    )


def test_ratios_are_of_one_round() -> None:
    """A peer's time is compared with ours of the same round, where both have one."""
    ours = {n: sample(OWN, n, seconds) for n, seconds in enumerate((1.0, 2.0, 3.0))}
    theirs = {n: sample("llama-server", n, seconds) for n, seconds in ((0, 4.0), (2, 4.0))}
    assert ratios(ours, theirs) == [0.25, 0.75]


def test_a_target_that_is_not_reached_says_so() -> None:
    """More than half of llama-server's time is a miss, and less is none."""
    for seconds, met in ((0.6, False), (0.4, True)):
        samples = Samples(samples=[sample(OWN, 0, seconds), sample("llama-server", 0, 1.0)])
        (section,) = judged.sections(samples)
        (judgement,) = [figure for figure in section.figures if figure.target is not None]
        assert judgement.is_met is met
        assert ("MISSED" in str(judgement)) is not met


def test_a_chat_is_judged_by_all_its_turns_together() -> None:
    """Tokens computed and tokens new are summed over a round before they are divided."""
    samples = Samples(
        samples=[
            attrs.evolve(sample(OWN, number, 0.1, talks.CHAT), size=step, computed_tokens=tokens)
            for number in (0, 1)
            for step, tokens in ((1, 8), (2, 16))
        ]
    )
    (section,) = judged.sections(samples)
    assert section.figures[0].measured == pytest.approx(24 / 16)
    assert not section.figures[0].is_met


def test_whoever_falls_out_is_named_and_the_rest_goes_on(tiny: Path) -> None:
    """A contestant that cannot start or fails in its turn is absent; ours may not fail."""
    field = Field(tiny.with_name("none.gguf"), [BARE], n_ctx=256, threads=1)
    try:
        assert "could not load" in field.absent[BARE]
    finally:
        field.close()
    field = Field(tiny, [OWN, BARE], n_ctx=256, threads=1)

    def fail(contestant: Contestant) -> None:
        turns.append(contestant.kind.name)
        if contestant.kind.name == BARE:
            raise RuntimeError("it had enough")

    def ours_fails(contestant: Contestant) -> None:
        raise RuntimeError(contestant.kind.name)

    turns: list[str] = []
    try:
        for number in range(3):
            field.each(number, fail)
        assert turns == [OWN, BARE, OWN, OWN]
        assert field.absent == {BARE: "it had enough"}
        with pytest.raises(RuntimeError, match=OWN):
            field.each(0, ours_fails)
    finally:
        field.close()


def test_another_one_begins_in_each_round(tiny: Path) -> None:
    """Nobody is always the first of a round."""
    field = Field(tiny, [OWN, BARE], n_ctx=256, threads=1)
    turns: list[str] = []
    try:
        for number in range(2):
            field.each(number, lambda contestant: turns.append(contestant.kind.name))
    finally:
        field.close()
    assert turns == [OWN, BARE, BARE, OWN]


def test_a_peer_without_its_environment_is_unavailable(tmp_path: Path) -> None:
    """The message says what is missing and how to get it."""
    with pytest.raises(PeerUnavailable, match="make bench"):
        ChildProcess(tmp_path / "bin" / "python", "compare.run_bare", {})


def test_common_beginnings_end_where_prompts_differ() -> None:
    """Of prompts where one continues the other, the shorter one is common."""
    assert common_tokens((1, 2, 3), (1, 2, 4)) == 2
    assert common_tokens((1, 2), (1, 2, 3)) == 2
    assert common_tokens((), (1,)) == 0


@pytest.mark.skipif(not PEERS.exists(), reason="make .venv-peers/.ready has not been run")
def test_peers_take_their_turns(tiny: Path) -> None:
    """Each peer that is installed answers every request, and finds again what it is to find."""
    names = [name for name in KINDS if name not in (OWN, BARE)]
    samples = requests(tiny, names)
    for who in set(names) - samples.absent.keys():
        found = computed(samples, who)
        assert found["cold"] == 128
        assert found["exact"] <= 1
        # Some go back to where they last stood and compute what was asked for behind it.
        assert found["returned"] <= TINY.tail_tokens
        assert found["longer"] <= TINY.tail_tokens + 1
        assert ("restart" in found) is KINDS[who].survives
        assert found.get("restart", 1) == 1
        assert statistics.median(one.first_token_s for one in samples.samples) > 0
    assert samples.absent == {}


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    """A piece whose file is there is left alone, one that leaves none is named, all are joined."""
    there, absent = (PIECES["requests-512"], PIECES["stall"])
    write_json(there.file(tmp_path), [Section(name="exact", title="Exact", figures=(MISSED,))])
    absent = attrs.evolve(absent, arguments=("--no-such-option",))
    assert everything.measure([there, absent], tmp_path, []) == ["stall"]
    assert everything.write([there, absent], tmp_path) == 1
    assert "**missed**" in (tmp_path / "tables.md").read_text()
    assert len(read_json(tmp_path / "all.json")) == 1


def test_a_piece_of_everything_runs(tmp_path: Path) -> None:
    """Its figures are in the results' folder, and the next call does not measure it again."""
    command = [sys.executable, str(SCRIPT.with_name("everything.py")), "--quick"]
    command += ["--results", str(tmp_path), "--only", "trace"]
    for said in ("trace took", "measured already"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    assert read_json(tmp_path / "trace.json")

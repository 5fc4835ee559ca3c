"""The benchmark's scenarios run, and count what they say they count, at sizes that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenario_processes
import scenario_rag
import scenario_recompute
import scenario_turns
from child_process import PeerUnavailable
from figure import Figure
from report import Section
from scenario_sizes import QUICK

from tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", says="text")


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer: its environment is not there everywhere."""

    def absent(*_: Any, **__: Any) -> Any:
        raise PeerUnavailable("not here")

    monkeypatch.setattr(scenario_rag, "LlamaServerPeer", absent)
    monkeypatch.setattr(scenario_turns, "Contestant", absent)


def found(section: Section, words: str) -> Figure:
    [figure] = [figure for figure in section.figures if words in figure.name]
    return figure


def test_questions_find_their_documents(path: Path) -> None:
    """Each question is answered from what was computed before, and a missing peer is told."""
    section = scenario_rag.measure(QUICK, path)
    assert found(section, "2 questions about 2 documents").measured > 0
    assert found(section, "computed again").measured > 0
    assert section.notes == ("llama-server was not measured: not here",)


def test_one_root_saves_what_others_have_computed(path: Path) -> None:
    """Who comes after the first computes less with its root, and as much with one of its own."""
    section = scenario_processes.measure(QUICK, path)
    own = [f.measured for f in section.figures if f.name.endswith("roots of their own")][::2]
    shared = [f.measured for f in section.figures if f.name.endswith("computed, one root")]
    everything = QUICK.processes * (QUICK.shared_tokens + QUICK.own_tokens)
    assert own == [everything, everything]
    assert everything - shared[1] == (QUICK.processes - 1) * 256  # whole blocks are found


def test_a_chat_takes_its_tokens_once(path: Path) -> None:
    """What is stored grows with the chat, not with what is sent."""
    section = scenario_turns.measure(QUICK, path)
    [plot] = section.plots
    ours, least = plot.series
    assert (ours.who, ours.x) == ("erllama", (1, 2))
    assert all(stored >= needed for stored, needed in zip(ours.y, least.y, strict=True))
    assert found(section, "of that, marks").measured < found(section, ": stored").measured


def test_every_length_is_restored_from_every_tier() -> None:
    """Each tier has its times, beside computing and beside what the gate made of it."""
    section = scenario_recompute.measure(QUICK, Path("unused"), "tiny")
    [plot] = section.plots
    assert [one.who for one in plot.series] == [
        "computed",
        "from RAM",
        "from disk",
        "from slow disk",
    ]
    assert {one.x for one in plot.series} == {(64, 128)}
    slowest = plot.series[-1]
    assert min(slowest.y) >= 1000 * scenario_recompute.SLOW_S
    assert len([f for f in section.figures if "better of both" in f.name]) == 6

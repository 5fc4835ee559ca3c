"""The torture: every fault for a moment, and that it would tell if anything were wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from report import read_json

from tiny_gguf import write_tiny_gguf
from torture import damage
from torture.environment import environment
from torture.fault import FAULTS, Fault, Known, Setup
from torture.real_answers import RealAnswers
from torture.record import Record
from torture.report import as_json, as_markdown, curves_json, lines_of
from torture.runner import Limits, run_fault
from torture.tally import Tally

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("torture") / "tiny.gguf")


def open_fault(known: Known, setup: Setup) -> Fault:
    module = __import__(known.module, fromlist=["open_fault"])
    fault: Fault = module.open_fault(setup)
    return fault


@pytest.mark.parametrize("known", FAULTS, ids=[known.name for known in FAULTS])
def test_nothing_is_wrong_for_a_moment(known: Known, model_path: Path, tmp_path: Path) -> None:
    """A short round of each fault ends with nothing wrong, and has looked at something."""
    fault = open_fault(known, Setup(model_path=model_path, scale=0.15))
    try:
        tally = fault.round(random.Random(f"{known.name} 1"), tmp_path)
    finally:
        fault.close()
    assert tally.wrong == []
    assert tally.survived > 0


# ------------------------------------------------------------ what is wrong is told


def test_damage_that_nobody_checks_for_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the check of what comes from a tier, replies are wrong, and the tally says so."""
    from erllama_core.cache import reading
    from erllama_core.interfaces.block import decode_header

    monkeypatch.setattr(reading, "verify_object", lambda data, _: decode_header(data))
    monkeypatch.setattr(damage, "WAYS", (damage.flip,))
    monkeypatch.setattr(damage, "PAUSE_S", 0.0005)
    fault = damage.open_fault(Setup())
    wrong: list[str] = []
    for number in range(10):
        folder = tmp_path / str(number)
        wrong += fault.round(random.Random(number), folder).wrong
        if wrong:
            break
    assert wrong


def test_a_reply_is_right_up_to_rounding(model_path: Path) -> None:
    """The undisturbed reply is right, so is its beginning; another token is not."""
    answers = RealAnswers(model_path, ["The keeper of the lamp"])
    try:
        said = answers._answers[0]
        assert answers.is_right(0, said)
        assert answers.is_right(0, said[:5])
        assert answers.is_right(0, [])
        for at in (0, 3, len(said) - 1):
            other = [*said[:at], (said[at] + 1) % 250, *said[at + 1 :]]
            assert not answers.is_right(0, other)
    finally:
        answers.close()


SAMPLE = """
import os, time
from torture.tally import Tally

POINT = ("resident MiB", "threads", "open files", "median wait ms", "99th percentile ms")

class Sample:
    def round(self, chance, folder):
        mode = os.environ["SAMPLE_MODE"]
        if mode == "dies":
            os.abort()
        while mode == "hangs":
            time.sleep(1)
        if mode == "raises":
            raise ValueError("as it was told")
        assert folder.is_dir() and not list(folder.iterdir())
        tally = Tally(survived=2, lost=1)
        tally.note("draws", chance.randrange(1000))
        number = float(folder.name.rpartition("-")[2])
        tally.point = dict.fromkeys(POINT, number) | {"requests": 10 * number % 30}
        return tally

    def close(self):
        pass

def open_fault(setup):
    return Sample()
"""


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Known:
    (tmp_path / "torture_sample.py").write_text(SAMPLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SAMPLE_MODE", "right")
    return Known("sample", "a sample", "torture_sample")


def totals(record: Record, known: Known) -> Tally:
    [line] = lines_of(record, [known])
    return line.tally


def test_a_second_call_goes_on_where_the_first_ended(sample: Known, tmp_path: Path) -> None:
    """Rounds that are over are not run again, and are the same in whichever call they run."""
    whole = Record(tmp_path / "whole", 3)
    run_fault(sample, whole, Limits(seconds=60, rounds=3))
    parts = Record(tmp_path / "parts", 3)
    run_fault(sample, parts, Limits(seconds=60, rounds=1))
    with (parts.folder / "sample.jsonl").open("a") as file:
        file.write('{"round": 1, "seco')  # the first call was killed here
    for _ in range(2):
        run_fault(sample, Record(tmp_path / "parts", 3), Limits(seconds=60, rounds=3))
    assert [one.number for one in parts.rounds("sample")] == [0, 1, 2]
    for record in (whole, parts):
        total = totals(record, sample)
        assert (total.tried, total.survived, total.lost, total.wrong) == (9, 6, 3, [])
    assert totals(whole, sample).notes == totals(parts, sample).notes
    [line] = lines_of(whole, [sample])
    assert as_json(3, [line])["faults"]["sample"]["tried"] == 9
    assert "| a sample (`sample`) | 3 | 9 | 6 | 3 | 0 |" in as_markdown([line])


def test_what_was_measured_over_time_can_be_drawn(sample: Known, tmp_path: Path) -> None:
    """The benchmarks' report reads the curves; a process that was new begins another one."""
    record = Record(tmp_path, 1)
    run_fault(sample, record, Limits(seconds=60, rounds=5))
    path = tmp_path / "curves.json"
    path.write_text(json.dumps(curves_json(record, [sample])))
    [section] = read_json(path)
    [memory] = [plot for plot in section.plots if plot.name == "torture_memory"]
    assert [(one.x, one.y) for one in memory.series] == [
        ((0.0, 10.0, 20.0), (0.0, 1.0, 2.0)),
        ((0.0, 10.0), (3.0, 4.0)),
    ]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("dies", "SIGABRT"), ("hangs", "no end of a round"), ("raises", "as it was told")],
)
def test_a_round_that_does_not_end_as_it_should_is_wrong(
    monkeypatch: pytest.MonkeyPatch, sample: Known, tmp_path: Path, mode: str, words: str
) -> None:
    """A process that dies or hangs, and a round that raises, are told; the run comes to its end."""
    monkeypatch.setenv("SAMPLE_MODE", mode)
    record = Record(tmp_path / "record", 1)
    known = attrs.evolve(sample, most_s=0.5 if mode == "hangs" else 60.0)
    run_fault(known, record, Limits(seconds=60, rounds=1))
    [wrong] = totals(record, known).wrong
    assert words in wrong


def test_the_command_prints_a_table_and_fails_when_anything_is_wrong(tmp_path: Path) -> None:
    """JSON or a table, exit code 0; with something wrong in the record, 1, and it is told."""
    command = [sys.executable, "-m", "torture", "--only", "cancel", "--rounds", "1"]
    command += ["--scale", "0.1", "--seed", "5", "--folder", str(tmp_path)]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    first = subprocess.run([*command, "--json"], check=True, **options)  # type: ignore[call-overload]
    found = json.loads(first.stdout)
    assert found["seed"] == 5
    assert found["faults"]["cancel"]["wrong"] == []
    assert found["faults"]["cancel"]["tried"] > 0
    tally = Tally()
    tally.accuse("for the test")
    Record(tmp_path, 5).add("cancel", {"round": 1, "seconds": 1.0, **tally.as_json()})
    second = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    assert second.returncode == 1
    assert "| 2 |" in second.stdout
    assert "WRONG, cancel: for the test" in second.stderr

"""Every fuzz target over its seeds and some mutations, and the machinery that would tell."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import driver
import findings
import pytest
from child import Progress, progress
from mutation import mutated
from target import MOST_BYTES, Run, Target, all_targets
from watch import TookTooLong, TookTooMuch, watched

TARGETS = all_targets()


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_survives_its_seeds_and_what_is_made_of_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each input is accepted or refused as documented, in bounded time and memory; the longer
    run is ``make fuzz``.
    """
    target = TARGETS[name]
    if target.missing is not None:
        pytest.skip(f"{target.missing} is not installed")
    if target.native:
        monkeypatch.setattr(findings, "FINDINGS", tmp_path)
        runs, new = driver.run_target(target, 60.0, 1, "none", most_runs=target.quick_runs)
        assert runs >= target.quick_runs
        assert not new, [path.read_text() for path in tmp_path.glob("*/*.txt")]
        return
    seeds = list(target.seeds().values())
    assert seeds
    rng = random.Random(1)
    with watched(target) as opened:
        for data in seeds:
            opened.run(data, measured=True)
        for _ in range(target.quick_runs):
            changed = mutated(rng, rng.choice(seeds), seeds, target.words, is_json=target.is_json)
            try:
                opened.run(changed)
            except BaseException as error:
                (tmp_path / "input").write_bytes(changed)
                error.add_note(f"python fuzz/driver.py {name} --input {tmp_path / 'input'}")
                raise


def test_every_folder_of_the_corpus_is_a_target_s() -> None:
    """Seeds are small, and none lies where nobody reads it."""
    corpus = Path(driver.__file__).parent / "corpus"
    assert {path.name for path in corpus.iterdir()} <= set(TARGETS)
    assert all(path.stat().st_size <= MOST_BYTES for path in corpus.glob("*/*"))


# ---------------------------------------------------------------- the machinery


def sick(run: Run) -> Target:
    """A target that does what a test wants."""

    @contextmanager
    def opened() -> Iterator[Run]:
        yield run

    return Target(name="sick", open=opened, seconds=0.1, base_bytes=1 << 20, factor=10)


def spin(_data: bytes) -> None:
    while True:
        pass


def spin_deaf(_data: bytes) -> None:
    while True:
        try:
            spin(b"")
        except Exception:  # noqa: BLE001 - what a reader might do
            continue


def grow(_data: bytes) -> None:
    assert len(bytes(4 << 20)) > 0


def fail(_data: bytes) -> None:
    raise KeyError("a")


def fail_elsewhere(_data: bytes) -> None:
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (fail, KeyError),
        (spin, TookTooLong),
        (spin_deaf, TookTooLong),
        (grow, TookTooMuch),
        (fail_elsewhere, ZeroDivisionError),
    ],
)
def test_what_is_wrong_comes_out(run: Callable[[bytes], None], error: type[BaseException]) -> None:
    """An error that is not documented, of another thread too; a hang; and too much memory."""
    with watched(sick(run)) as opened, pytest.raises(error):
        opened.run(b"x", measured=True)


def test_a_process_that_is_ended_leaves_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code that aborts is a finding, with the very bytes, and the target goes on."""
    (tmp_path / "child.py").write_text(
        f"import os, sys; sys.path[:0] = {[str(Path(driver.__file__).parent)]!r}\n"
        "from pathlib import Path\n"
        "from child import Progress\n"
        "Progress(Path(sys.argv[2])).note(7, 0, b'deadly' + sys.argv[6].encode())\n"
        "os.abort()\n"
    )
    monkeypatch.setattr(driver, "_HERE", tmp_path)
    monkeypatch.setattr(findings, "FINDINGS", tmp_path / "found")
    assert driver.run_target(sick(spin), 60.0, 3, "none", most_runs=1) == (7, 1)
    (found,) = (tmp_path / "found" / "sick").glob("killed-by-signal-6-*[!t]")
    assert found.read_bytes() == b"deadly3"


def test_progress_outlives_its_process(tmp_path: Path) -> None:
    """What was noted last is read back, and nothing when nothing was."""
    path = tmp_path / "scratch"
    assert progress(path) == (0, 0, None)
    noted = Progress(path)
    noted.note(3, 1, b"")
    assert progress(path) == (3, 1, b"")
    noted.note(4, 1, b"abc")
    assert progress(path) == (4, 1, b"abc")
    noted.note(5, 2, None)
    assert progress(path) == (5, 2, None)


def test_mutations_are_repeatable_and_bounded() -> None:
    """One seed makes the same inputs, of a bounded size, and most are other than before."""
    seeds = [b'{"a": [1, {"b": "x"}]}', b'[{"c": 17}]', b""]

    def some() -> list[bytes]:
        rng = random.Random(5)
        return [
            mutated(rng, rng.choice(seeds), seeds, (b"word",), is_json=bool(number % 2))
            for number in range(500)
        ]

    made = some()
    assert made == some()
    assert max(map(len, made)) <= MOST_BYTES
    assert len(set(made)) > 250


def test_the_same_failure_is_kept_once_with_its_smallest_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second input with the same traceback is new only as a smaller one."""
    monkeypatch.setattr(findings, "FINDINGS", tmp_path)
    kept = findings.Findings("some")

    def error() -> ValueError:
        try:
            int("x")
        except ValueError as caught:
            return caught
        raise AssertionError

    path = kept.add_error(error(), b"longer")
    assert path is not None
    assert kept.add_error(error(), b"longer still") is None
    assert kept.add_error(error(), b"short") is None
    assert path.read_bytes() == b"short"
    assert "invalid literal" in path.with_suffix(".txt").read_text()

"""The cache's benchmark runs and judges its figures; what the index does to reach them is right."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from erllama_core.cache.entry import Entry
from erllama_core.cache.index import Index
from erllama_core.cache.keys import ContextKeys
from erllama_core.interfaces.block import ObjectId, ObjectKind

SCRIPT = Path(__file__).parents[1] / "bench" / "cache.py"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_section_without_a_model_runs() -> None:
    """Each section prints its figures beside their targets, on sizes that take no time."""
    printed = run("--only", "storage", "index", "startup", "restore", "trace")
    for section in ("storage", "index", "startup", "restore", "trace"):
        assert f"\n{section} (" in f"\n{printed}"
    for target in ("at most 1.0500", "at most 700", "at most 2.000", "at least 3.00"):
        assert target in printed
    lines = [line for line in printed.splitlines() if " at most " in line or " at least " in line]
    assert all(line.endswith((": ok", ": MISSED")) for line in lines)


def test_what_is_counted_reaches_its_targets_at_any_size() -> None:
    """Ratios of bytes and of hits are counts, not times: even tiny sizes miss none."""
    assert "MISSED" not in run("--only", "storage", "trace")


@pytest.mark.real_model
def test_decoding_is_measured_on_a_real_model(demo_model_path: Path) -> None:
    """The section that needs a model runs with the one that it is given."""
    assert "slower by" in run("--only", "decode", "--model", str(demo_model_path))


def entry(kind: ObjectKind, start: int, end: int) -> Entry:
    """An object of the one context of these tests, with no byte that another one holds."""
    keys = ContextKeys(bytes(bytearray(32)), bytes(range(64)), 4)
    return Entry(
        ObjectId(kind, start, keys.key(end)),
        end,
        keys.namespace,
        keys.key(keys.segment_start(end)),
        keys.slice(keys.segment_start(end), start),
        keys.slice(start, end),
    )


def test_objects_that_end_at_one_place_come_and_go_by_themselves() -> None:
    """A block, a snapshot and a mark at one position are three objects, whichever goes first."""
    for gone in range(3):
        index = Index()
        entries = [
            index.add(entry(ObjectKind.KV, 0, 4)),
            index.add(entry(ObjectKind.SNAPSHOT, 4, 4)),
            index.add(entry(ObjectKind.LOGITS, 4, 4)),
        ]
        assert index.add(entry(ObjectKind.SNAPSHOT, 4, 4)) is entries[1]
        index.remove(entries[gone])
        index.remove(entries[gone])
        assert len(index) == 2
        found = [index.get(known.object_id) for known in entries]
        assert found == [None if n == gone else known for n, known in enumerate(entries)]
        assert set(index) == set(entries) - {entries[gone]}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_neighbours_hold_equal_bytes_once(order: tuple[int, ...]) -> None:
    """In whichever order a context's blocks come, no key and no namespace is held twice."""
    index = Index()
    blocks = [entry(ObjectKind.KV, start, start + 4) for start in (0, 4, 8)]
    for number in order:
        index.add(blocks[number])
    for before, after in pairwise(blocks):
        assert after.segment_key is before.object_id.key
        assert after.namespace is before.namespace

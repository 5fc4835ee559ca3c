"""``erllama cache``: what it shows, finds and removes, beside running engines, too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cache_contexts import RecordingTier
from erllama_core import Engine, NamedTier, Pinned
from erllama_core.cache.budget import in_words
from erllama_core.cache.keys import ContextKeys
from erllama_core.cli.app import app
from erllama_core.cli.cache import cache
from erllama_core.cli.cache_pins import PinState
from erllama_core.cli.cache_stats import ContextEnds
from erllama_core.cli.cache_tables import human_time
from erllama_core.cli.cache_verify import Verification
from erllama_core.errors import TierError
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.block import Header, ObjectId, ObjectKind, decode_header, encode_header
from erllama_core.interfaces.tier import ScanFailure, ScannedObject
from erllama_core.prompt import pack
from erllama_core.providers import TierProvider
from erllama_tier_disk.store import FileTier
from stub_engine import load_stub, make_engine

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("ls", "stats", "verify", "gc", "evict", "pin")
ARGUMENTS = {"evict": ["1"], "pin": ["0" * 64]}
LOOKING = ("ls", "stats", "verify")
PROMPT = "The lamp was lit for the first time in the autumn of the year, and all came to see it. "
OTHER = "Boats that left the harbour at night were counted at dawn, and then counted once more. "


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The developer's environment stays out, and the log, which ``main`` configures, too."""
    for name in list(os.environ):
        if name.startswith("ERLLAMA_") and "__" in name:
            monkeypatch.delenv(name)
    with capture_logs():
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that an engine has left: two contexts with nothing in common."""
    path = tmp_path / "kvc"
    with make_engine(path) as engine:
        model = load_stub(engine, tier=["disk"])
        for prompt in (PROMPT, OTHER):
            model.complete(prompt, response_tokens=4)
    return path


def run(command: str, *arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(
        app, ["cache", command, *(str(argument) for argument in arguments)], input=answer
    )


def run_json(command: str, *arguments: object, exit_code: int = 0) -> Any:
    result = run(command, *arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def separately(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "erllama_core", "cache", *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Whatever a write below ``root`` would change."""
    return {
        str(path): (status.st_mtime_ns, status.st_size, status.st_ino)
        for path in [root, *root.rglob("*")]
        for status in [path.lstat()]
    }


def headers(root: Path) -> dict[Path, Header]:
    return {path: decode_header(path.read_bytes()) for path in files(root)}


def flip(path: Path, offset: int) -> None:
    """Change one byte, and nothing else that a directory shows."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def config_of(tmp_path: Path, *tiers: str) -> Path:
    file = tmp_path / "erllama.toml"
    file.write_text("".join(f"[[tiers]]\n{tier}\n" for tier in tiers))
    return file


# ---------------------------------------------------------------------------- ls


def test_ls_lists_every_object(root: Path) -> None:
    """There is one row per file, with what its header says; other programs read these keys."""
    rows = run_json("ls", "--root", root)
    expected = headers(root)
    assert {row["location"] for row in rows} == {str(path) for path in expected}
    for row in rows:
        path = Path(row["location"])
        header = expected[path]
        assert row == {
            "kind": header.kind.value,
            "key": header.key.hex(),
            "tier": "disk",
            "start": header.start,
            "end": header.end,
            "tokens": len(header.tokens) // 4,
            "size_bytes": path.stat().st_size,
            "last_used_ns": path.stat().st_mtime_ns,
            "save_reason": header.info["save_reason"],
            "pinned": False,
            "location": str(path),
            "problem": None,
        }
        assert list(row)[:3] == ["kind", "key", "tier"]


def test_ls_shows_the_last_used_first(root: Path) -> None:
    """Rows are sorted by last use, and --limit keeps the first ones of them."""
    for number, path in enumerate(files(root)):
        os.utime(path, ns=(0, (number * 7 % 5) * 10**18))
    used = [row["last_used_ns"] for row in run_json("ls", "--root", root)]
    assert used == sorted(used, reverse=True)
    assert used[0] != used[-1]
    limited = run_json("ls", "--root", root, "--limit", 3)
    assert [row["last_used_ns"] for row in limited] == used[:3]


def test_ls_as_a_table_has_one_line_per_object(tmp_path: Path) -> None:
    """In a pipe every object is one unfolded line, whatever the path looks like."""
    path = tmp_path / "[red]a very long name[/red]" / ("x" * 200)
    with make_engine(path) as engine:
        load_stub(engine, tier=["disk"]).complete(PROMPT, response_tokens=4)
    lines = run("ls", "--root", path).stdout.splitlines()
    for file, header in headers(path).items():
        (line,) = (line for line in lines if str(file) in line)
        assert line.split()[:3] == [header.kind.value, header.key.hex()[:12], "disk"]


def test_ls_of_a_damaged_header(root: Path) -> None:
    """An object whose header cannot be used is listed, with the reason and without the rest."""
    victim = files(root)[0]
    flip(victim, 45)
    (row,) = (r for r in run_json("ls", "--root", root) if r["problem"] is not None)
    assert row["location"] == str(victim)
    assert (row["end"], row["tokens"], row["save_reason"]) == (None, None, None)
    table = run("ls", "--root", root)
    assert table.exit_code == 0
    assert "cache verify" in table.stderr


def test_an_empty_root_is_listed(tmp_path: Path) -> None:
    """A folder without objects is an empty cache, and stays an empty folder."""
    assert run_json("ls", "--root", tmp_path) == []
    assert run_json("gc", "--root", tmp_path, "--yes")["removed"] == 0
    assert run_json("evict", "1", "--root", tmp_path, exit_code=1)["removed"] == 0
    assert run_json("verify", "--root", tmp_path, "--delete")["ok"] is True
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- stats


def test_stats_sums_up(root: Path) -> None:
    """Objects and bytes are counted by kind, and every kind is there."""
    (sums,) = run_json("stats", "--root", root)
    sizes: dict[str, list[int]] = {kind.value: [] for kind in ObjectKind}
    for path, header in headers(root).items():
        sizes[header.kind.value].append(path.stat().st_size)
    total = sum(map(sum, sizes.values()))
    assert sums == {
        "tier": "disk",
        "kind": "disk",
        "objects": len(files(root)),
        "size_bytes": total,
        "by_kind": {k: {"objects": len(s), "size_bytes": sum(s)} for k, s in sizes.items()},
        "used_bytes": total,
        "quota_bytes": None,
        "pins": 0,
        "pinned_bytes": 0,
        "context_ends": 2,
        "damaged": 0,
        "unknown_format": 0,
        "scan_failures": [],
    }


def test_stats_counts_trouble(root: Path) -> None:
    """Damaged headers, other versions and what is no object are counted apart."""
    damaged, newer, longer, renamed, *_ = files(root)
    flip(damaged, 45)
    flip(newer, 8)
    longer.write_bytes(longer.read_bytes() + b"x")
    renamed.rename(renamed.with_name(re.sub(r"\.\d+\.", ".12345.", renamed.name)))
    foreign = damaged.parent / "notes.txt"
    foreign.write_text("mine")
    (sums,) = run_json("stats", "--root", root)
    assert (sums["damaged"], sums["unknown_format"]) == (3, 1)
    (failure,) = sums["scan_failures"]
    assert failure == {"location": str(foreign), "reason": "not the name of a stored object"}
    assert sums["objects"] == len(files(root)) - 1


def test_stats_of_a_configuration(root: Path, tmp_path: Path) -> None:
    """Every tier that outlives the process has its column, with its quota."""
    other = tmp_path / "other"
    with make_engine(other) as engine:
        load_stub(engine, tier=["disk"]).complete(PROMPT)
    file = config_of(
        tmp_path,
        f'name = "one"\nkind = "disk"\nroot = "{root}"\nquota_bytes = "5GiB"',
        f'name = "two"\nkind = "ram_file"\nroot = "{other}"',
    )
    one, two = run_json("stats", "--config", file)
    assert (one["tier"], one["kind"], one["quota_bytes"]) == ("one", "disk", 5 << 30)
    assert (two["tier"], two["kind"], two["quota_bytes"]) == ("two", "ram_file", None)
    assert [s["tier"] for s in run_json("stats", "--config", file, "--tier", "two")] == ["two"]
    table = run("stats", "--config", file).stdout
    assert "5.0 GiB" in table
    assert re.search(r"^ *one +two *$", table, flags=re.MULTILINE)


@given(
    contexts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=10), max_size=8),
    align=st.sampled_from([1, 2, 4]),
)
def test_context_ends_are_the_contexts_that_none_goes_on_from(
    contexts: list[list[int]], align: int
) -> None:
    """Of contexts stored in blocks, those that are no beginning of another are counted."""
    ends = ContextEnds()
    for tokens in contexts:
        keys = ContextKeys(bytes(32), pack(tokens), align)
        for end in range(1, len(tokens) + 1):
            if end % align and end != len(tokens):
                continue
            segment = keys.segment_start(end)
            header = Header(
                kind=ObjectKind.KV,
                start=segment,
                end=end,
                namespace=bytes(32),
                key=keys.key(end),
                segment_key=keys.key(segment),
                lead_tokens=b"",
                tokens=keys.slice(segment, end),
                align_tokens=align,
                payload_bytes=0,
                payload_checksum=b"",
                header_bytes=0,
                info={},
            )
            ends.add(header)
            ends.add(attrs.evolve(header, kind=ObjectKind.LOGITS))
    distinct = {tuple(tokens) for tokens in contexts}
    leaves = {
        one for one in distinct if not any(o != one and o[: len(one)] == one for o in distinct)
    }
    assert ends.count() == len(leaves)


# ------------------------------------------------------------------------ verify


def test_verify_of_a_whole_cache(root: Path) -> None:
    """Whole objects are counted, and the exit code is 0."""
    assert run_json("verify", "--root", root) == {
        "ok": True,
        "intact": len(files(root)),
        "intact_bytes": sum(path.stat().st_size for path in files(root)),
        "vanished": 0,
        "damaged": [],
        "unreadable": [],
        "unknown_format": [],
        "scan_failures": [],
    }


@pytest.mark.parametrize("damage", ["payload", "header", "truncated", "longer", "empty", "renamed"])
def test_verify_finds_damage(root: Path, damage: str) -> None:
    """One damaged object is found by its place and a reason, with exit code 1, and stays."""
    path, header = next(iter(headers(root).items()))
    data = path.read_bytes()
    if damage == "payload":
        flip(path, len(data) - 1)
    elif damage == "header":
        flip(path, 45)
    elif damage == "renamed":
        # A whole object, under another one's name.
        other = path.with_name(f"{ObjectId(header.kind, header.start + 1, header.key)}.kvc")
        path = path.rename(other)
    else:
        path.write_bytes({"truncated": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    before = len(files(root))
    report = run_json("verify", "--root", root, exit_code=1)
    (found,) = report["damaged"]
    assert (found["tier"], found["key"]) == ("disk", header.key.hex())
    assert (found["location"], found["deleted"]) == (str(path), False)
    assert found["reason"]
    assert (report["ok"], report["intact"]) == (False, before - 1)
    assert len(files(root)) == before
    table = run("verify", "--root", root)
    assert table.exit_code == 1
    assert str(path) in table.stdout
    assert "1 damaged" in table.stdout


def test_verify_deletes_what_is_damaged_and_nothing_else(root: Path) -> None:
    """--delete removes damaged objects, and the next verification finds nothing."""
    by_payload, by_header, newer, *rest = files(root)
    flip(by_payload, by_payload.stat().st_size - 1)
    flip(by_header, 45)
    flip(newer, 8)
    report = run_json("verify", "--root", root, "--delete", exit_code=1)
    assert [found["deleted"] for found in report["damaged"]] == [True, True]
    assert [found["location"] for found in report["unknown_format"]] == [str(newer)]
    assert files(root) == [newer, *rest]
    assert run_json("verify", "--root", root)["intact"] == len(rest)


def test_verify_tells_of_what_is_no_object(root: Path) -> None:
    """A foreign file is listed with exit code 1, since nobody knows what it was; it stays."""
    foreign = files(root)[0].parent / "notes.txt"
    foreign.write_text("mine")
    report = run_json("verify", "--root", root, "--delete", exit_code=1)
    (failure,) = report["scan_failures"]
    assert (failure["tier"], failure["location"]) == ("disk", str(foreign))
    assert report["damaged"] == []
    assert foreign.exists()


@pytest.mark.parametrize("command", LOOKING)
@pytest.mark.parametrize("name", [b"\xff\xfe.kvc", b"\x1b[2Jgone", b"two\nlines\tand more"])
def test_names_that_are_no_text(root: Path, command: str, name: bytes) -> None:
    """A file of any name is listed; it neither stops the command nor steers the terminal."""
    with open(os.fsencode(files(root)[0].parent) + b"/" + name, "wb"):  # noqa: PTH123 - bytes
        pass
    result = run(command, "--root", root)
    assert result.exit_code == (1 if command == "verify" else 0), result.output
    assert "\x1b" not in result.stdout
    (line,) = [one for one in result.stdout.splitlines() if "no object" in one] or [""]
    shown = {"\x1b[2Jgone": "\u241b[2Jgone", "two\nlines\tand more": "two\u240alines\u2409and more"}
    assert command != "verify" or shown.get(os.fsdecode(name), "\\udcff\\udcfe.kvc") in line


def test_a_header_does_not_steer_the_terminal(root: Path) -> None:
    """What a forged header says, with right checksums, is shown and not obeyed."""
    path = files(root)[0]
    header = decode_header(path.read_bytes())
    payload = path.read_bytes()[header.header_bytes :]
    path.write_bytes(
        encode_header(
            kind=header.kind,
            start=header.start,
            end=header.end,
            namespace=header.namespace,
            key=header.key,
            segment_key=header.segment_key,
            lead_tokens=header.lead_tokens,
            tokens=header.tokens,
            align_tokens=header.align_tokens,
            payload=payload,
            info={"save_reason": "\x1b]0;title\x07\ud800"},
        )
        + payload
    )
    result = run("ls", "--root", root)
    assert result.exit_code == 0, result.output
    assert "\u241b]0;title\u2407\\ud800" in result.stdout


# ------------------------------------------------------------------ gc and evict


def test_gc_asks(root: Path) -> None:
    """Without --yes nothing is removed unless the answer is yes; the question is not output."""
    before = files(root)
    for answer in ("n\n", ""):
        refused = run("gc", "--root", root, "--json", answer=answer)
        assert refused.exit_code == 1
        assert refused.stdout == ""
        assert f"Remove {len(before)} objects" in refused.stderr
        assert files(root) == before
    agreed = run("gc", "--root", root, "--json", answer="y\n")
    assert agreed.exit_code == 0
    assert json.loads(agreed.stdout)["removed"] == len(before)
    assert files(root) == []


def test_gc_removes_everything(root: Path) -> None:
    """Every object goes, whole, damaged or of another version; a foreign file stays."""
    damaged, newer, *_ = files(root)
    flip(damaged, 45)
    flip(newer, 8)
    foreign = damaged.parent / "notes.txt"
    foreign.write_text("mine")
    objects = [path for path in files(root) if path != foreign]
    size = sum(path.stat().st_size for path in objects if path != damaged)
    assert run_json("gc", "--root", root, "--yes") == {
        "asked_bytes": None,
        "removed": len(objects) - 1,
        "removed_bytes": size,
        "damaged": 1,
        "left": 0,
        "pinned": 0,
        "failures": 0,
    }
    assert files(root) == [foreign]


def test_gc_of_one_tier(root: Path, tmp_path: Path) -> None:
    """With --tier the other tiers of the configuration keep what they have."""
    other = tmp_path / "other"
    with make_engine(other) as engine:
        load_stub(engine, tier=["disk"]).complete(PROMPT)
    file = config_of(
        tmp_path,
        f'name = "one"\nkind = "disk"\nroot = "{root}"',
        f'name = "two"\nkind = "disk"\nroot = "{other}"',
    )
    kept = files(root)
    run_json("gc", "--config", file, "--tier", "two", "--yes")
    assert (files(root), files(other)) == (kept, [])


def test_evict_frees_enough_and_takes_the_oldest(root: Path) -> None:
    """At least so many bytes go, of the context that was used longest ago."""
    contexts: dict[bool, set[Path]] = {True: set(), False: set()}
    first_block = min(headers(root).items(), key=lambda item: (item[1].end, item[0]))
    # A context is told by its first key: walk its segments.
    chain = {first_block[1].key}
    for path, header in sorted(headers(root).items(), key=lambda item: item[1].end):
        mine = header.key in chain or header.segment_key in chain
        if mine:
            chain.add(header.key)
        contexts[mine].add(path)
    old, new = contexts[True], contexts[False]
    assert old
    assert new
    for path in old:
        os.utime(path, ns=(0, 10**18))
    before = sum(path.stat().st_size for path in files(root))
    report = run_json("evict", "1.5KiB", "--root", root)
    freed = before - sum(path.stat().st_size for path in files(root))
    assert report["asked_bytes"] == 1536 <= report["removed_bytes"] == freed
    assert new <= set(files(root))
    assert report["left"] == len(files(root))
    # From its end: what is left of the old context can still be reached.
    assert first_block[0].exists()


def test_evict_more_than_there_is(root: Path) -> None:
    """Everything goes, and the exit code says that it was not enough."""
    assert run_json("evict", "1GiB", "--root", root, exit_code=1)["left"] == 0
    assert files(root) == []


@pytest.mark.parametrize("text", ["0", "many", "5 apples"])
def test_evict_of_no_amount(root: Path, text: str) -> None:
    """What is no number of bytes is a mistake in the command, and removes nothing."""
    before = files(root)
    assert run("evict", text, "--root", root).exit_code == 2
    assert files(root) == before


def test_a_read_only_tier_keeps_everything(root: Path, tmp_path: Path) -> None:
    """What the configuration protects is not removed, and the message says how to go on."""
    file = config_of(tmp_path, f'name = "d"\nkind = "disk"\nroot = "{root}"\nread_only = true')
    before = snapshot(root)
    for arguments in (("gc", "--yes"), ("evict", "1"), ("verify", "--delete")):
        result = run(*arguments, "--config", file)
        assert result.exit_code == 1
        assert "tier 'd' has read_only = true" in result.stderr
    assert snapshot(root) == before


# ------------------------------------------------------------------ which cache


@pytest.mark.parametrize("command", LOOKING)
def test_looking_changes_nothing(root: Path, command: str) -> None:
    """ls, stats and verify leave every file as it is, down to times and leftovers."""
    # Left behind by a process of an earlier boot; an engine would sweep it.
    leftover = files(root)[0].parent / f".{'0' * 32}.1.1.1.{'0' * 16}.tmp"
    leftover.write_bytes(b"half")
    damaged = files(root)[-1]
    flip(damaged, 45)
    for path in files(root):
        os.utime(path, ns=(10**18, 10**18))
    before = snapshot(root)
    run(command, "--root", root)
    run_json(command, "--root", root, exit_code=int(command == "verify"))
    assert snapshot(root) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_root_that_is_not_there(tmp_path: Path, command: str) -> None:
    """A missing root is an error of one line, and is not made."""
    missing = tmp_path / "missing"
    file = config_of(tmp_path, f'name = "d"\nkind = "disk"\nroot = "{missing}"')
    for where in (("--root", missing), ("--config", file)):
        result = run(command, *ARGUMENTS.get(command, []), *where)
        assert result.exit_code == 1
        assert result.stderr.startswith("erllama: ")
        assert str(missing) in result.stderr
        assert result.stdout == ""
    assert not missing.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_which_cache_must_be_said(root: Path, command: str) -> None:
    """Neither or both of --root and --config, or --tier with a root, is a mistake."""
    for where in ((), ("--root", root, "--config", "x.toml"), ("--root", root, "--tier", "d")):
        assert run(command, *ARGUMENTS.get(command, []), *where).exit_code == 2


def test_a_tier_that_nobody_has(root: Path, tmp_path: Path) -> None:
    """An unknown --tier is a mistake that names the nearest one."""
    file = config_of(tmp_path, f'name = "my_disk"\nkind = "disk"\nroot = "{root}"')
    result = run("ls", "--config", file, "--tier", "my_dsk")
    assert result.exit_code == 2
    assert "did you mean 'my_disk'?" in result.stderr


def test_tiers_in_memory_cannot_be_looked_into(tmp_path: Path) -> None:
    """A configuration without a tier that outlives its process is an error that says so."""
    file = config_of(tmp_path)
    assert "no tier outlives its process" in run("ls", "--config", file).stderr
    asked = run("ls", "--config", file, "--tier", "ram")
    assert asked.exit_code == 1
    assert "tier 'ram' is memory of the process" in asked.stderr


class Unlisted(FileTier):
    """Raises what it likes when it is scanned."""

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        raise KeyError("no index")


class Stubborn(FileTier):
    """Lets nothing go."""

    def delete(self, object_id: ObjectId) -> int:
        raise TierError(f"{object_id} is held")


class Forgetful:
    """Files as those of the tier of this package, and no record of pins."""

    def __init__(self, root: Path) -> None:
        inner = FileTier(root)
        self.put = inner.put
        self.read = inner.read
        self.delete = inner.delete
        self.contains = inner.contains
        self.scan = inner.scan
        self.usage = inner.usage
        self.location = inner.location
        self.close = inner.close


@pytest.fixture
def others_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin of somebody else, with these tiers and no read_only."""

    @attrs.frozen
    class Options:
        root: Path

    class Plugin:
        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [
                TierProvider("unlisted", "", lambda options: Unlisted(options.root), Options),
                TierProvider("stubborn", "", lambda options: Stubborn(options.root), Options),
                TierProvider("forgetful", "", lambda options: Forgetful(options.root), Options),
                TierProvider("pinning", "", lambda options: RecordingTier(options.root), Options),
            ]

    info = tmp_path / "other_tiers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-tiers\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[erllama]\nother = other_tiers_plugin:PLUGIN\n")
    module = ModuleType("other_tiers_plugin")
    vars(module)["PLUGIN"] = Plugin()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("others_tiers")
def test_trouble_of_another_plugin_is_an_error_of_one_line(root: Path, tmp_path: Path) -> None:
    """Whatever a tier raises while it is scanned becomes a message that names the tier."""
    file = config_of(tmp_path, f'name = "t"\nkind = "unlisted"\nroot = "{root}"')
    result = run("stats", "--config", file)
    assert result.exit_code == 1
    assert "tier 't' could not list what it holds" in result.stderr


@pytest.mark.usefixtures("others_tiers")
def test_what_could_not_be_removed_is_told(root: Path, tmp_path: Path) -> None:
    """When a tier lets nothing go, the reports and the exit codes say so."""
    file = config_of(tmp_path, f'name = "t"\nkind = "stubborn"\nroot = "{root}"')
    before = files(root)
    gone = run_json("gc", "--config", file, "--yes", exit_code=1)
    assert (gone["removed"], gone["left"]) == (0, len(before))
    assert gone["failures"] > 0
    flip(before[0], 45)
    report = run_json("verify", "--config", file, "--delete", exit_code=1)
    assert [found["deleted"] for found in report["damaged"]] == [False]
    assert files(root) == before


@pytest.fixture
def pinning(root: Path, tmp_path: Path, others_tiers: None) -> Path:
    """A configuration of the root as a tier that records pins."""
    del others_tiers
    return config_of(tmp_path, f'name = "p"\nkind = "pinning"\nroot = "{root}"')


def end_of(root: Path, prompt: str) -> str:
    """The key of the context that the root's engine left for a prompt."""
    with make_engine(root) as engine:
        found = load_stub(engine, tier=["disk"]).complete(prompt, response_tokens=4).finish_key
    assert found is not None
    return found.hex()


def test_what_is_pinned_survives_gc(root: Path, pinning: Path) -> None:
    """A pin holds for the commands that come after it, until it is taken back."""
    key = end_of(root, PROMPT)
    state = run_json("pin", key[:20], "--config", pinning)
    assert (state["key"], [place["tier"] for place in state["pinned"]]) == (key, ["p"])
    place = state["pinned"][0]
    listed = [row for row in run_json("ls", "--config", pinning) if row["pinned"]]
    assert (len(listed), sum(row["size_bytes"] for row in listed)) == (
        place["rows"],
        place["bytes"],
    )
    (stats,) = run_json("stats", "--config", pinning)
    assert (stats["pins"], stats["pinned_bytes"]) == (1, place["bytes"])
    report = run_json("gc", "--config", pinning, "--yes")
    assert report["left"] == report["pinned"] == place["rows"]
    assert {str(path) for path in files(root)} == {row["location"] for row in listed}
    assert run_json("evict", "1", "--config", pinning, exit_code=1)["removed"] == 0
    for _ in range(2):
        assert run_json("pin", key, "--unpin", "--config", pinning)["pinned"] == []
    assert "not pinned" in run("pin", key, "--unpin", "--config", pinning).stdout
    run_json("gc", "--config", pinning, "--yes")
    assert files(root) == []


def test_pins_for_people(root: Path, pinning: Path) -> None:
    """The tables and the messages tell what is pinned where."""
    key = end_of(root, OTHER)
    said = run("pin", key, "--config", pinning).stdout
    assert re.search(rf"{key} is pinned in p: \d+ objects", said)
    assert " yes " in run("ls", "--config", pinning).stdout
    assert re.search(r"pinned +1, ", run("stats", "--config", pinning).stdout)
    assert "of them pinned" in run("gc", "--yes", "--config", pinning).stdout


@pytest.mark.parametrize(
    ("key", "words"),
    [("0" * 64, "no tier has the whole context"), ("", "is no key"), ("xyz", "is no key")],
)
def test_what_cannot_be_pinned(pinning: Path, key: str, words: str) -> None:
    """A key that is none, or is not stored, is an error of one line."""
    result = run("pin", key, "--config", pinning)
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_key_must_be_told_from_others(root: Path, pinning: Path) -> None:
    """A beginning that several keys have, or none, is refused with the number of them."""
    keys = {header.key.hex() for header in headers(root).values()}
    by_number = {sum(key.startswith(digit) for key in keys): digit for digit in "0123456789abcdef"}
    by_number.pop(1, None)
    for number, digit in by_number.items():
        result = run("pin", digit, "--config", pinning)
        assert result.exit_code == 1
        assert f"{number or 'no'} keys begin with {digit}" in result.stderr


def test_a_tier_without_a_record_of_pins(root: Path, tmp_path: Path, others_tiers: None) -> None:
    """Where a pin would be gone with the command, it is refused."""
    del others_tiers
    file = config_of(tmp_path, f'name = "t"\nkind = "forgetful"\nroot = "{root}"')
    result = run("pin", "0" * 64, "--config", file)
    assert result.exit_code == 1
    assert "no tier here keeps a record of pins (t)" in result.stderr


def test_objects_that_change_while_they_are_verified(root: Path) -> None:
    """What vanished is no damage, and what cannot be read is told apart from it."""
    named = NamedTier("disk", "disk", FileTier(root, read_only=True))
    verification = Verification()
    to_read = verification.collect(named)
    vanished, unreadable = (Path(named.tier.location(object_id)) for object_id, _ in to_read[:2])
    vanished.unlink()
    unreadable.unlink()
    unreadable.mkdir()
    for object_id, size in to_read:
        verification.check(named, object_id, size)
    assert (verification.vanished, verification.intact) == (1, len(to_read) - 2)
    assert [found.location for found in verification.unreadable] == [str(unreadable)]
    assert verification.damaged == []
    assert not verification.ok


# -------------------------------------------------------------------- at one time


def cold_reply() -> str:
    with make_engine() as engine:
        return load_stub(engine, tier=[]).complete(PROMPT, response_tokens=4).reply


def computed(engine: Engine) -> int:
    """Prompt tokens of one more request that had to be computed."""
    stats = engine.complete("stub", PROMPT, response_tokens=4).stats
    return stats.prompt_tokens - stats.cache_delta.read


def test_removing_what_an_engine_uses(tmp_path: Path) -> None:
    """After gc by another process an engine computes again what it had, and stores it again."""
    root = tmp_path / "kvc"
    with make_engine(root) as engine:
        load_stub(engine, tier=["disk"])
        assert computed(engine) > 0
        assert computed(engine) == 0
        engine.flush()
        before = files(root)
        done = separately("gc", "--root", root, "--yes", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["removed"] == len(before)
        assert files(root) == []
        again = engine.complete("stub", PROMPT, response_tokens=4)
        assert (again.reply, again.cache_delta.read) == (cold_reply(), 0)
        assert engine.cache.counters().corrupt == 0
        engine.flush()
        assert files(root)
        assert computed(engine) == 0


@pytest.mark.parametrize(
    "arguments", [("verify", "--delete"), ("evict", "1KiB"), ("gc", "--yes")], ids=lambda a: a[0]
)
def test_beside_an_engine_that_serves(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """While one process removes, every reply of another is right, and nothing is damaged."""
    root = tmp_path / "kvc"
    expected = cold_reply()
    replies: list[str] = []
    stop = threading.Event()
    with make_engine(root) as engine:
        model = load_stub(engine, tier=["disk"])
        model.complete(PROMPT, response_tokens=4)
        engine.flush()

        def keep_serving() -> None:
            while not stop.is_set():
                replies.append(model.complete(PROMPT, response_tokens=4).reply)

        thread = threading.Thread(target=keep_serving)
        thread.start()
        try:
            done = separately(*arguments, "--root", root, "--json")
        finally:
            stop.set()
            thread.join()
        assert done.returncode == 0, done.stderr + done.stdout
        assert json.loads(done.stdout)
        assert set(replies) == {expected}
        assert engine.cache.counters().corrupt == 0
    after = run_json("verify", "--root", root)
    assert after["damaged"] == []


# ----------------------------------------------------------------------- the rest


def test_every_cache_command_is_documented() -> None:
    """docs/cli.md has a heading for each command, and a row for each of its options."""
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    sections = dict(zip((name.replace("`", "") for name in parts[1::2]), parts[2::2], strict=True))

    def options(heading: str) -> set[str]:
        return set(re.findall(r"^\| `(--[\w-]+)", sections[heading], flags=re.MULTILINE))

    common = options("Options of every cache command")
    assert {name for name in sections if name.startswith("cache ")} == {
        f"cache {name}" for name in cache.commands
    }
    assert set(cache.commands) == set(COMMANDS)
    for name, command in cache.commands.items():
        taken = {p.opts[0] for p in command.params if isinstance(p, click.Option)}
        assert options(f"cache {name}") | common == taken, name


def test_json_keys_are_documented(root: Path) -> None:
    """Every key of the JSON is named in docs/cli.md."""
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    flip(files(root)[0], 45)
    reports = [
        run_json("ls", "--root", root)[0],
        run_json("stats", "--root", root)[0],
        (verified := run_json("verify", "--root", root, exit_code=1)),
        verified["damaged"][0],
        run_json("gc", "--root", root, "--yes"),
        attrs.asdict(PinState(key="", pinned=())),
        attrs.asdict(Pinned("", 0, 0)),
    ]
    for report in reports:
        for key in report:
            assert f"`{key}`" in text, key


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_for_people(n_bytes: int, text: str) -> None:
    """Sizes are shown in the largest unit that leaves a number of at least one."""
    assert in_words(n_bytes) == text


def test_times_for_people() -> None:
    """A time is a date, and one that no calendar has is no error."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", human_time(10**18))
    assert human_time(10**24) == "?"

"""Random damage to the files of a root while it serves."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from erllama_tier_disk.layout import JANITOR_LOCK, parse_object_name
from stub_engine import KV_CLASSES, load_stub, make_engine
from torture.callers import Caller, Mix, answers_of, check_at_rest, join_callers
from torture.fault import Setup
from torture.store import troubles, verify
from torture.tally import Tally

CALLERS: Final = 3
REQUESTS: Final = 60
"""Of each caller; a round has two such loads, one before and one after a restart."""
PAUSE_S: Final = 0.004
"""Between two damages."""


def flip(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """A bit is another one."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size:
            file.seek(chance.randrange(size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ (1 << chance.randrange(8))]))


def truncate(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """The end is missing."""
    os.truncate(path, chance.randrange(1 + path.stat().st_size))


def empty(path: Path, _chance: random.Random, _others: list[Path]) -> None:
    """All of it is missing."""
    os.truncate(path, 0)


def extend(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """There is more."""
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 200)))


def garbage(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """As long as it was, and nothing else is the same."""
    path.write_bytes(chance.randbytes(path.stat().st_size))


def delete(path: Path, _chance: random.Random, _others: list[Path]) -> None:
    """It is gone."""
    path.unlink()


def other_bytes(path: Path, chance: random.Random, others: list[Path]) -> None:
    """What is in it is another object, which is whole."""
    path.write_bytes(chance.choice(others).read_bytes())


def other_file(path: Path, chance: random.Random, others: list[Path]) -> None:
    """It is another object's file, moved here."""
    chance.choice(others).replace(path)


def hard_link(path: Path, chance: random.Random, others: list[Path]) -> None:
    """It is another object's file, which is still there too."""
    other = chance.choice(others)
    if other != path:
        path.unlink()
        path.hardlink_to(other)


def no_permission(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """Nobody may read it, or its folder."""
    chance.choice([path, path, path.parent]).chmod(0)


def link(path: Path, chance: random.Random, others: list[Path]) -> None:
    """It is a symbolic link: to another object, to what never ends, to itself, to nothing."""
    target = chance.choice([chance.choice(others), Path("/dev/zero"), path, Path("nowhere")])
    path.unlink()
    path.symlink_to(target)


def folder(path: Path, _chance: random.Random, _others: list[Path]) -> None:
    """It is a folder."""
    path.unlink()
    path.mkdir()


def pipe(path: Path, _chance: random.Random, _others: list[Path]) -> None:
    """It is a pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def stray(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """Beside it lies something that is no object."""
    path.with_name(chance.choice(["lost+found", "a.kvc", ".x.tmp", "00" * 40])).touch()


def folder_gone(path: Path, _chance: random.Random, _others: list[Path]) -> None:
    """Its folder is gone, with all that was in it."""
    shutil.rmtree(path.parent)


def lock(path: Path, chance: random.Random, _others: list[Path]) -> None:
    """The file by which a janitor is elected is gone, or is none."""
    place = path.parents[2] / JANITOR_LOCK
    if place.is_dir():
        place.rmdir()
    else:
        place.unlink()
        if chance.random() < 0.5:
            place.mkdir()


WAYS: Final[tuple[Callable[[Path, random.Random, list[Path]], None], ...]] = (
    flip,
    flip,
    flip,
    truncate,
    empty,
    extend,
    garbage,
    delete,
    other_bytes,
    other_file,
    hard_link,
    no_permission,
    link,
    folder,
    pipe,
    stray,
    folder_gone,
    lock,
)


class Damager:
    """Damages one file after another; remembers which."""

    def __init__(self, root: Path, chance: random.Random, tally: Tally) -> None:
        self._root = root
        self._chance = chance
        self._tally = tally
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="damager")
        self.touched: set[str] = set()
        """Names of the files that were damaged."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(PAUSE_S):
            self.damage_one()

    def damage_one(self) -> None:
        """Pick a file and a way."""
        # What was a link or a pipe made of is left alone: reading it would never end.
        found = sorted(self._root.glob("objects/??/*.kvc"))
        paths = [path for path in found if path.is_file() and not path.is_symlink()]
        if not paths:
            return
        path, way = self._chance.choice(paths), self._chance.choice(WAYS)
        # Others are at work on the same files: what cannot be damaged any more is left alone.
        with contextlib.suppress(OSError):
            if way is folder_gone:
                self.touched |= {found.name for found in path.parent.iterdir()}
            elif path.stat().st_nlink > 1:
                self.touched |= {other.name for other in paths if other.samefile(path)}
            self.touched.add(path.name)
            way(path, self._chance, paths)
            self._tally.note(f"damage: {way.__name__}")
            self._tally.note("files damaged")


def give_permissions(root: Path) -> None:
    """Let the owner read everything again."""
    for path in [root, *root.glob("objects"), *root.glob("objects/*"), *root.glob("objects/*/*")]:
        with contextlib.suppress(OSError):
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                path.chmod(0o700)
            elif stat.S_ISREG(mode):
                path.chmod(0o600)


class Damage:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve while files are damaged, restart on what is left, serve again, look at it all."""
        kv_class = chance.choice(KV_CLASSES)
        answers_of(kv_class)  # learnt before anything fails
        tally = Tally()
        root = folder / "root"
        with Damager(root, chance, tally) as damager:
            self._serve(chance, root, kv_class, tally)
        give_permissions(root)
        self._serve(chance, root, kv_class, tally)
        give_permissions(root)
        self._count_objects(root, damager.touched, tally)
        return tally

    def _serve(self, chance: random.Random, root: Path, kv_class: str, tally: Tally) -> None:
        tiers = [{"name": "ram", "kind": "ram", "quota_bytes": 20_000}]
        tiers.append({"name": "disk", "kind": "disk", "root": str(root), "rescan_interval_s": 0.05})
        with make_engine(tiers=tiers) as engine:
            model = load_stub(
                engine,
                tier=chance.choice([["disk"], ["ram", "disk"]]),
                kv_class=kv_class,
                context_opts={"n_seq_max": 4, "kv_unified": chance.random() < 0.7},
            )
            callers = [
                Caller(
                    model,
                    answers_of(kv_class),
                    tally,
                    seed=f"{chance.random()} {number}",
                    count=self._setup.times(REQUESTS),
                    streams=4,
                    mix=Mix(timeouts=0.0, cancels=0.05),
                )
                for number in range(CALLERS)
            ]
            for caller in callers:
                caller.start()
            if join_callers(callers, tally):
                tally.check("the engine came to no rest", holds=engine.flush(60))
                check_at_rest(model, tally)
            counters = engine.cache.counters()
            tally.note("objects found corrupt", counters.corrupt)
            tally.note("restored whole prompts", counters.hits_exact)
            refused = counters.state_rejected
            tally.check("the backend refused state that was checked", holds=not refused)

    def _count_objects(self, root: Path, touched: set[str], tally: Tally) -> None:
        """Of objects that were damaged: whole again, or lost. All others must be whole."""
        verification = verify(root)
        bad = {Path(location).name: reason for location, reason in troubles(verification)}
        there = {path.name for path in root.glob("objects/??/*.kvc")} - bad.keys()
        for name in touched:
            if name in there:
                tally.survive("damaged objects whole again")
            elif _is_object(name):
                tally.lose("damaged objects lost")
        for name, reason in bad.items():
            if name not in touched and _is_object(name):
                tally.accuse(f"{name}, which nobody damaged: {reason}")
        tally.survive("objects verified", len(there - touched))

    def close(self) -> None:
        """Nothing is kept."""


def _is_object(name: str) -> bool:
    try:
        parse_object_name(name)
    except ValueError:
        return False
    return True


def open_fault(setup: Setup) -> Damage:
    """See ``Known.module``."""
    return Damage(setup)

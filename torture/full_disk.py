"""A device that is full now and then, in the middle of whatever is being written."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from erllama_core import Engine, Model
from stub_engine import KV_CLASSES, load_stub, make_engine
from torture.callers import PROMPTS, Caller, Mix, answers_of, check_at_rest, join_callers
from torture.fault import Setup
from torture.store import check_whole
from torture.tally import Tally

CALLERS: Final = 3
REQUESTS: Final = 60
DEVICE_BYTES: Final = (100_000, 400_000)
"""Least and most. All that the callers' prompts leave takes some 500 KB."""
_MIX: Final = Mix(timeouts=0.0, cancels=0.05, salts=0.5)


@contextlib.contextmanager
def small_device(folder: Path, size_bytes: int) -> Iterator[bool]:
    """Mount a tmpfs of that size; False where this process may not mount."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Swinging(threading.Thread):
    """Takes the space away and gives it back."""

    def __init__(self, chance: random.Random, tally: Tally) -> None:
        super().__init__(daemon=True, name="disk")
        self._chance, self._tally = chance, tally
        self._over = threading.Event()

    def run(self) -> None:
        try:
            while not self._over.wait(self._chance.uniform(0.0, 0.03)):
                self.swing()
                self._tally.note("swings")
        except BaseException as error:  # noqa: BLE001 - told by the tally
            self._tally.accuse(f"the disk's own thread: {error!r}")

    def swing(self) -> None:
        """Another amount of space."""
        raise NotImplementedError

    def free(self) -> None:
        """All of it."""
        raise NotImplementedError

    def stop(self) -> None:
        """Return when it has ended, and all of the space is free."""
        self._over.set()
        self.join()
        self.free()


class Ballast(Swinging):
    """Fills a device with a file of its own."""

    def __init__(self, folder: Path, chance: random.Random, tally: Tally) -> None:
        super().__init__(chance, tally)
        self._file = folder / "ballast"
        self._size = os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize

    def swing(self) -> None:
        size = self._chance.choice([0, self._chance.randrange(self._size), 2 * self._size])
        with contextlib.suppress(OSError):  # as it is meant to be
            self._file.write_bytes(bytes(size))

    def free(self) -> None:
        self._file.unlink(missing_ok=True)


class FileLimit(Swinging):
    """Limits the size of files that this process may write: what every user can do."""

    def swing(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = self._chance.choice([100, self._chance.randrange(1000, 12_000), hard])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def free(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class FullDisk:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve while the space comes and goes; then there is space again, and all must be well."""
        kv_class = chance.choice(KV_CLASSES)
        answers_of(kv_class)  # learnt before anything fails
        tally = Tally()
        device = folder / "device"
        device.mkdir()
        with small_device(device, chance.randrange(*DEVICE_BYTES)) as is_small:
            disk: Swinging
            if is_small and chance.random() < 0.7:
                disk = Ballast(device, chance, tally)
                tally.note("rounds on a small device")
            else:
                disk = FileLimit(chance, tally)
            root = device / "root"
            with make_engine(root) as engine:
                model = load_stub(engine, tier=["disk"], kv_class=kv_class)
                disk.start()
                try:
                    self._serve(engine, model, kv_class, chance, tally)
                finally:
                    disk.stop()
                counters = engine.cache.counters()
                tally.note("objects that found no room", counters.saves_dropped)
                check_whole(root, tally)
                self._save_again(engine, model, tally)
            check_whole(root, tally)
        return tally

    def _serve(
        self, engine: Engine, model: Model, kv_class: str, chance: random.Random, tally: Tally
    ) -> None:
        callers = [
            Caller(
                model,
                answers_of(kv_class),
                tally,
                seed=f"{chance.random()} {number}",
                count=self._setup.times(REQUESTS),
                streams=4,
                mix=_MIX,
            )
            for number in range(CALLERS)
        ]
        for caller in callers:
            caller.start()
        if join_callers(callers, tally):
            tally.check("the engine came to no rest", holds=engine.flush(60))
            check_at_rest(model, tally)

    def _save_again(self, engine: Engine, model: Model, tally: Tally) -> None:
        """What is computed now is stored, and found again."""
        engine.cache.gc()
        prompt = max(PROMPTS, key=len)
        for _ in range(2):
            done = model.complete(prompt, response_tokens=4, cache_salt="afterwards")
            tally.check("the engine came to no rest", holds=engine.flush(60))
        if done.cache_hit_kind == "exact":
            tally.survive()
        else:
            tally.accuse(f"with space again, a prompt was {done.cache_hit_kind}, not stored")

    def close(self) -> None:
        """Nothing is kept."""


def open_fault(setup: Setup) -> FullDisk:
    """See ``Known.module``."""
    return FullDisk(setup)

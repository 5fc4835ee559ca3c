"""The process that runs inputs: with coverage as guide where atheris is there, else without.

    python child.py TARGET SCRATCH --seconds 60 --seed 1 [--runs N] [--guide atheris|none]

What it is running lies in the file SCRATCH, so that whoever started it can tell what ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from findings import Findings
from mutation import mutated
from target import MOST_BYTES, Target, all_targets
from watch import TookTooLong, Watched, watched

_MEASURED_EVERY: Final = 16
_KEPT: Final = 2000
_FIRST: Final = 8
"""Seeds that are run before the time of an input counts."""
_NEVER_S: Final = 10_000_000
"""For libFuzzer's own clock, which runs on while others have the processor. 0 would not turn it
off: whatever is still running at its first tick would count as having hung."""
_INSTRUMENTED: Final = (
    *("erllama_core", "erllama_tier_disk", "erllama_tier_redis", "erllama_backend_stub"),
    *("erllama_backend_llama", "erllama_pressure_system", "tomllib"),
)


_HEAD: Final = struct.Struct("<QQQ")
"""Runs, new findings, and one more than the bytes that follow; 0: nothing is being run."""


class Progress:
    """How far a child has come, and its input, in a file that outlives it however it ends."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_HEAD.size + 2 * MOST_BYTES))
        with path.open("r+b") as file:
            self._map: Final = mmap.mmap(file.fileno(), 0)

    def note(self, runs: int, new: int, data: bytes | None) -> None:
        """From now on it is this."""
        data = None if data is None else data[: 2 * MOST_BYTES]
        if data:
            self._map[_HEAD.size : _HEAD.size + len(data)] = data
        _HEAD.pack_into(self._map, 0, runs, new, 0 if data is None else len(data) + 1)


def progress(path: Path) -> tuple[int, int, bytes | None]:
    """Runs, new findings, and what is being run, of a child or what is left of it."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < _HEAD.size:
        return 0, 0, None
    runs, new, length = _HEAD.unpack_from(content)
    return runs, new, content[_HEAD.size : _HEAD.size + length - 1] if length else None


class Runner:
    """Runs inputs and keeps what they bring to light."""

    def __init__(self, target: Target, opened: Watched, progress: Progress) -> None:
        self._findings: Final = Findings(target.name)
        self._opened: Final = opened
        self._progress: Final = progress
        self.runs = 0
        self.new = 0

    def run(self, data: bytes, *, timed: bool = True) -> bool:
        """Whether the input is worth going on from: one that is no finding."""
        self.runs += 1
        self._progress.note(self.runs, self.new, data)
        try:
            measured = timed and self.runs % _MEASURED_EVERY == 1
            self._opened.run(data, timed=timed, measured=measured)
        except (Exception, TookTooLong) as error:  # noqa: BLE001 - that is what is looked for
            path = self._findings.add_error(error, data)
            if path is not None:
                self.new += 1
                print(f"found: {path}", file=sys.stderr, flush=True)
            return False
        finally:
            self._progress.note(self.runs, self.new, None)
        return True


def run_blind(
    target: Target, runner: Runner, seed: int, seconds: float, most_runs: int | None
) -> None:
    """Mutations of the seeds, and of what became of them."""
    rng = random.Random(seed)
    pool = list(target.seeds().values())
    until = time.monotonic() + seconds
    for data in pool:
        runner.run(data)
    made = 0
    while time.monotonic() < until and (most_runs is None or made < most_runs):
        made += 1
        data = mutated(rng, rng.choice(pool), pool, target.words, is_json=target.is_json)
        if runner.run(data) and rng.random() < 0.02 and len(data) < 1 << 14:
            # Changes on changes, without a guide that says which are worth it.
            pool.append(data)
            if len(pool) > _KEPT:
                pool.pop(rng.randrange(len(target.seeds()), len(pool)))


def run_guided(target: Target, runner: Runner, seed: int, seconds: float) -> None:
    """As atheris finds its way: inputs that reach new code are gone on from. Ends the process."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional

    rng = random.Random(seed)
    seeds = list(target.seeds().values())
    for data in seeds[:_FIRST]:
        # What a reader imports when it is first used is instrumented then, which takes seconds.
        runner.run(data, timed=False)

    def custom(data: bytes, most: int, number: int) -> bytes:
        # Half by libFuzzer's own mutations, which know what was compared with what.
        if number % 2:
            return bytes(atheris.Mutate(data, most))
        rng.seed(number)
        return mutated(rng, data, seeds, target.words, is_json=target.is_json)[:most]

    with tempfile.TemporaryDirectory() as work:
        for name, data in target.seeds().items():
            (Path(work) / name).write_bytes(data)
        options = [
            *(f"-max_total_time={max(1, int(seconds))}", f"-seed={seed or 1}"),
            *(f"-max_len={MOST_BYTES}", f"-timeout={_NEVER_S}", "-rss_limit_mb=0", "-verbosity=0"),
            *("-handle_abrt=0", "-handle_segv=0", "-handle_bus=0", "-handle_fpe=0"),
            *("-handle_ill=0", "-print_final_stats=0", f"-artifact_prefix={work}/"),
        ]
        atheris.Setup(
            [sys.argv[0], work, *options],
            lambda data: runner.run(data) or None,
            custom_mutator=custom,
        )
        atheris.Fuzz()


def main() -> int:
    """Run a target; the exit code is 0 whatever was found, as findings are files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--guide", choices=("atheris", "none"), default="none")
    options = parser.parse_args()
    noted = Progress(options.scratch)
    with _instrumented(options.guide == "atheris"):
        target = all_targets()[options.target]
        with watched(target) as opened:
            runner = Runner(target, opened, noted)
            if options.guide == "atheris":
                run_guided(target, runner, options.seed, options.seconds)
            else:
                run_blind(target, runner, options.seed, options.seconds, options.runs)
    return 0


@contextlib.contextmanager
def _instrumented(guided: bool) -> Iterator[None]:
    if not guided:
        yield
        return
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional

    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        yield


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of what was interrupted may never end

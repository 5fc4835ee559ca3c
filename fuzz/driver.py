"""Fuzz what reads foreign bytes, for a bounded time.

    python fuzz/driver.py [TARGET ...] [--seconds 300] [--seed 1] [--guide auto|atheris|none]
    python fuzz/driver.py TARGET --input FILE      # what one input does, with its traceback

The targets share the time. Each runs in processes of its own, so that one that is ended by native
code, or hangs, is noticed and the rest goes on. What is found lies in ``fuzz/findings``, one file
for each kind of failure, with its traceback beside it; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from child import progress
from findings import Findings
from target import Target, all_targets
from watch import watched

_HERE: Final = Path(__file__).resolve().parent
_STARTUP_S: Final = 30.0
_SILENCE_S: Final = 120.0
"""An input that takes longer than this, on the clock, is stuck where no alarm reaches it."""


def run_target(
    target: Target, seconds: float, seed: int, guide: str, *, most_runs: int | None = None
) -> tuple[int, int]:
    """Run a target's children until the time is over; runs, and new findings."""
    until = time.monotonic() + seconds
    runs = new = 0
    with tempfile.TemporaryDirectory(prefix="erllama-fuzz-") as folder:
        scratch = Path(folder) / "input"
        while (left := until - time.monotonic()) > 0:
            scratch.unlink(missing_ok=True)
            how = _run_child(target, scratch, left, seed, guide, most_runs)
            its_runs, its_new, data = progress(scratch)
            runs, new = runs + its_runs, new + its_new
            if how is None:
                break
            if data is None:
                raise SystemExit(f"fuzz: {target.name} ended outside of any input: {how}")
            path = Findings(target.name).add_death(how, data)
            if path is not None:
                new += 1
                print(f"found: {path}", file=sys.stderr, flush=True)
            seed += 1000
            if most_runs is not None:
                break
    return runs, new


def _run_child(
    target: Target, scratch: Path, seconds: float, seed: int, guide: str, most_runs: int | None
) -> str | None:
    """How a child ended; None when its time was over."""
    command = [sys.executable, str(_HERE / "child.py"), target.name, str(scratch)]
    command += ["--seconds", str(seconds), "--seed", str(seed), "--guide", guide]
    command += [] if most_runs is None else ["--runs", str(most_runs)]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        seen, since = -1, time.monotonic()
        ends_by = since + seconds + _STARTUP_S
        try:
            while True:
                try:
                    code = child.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    pass
                runs, _, running = progress(scratch)
                now = time.monotonic()
                if runs != seen or running is None:
                    seen, since = runs, now
                if now - since > _SILENCE_S:
                    return "stuck"
                if running is None and now > ends_by:
                    return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            output.seek(0)
            said = output.read().decode("utf-8", "replace")
            for line in said.splitlines():
                if line.startswith("found: "):
                    print(line, file=sys.stderr, flush=True)
    if code == 0:
        return None
    if code < 0:
        return f"killed by signal {-code}"
    if progress(scratch)[2] is None:
        raise SystemExit(f"fuzz: {target.name} cannot run:\n{said}")
    return f"ended with code {code}"


def try_input(target: Target, path: Path) -> None:
    """Run one input here; its traceback is the answer."""
    with watched(target) as opened:
        opened.run(path.read_bytes(), measured=True)
    print(f"{target.name}: {path} is read or refused, as it should be")


def guide_of(wanted: str) -> str:
    """Atheris where it is installed and nothing else was asked for."""
    there = importlib.util.find_spec("atheris") is not None
    if wanted == "auto":
        if not there:
            print(
                "fuzz: atheris is not installed, so mutations are blind; for coverage as a guide: "
                "pip install 'erllama-core[fuzz]'",
                file=sys.stderr,
            )
        return "atheris" if there else "none"
    if wanted == "atheris" and not there:
        raise SystemExit("fuzz: atheris is not installed: pip install 'erllama-core[fuzz]'")
    return wanted


def main() -> int:
    """Fuzz; the exit code is 1 when something new was found."""
    targets = all_targets()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--seconds", type=float, default=300.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guide", choices=("auto", "atheris", "none"), default="auto")
    parser.add_argument("--input", type=Path, help="run this file alone, here")
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(targets))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; known: {', '.join(targets)}")
    chosen = [targets[name] for name in options.targets or targets]
    if options.input is not None:
        if len(options.targets) != 1:
            parser.error("--input needs the one target that reads it")
        try_input(chosen[0], options.input)
        return 0
    guide = guide_of(options.guide)
    runnable = [target for target in chosen if target.missing is None]
    for target in chosen:
        if target.missing is not None:
            print(f"{target.name}: left out, {target.missing} is not installed")
    found = 0
    until = time.monotonic() + options.seconds
    for number, target in enumerate(runnable):
        share = (until - time.monotonic()) / (len(runnable) - number)
        runs, new = run_target(target, max(1.0, share), options.seed, guide)
        found += new
        print(f"{target.name}: {runs} inputs, {new} new findings", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

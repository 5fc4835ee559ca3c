"""The command: break things for a while, print the table, exit with 1 if anything was wrong."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Final

from torture.fault import FAULTS, Known
from torture.record import Record, latest_seed
from torture.report import as_json, as_markdown, curves_json, lines_of
from torture.runner import Limits, run_fault
from torture.tally import Tally

_SECONDS: Final = 60.0
_FOLDER: Final = Path(".torture")


def choose_seed(folder: Path, given: int | None, faults: list[Known], limits: Limits) -> int:
    """The seed that was given, or that of a run that has not come to its end, or a new one."""
    if given is not None:
        return given
    latest = latest_seed(folder)
    if latest is not None:
        record = Record(folder, latest)
        if any(not limits.left(record, known.name).are_reached for known in faults):
            return latest
    return random.SystemRandom().randrange(1 << 32)


def show(known: Known, total: Tally) -> None:
    """How far a fault is, on one line of a terminal."""
    if sys.stderr.isatty():
        counts = f"{total.survived} survived, {total.lost} lost, {len(total.wrong)} wrong"
        sys.stderr.write(f"\r{known.name}: {counts}   ")
        sys.stderr.flush()


def main() -> int:
    """Run the faults that were asked for; the exit code."""
    names = [known.name for known in FAULTS]
    parser = argparse.ArgumentParser(
        prog="python -m torture", description="Break erllama on purpose; wrong must be 0."
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="FAULT", help=str(names))
    parser.add_argument("--seconds", type=float, help=f"for each fault; default {_SECONDS:.0f}")
    parser.add_argument("--rounds", type=int, help="for each fault, in place of seconds")
    parser.add_argument("--seed", type=int, help="default: of the run to go on with, or any")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="progress and results")
    parser.add_argument("--scale", type=float, default=1.0, help="how much a round does")
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the demo's")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    given = parser.parse_args()
    faults = [known for known in FAULTS if given.only is None or known.name in given.only]
    if given.rounds is None:
        limits = Limits(seconds=_SECONDS if given.seconds is None else given.seconds)
    else:
        limits = Limits(seconds=given.seconds or float("inf"), rounds=given.rounds)
    seed = choose_seed(given.folder, given.seed, faults, limits)
    record = Record(given.folder, seed)
    sys.stderr.write(f"seed {seed}, in {record.folder}\n")
    stopped = False
    try:
        for known in faults:
            total = Tally()

            def tell(tally: Tally, known: Known = known, total: Tally = total) -> None:
                total.add(tally)
                show(known, total)

            run_fault(known, record, limits, scale=given.scale, model_path=given.model, tell=tell)
            sys.stderr.write("\n" if sys.stderr.isatty() else f"{known.name}: done\n")
    except KeyboardInterrupt:
        stopped = True
        sys.stderr.write("\nstopped; the same command goes on from here\n")
    lines = lines_of(record, faults)
    found = as_json(seed, lines)
    (record.folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    measured = curves_json(record, faults)
    (record.folder / "curves.json").write_text(json.dumps(measured) + "\n", "utf-8")
    (record.folder / "report.md").write_text(as_markdown(lines), "utf-8")
    sys.stdout.write(json.dumps(found) + "\n" if given.json else as_markdown(lines))
    for line in lines:
        for what in line.tally.wrong:
            sys.stderr.write(f"WRONG, {line.known.name}: {what}\n")
    if any(line.tally.wrong for line in lines):
        return 1
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())

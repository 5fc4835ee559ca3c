"""The process that a fault's rounds run in, as they may end it.

It is started by :mod:`torture.runner`, and says a line of JSON for each round that is over.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from erllama_core.cli.logs import configure_logs
from torture.fault import Fault, Setup
from torture.tally import Tally

_NOBODY = 65534


def run_round(fault: Fault, seed: str, folder: Path) -> Tally:
    """One round in a new folder, which stays only if something was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        tally = fault.round(random.Random(seed), folder)
    except Exception:  # noqa: BLE001 - whatever it is, it is wrong, and told
        tally = Tally()
        tally.accuse(f"the round raised {traceback.format_exc()}")
    if not tally.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def give_up_rights(fault: Fault, folder: Path) -> None:
    """Go on as nobody, if this is root; with everything imported that a round imports."""
    if os.geteuid() != 0:
        return
    with tempfile.TemporaryDirectory() as warm:
        fault.round(random.Random(0), Path(warm))
    os.chown(folder, _NOBODY, _NOBODY)
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)


def main() -> None:
    """Run rounds until told."""
    parser = argparse.ArgumentParser(prog="torture.worker")
    parser.add_argument("fault")
    parser.add_argument("--module", required=True)
    parser.add_argument("--unprivileged", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    faulthandler.enable()  # SIGABRT, by which a hang is ended, shows where every thread was
    configure_logs()
    fault: Fault = importlib.import_module(given.module).open_fault(
        Setup(model_path=given.model, scale=given.scale)
    )
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.unprivileged:
        give_up_rights(fault, given.folder)
    until = time.monotonic() + given.seconds
    try:
        for number in range(given.first, given.first + given.rounds):
            if time.monotonic() >= until:
                break
            started = time.monotonic()
            seed = f"{given.seed} {given.fault} {number}"
            tally = run_round(fault, seed, given.folder / f"round-{number}")
            done = {"round": number, "seconds": time.monotonic() - started, **tally.as_json()}
            sys.stdout.write(json.dumps(done) + "\n")
            sys.stdout.flush()
    finally:
        fault.close()


if __name__ == "__main__":
    main()

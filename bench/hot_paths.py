"""Where the time goes: each hot path beside the least that it could take on this machine.

    python bench/hot_paths.py [--only SECTION ...] [--model FILE] [--quick] [--json FILE]

A floor is made of what was measured in the same run: bytes over the bandwidth of memory, of the
page cache or of a checksum, or a bare loop of ``llama_decode``. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import hot_paths_cache
import hot_paths_model
from hot_paths_floors import Floors
from hot_paths_part import Part
from hot_paths_sizes import QUICK, Sizes

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs

Measure = Callable[[Sizes, Floors, argparse.Namespace], list[Part]]

SECTIONS: dict[str, Measure] = {
    "tick": lambda sizes, _, given: hot_paths_model.tick(sizes, _model(given)),
    "token": lambda sizes, _, __: hot_paths_model.token(sizes),
    "lookup": lambda sizes, floors, _: hot_paths_cache.lookup(sizes, floors),
    "restore": lambda sizes, floors, given: hot_paths_cache.restore(sizes, floors, _model(given)),
    "save": lambda sizes, floors, given: hot_paths_cache.save(sizes, floors, _model(given)),
    "load": lambda sizes, floors, given: hot_paths_model.load(sizes, floors, _model(given)),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        floors = Floors.measure(Path(folder), sizes.floor_bytes, sizes.runs)
    print(f"this machine: {floors}")
    print(f"  {'':<58} {'takes':>11} {'floor':>11} {'times':>7}   floor is")
    measured: dict[str, list[Part]] = {}
    for name in arguments.only:
        began = time.perf_counter()
        measured[name] = SECTIONS[name](sizes, floors, arguments)
        print(f"{name} ({time.perf_counter() - began:.0f} s)")
        for part in measured[name]:
            print(part, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_plain(floors, measured), indent=2) + "\n", "utf-8")
    return 0


def _model(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.model
    return path or fetch_demo_model()


def _plain(floors: Floors, measured: dict[str, list[Part]]) -> dict[str, object]:
    sections = {
        name: [{**attrs.asdict(part), "ratio": part.ratio} for part in parts]
        for name, parts in measured.items()
    }
    return {"bytes_per_s": attrs.asdict(floors), "sections": sections}


if __name__ == "__main__":
    sys.exit(main())

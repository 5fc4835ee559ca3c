"""Serving's figures, each beside its target and its peers; what is not reached says MISSED.

    python bench/serving.py [--only SECTION ...] [--cells unified separate] [--streams 1 8]
                            [--model FILE] [--json FILE] [--quick]

Everybody has the same model file, threads, context and greedy sampling, and they take turns.
Figures are medians, with the least and the most of the runs in brackets. ``report.py`` joins
JSON of several runs, and makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import serving_burst
import serving_decode
import serving_stall
import serving_tick
from report import Section, run
from serving_sizes import QUICK, Sizes

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs

SECTIONS: dict[str, Callable[[Sizes, Path, tuple[bool, ...]], Section]] = {
    "burst": serving_burst.measure,
    "decode": serving_decode.measure,
    "stall": lambda sizes, path, _: serving_stall.measure(sizes, path),
    "tick": lambda sizes, path, _: serving_tick.measure(sizes, path),
}
CELLS = {"unified": True, "separate": False}


def main() -> int:
    """Measure and print; 1 when a target was missed at full size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--streams", nargs="+", type=int, help="numbers of streams that decode")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--json", type=Path, help="write all of it to this file as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.streams:
        sizes = attrs.evolve(sizes, streams=tuple(arguments.streams))
    path = arguments.model or fetch_demo_model()
    modes = tuple(CELLS[name] for name in arguments.cells)
    return run(
        arguments.only,
        lambda name: SECTIONS[name](sizes, path, modes),
        arguments.json,
        quick=arguments.quick,
    )


if __name__ == "__main__":
    sys.exit(main())

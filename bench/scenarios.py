"""Scenarios of services, beside what people would use instead, and beside no cache at all.

    python bench/scenarios.py [--only SECTION ...] [--model FILE] [--json FILE] [--quick]

Each section takes less than four minutes. ``report.py`` joins JSON of several runs, and makes
tables and plots of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import scenario_processes
import scenario_rag
import scenario_recompute
import scenario_turns
from report import Section, run
from scenario_sizes import QUICK, Sizes

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs

SECTIONS: dict[str, Callable[[Sizes, Path], Section]] = {
    "rag": scenario_rag.measure,
    "processes": scenario_processes.measure,
    "turns": scenario_turns.measure,
    "recompute-demo": lambda sizes, path: scenario_recompute.measure(sizes, path, "demo"),
    "recompute-tiny": lambda sizes, path: scenario_recompute.measure(sizes, path, "tiny"),
}


def main() -> int:
    """Measure and print; 1 when a target was missed at full size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--json", type=Path, help="write all of it to this file as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    path = arguments.model or fetch_demo_model()
    return run(
        arguments.only,
        lambda name: SECTIONS[name](sizes, path),
        arguments.json,
        quick=arguments.quick,
    )


if __name__ == "__main__":
    sys.exit(main())

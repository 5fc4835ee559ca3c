"""The cache's figures, each beside its target; what is not reached says MISSED.

    python bench/cache.py [--only SECTION ...] [--trace FILE] [--model FILE] [--quick]

Everything is measured through the cache that requests use. Seeds are fixed, times are medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cache_decode
import cache_index
import cache_restore
import cache_startup
import cache_storage
import cache_trace
from cache_sizes import QUICK, Sizes
from figure import Figure

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs

SECTIONS: dict[str, Callable[[Sizes, argparse.Namespace], list[Figure]]] = {
    "storage": lambda sizes, _: cache_storage.measure(sizes),
    "index": lambda sizes, _: cache_index.measure(sizes),
    "startup": lambda sizes, _: cache_startup.measure(sizes),
    "decode": lambda sizes, arguments: cache_decode.measure(
        sizes, arguments.model or fetch_demo_model()
    ),
    "restore": lambda sizes, _: cache_restore.measure(sizes),
    "trace": lambda sizes, arguments: cache_trace.measure(sizes, arguments.trace),
}


def main() -> int:
    """Measure and print; 1 when a target was missed at full size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--trace", type=Path, default=cache_trace.SAMPLE)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    missed = 0
    for name in arguments.only:
        began = time.perf_counter()
        figures = SECTIONS[name](sizes, arguments)
        print(f"{name} ({time.perf_counter() - began:.0f} s)")
        for figure in figures:
            print(figure, flush=True)
        missed += sum(not figure.is_met for figure in figures)
    print(f"{missed} targets missed" if missed else "all targets reached")
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())

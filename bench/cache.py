"""The cache's figures, each beside its target; what is not reached says MISSED.

    python bench/cache.py [--only SECTION ...] [--trace FILE] [--model FILE] [--json FILE]
                          [--quick]

Everything is measured through the cache that requests use. Seeds are fixed, times are medians.
"""

from __future__ import annotations

import argparse
import sys
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
from report import Section, run

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs


def _section(name: str, title: str, figures: list[Figure]) -> Section:
    return Section(name=name, title=title, figures=tuple(figures))


SECTIONS: dict[str, Callable[[Sizes, argparse.Namespace], Section]] = {
    "storage": lambda sizes, _: _section(
        "storage", "Bytes of conversations that share beginnings", cache_storage.measure(sizes)
    ),
    "index": lambda sizes, _: _section(
        "index", "Look-ups, and memory of the index", cache_index.measure(sizes)
    ),
    "startup": lambda sizes, _: _section(
        "startup", "Opening a root with many objects", cache_startup.measure(sizes)
    ),
    "decode": lambda sizes, arguments: _section(
        "decode-saving",
        "Decoding while state is saved",
        cache_decode.measure(sizes, arguments.model or fetch_demo_model()),
    ),
    "restore": lambda sizes, _: _section(
        "restore", "Bytes from disk and RAM", cache_restore.measure(sizes)
    ),
    "trace": lambda sizes, arguments: cache_trace.measure(sizes, arguments.trace),
}


def main() -> int:
    """Measure and print; 1 when a target was missed at full size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--trace", type=Path, default=cache_trace.SAMPLE)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--json", type=Path, help="write all of it to this file as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    return run(
        arguments.only,
        lambda name: SECTIONS[name](sizes, arguments),
        arguments.json,
        quick=arguments.quick,
    )


if __name__ == "__main__":
    sys.exit(main())

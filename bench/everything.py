"""All that erllama is measured by, piece by piece, and the tables and plots of it.

    python bench/everything.py [--list] [--only PIECE ...] [--results FOLDER] [--model FILE]
                               [--quick]

Each piece is a command of its own that takes some minutes and leaves a JSON file in the results'
folder. A piece whose file is there is not measured again: what was interrupted goes on where it
was, and to measure something anew its file is removed. A missing peer is told at the beginning,
and the rest is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
from child_process import BENCH, PEERS
from report import joined, read_json, show, write_json, write_markdown, write_plots

RESULTS: Final = BENCH / "results"
_REQUESTS: Final = ("cold", "exact", "longer", "branch", "returned", "restart")
_PEERS: Final = ("llama_cpp", "xllamacpp")


@attrs.frozen(kw_only=True)
class Piece:
    """One command. ``samples``: the file that it shares with the pieces that measure the same."""

    name: str
    script: str
    arguments: tuple[str, ...]
    samples: str | None = None

    def command(self, results: Path) -> list[str]:
        """What is run; it leaves ``name.json`` behind."""
        command = [sys.executable, str(BENCH / self.script), *self.arguments]
        command += ["--json", str(self.file(results))]
        if self.samples is not None:
            command += ["--samples", str(results / f"{self.samples}.samples")]
        return command

    def file(self, results: Path) -> Path:
        """Where its figures are when it has been measured."""
        return results / f"{self.name}.json"


def pieces() -> Iterator[Piece]:
    """In the order in which they are measured, and in which the tables have them."""
    for n_tokens, rounds in ((512, (5,)), (2048, (2, 3)), (6000, (1, 1, 1))):
        for number, some in enumerate(rounds, 1):
            name = f"requests-{n_tokens}"
            yield Piece(
                name=f"{name}-{number}" if len(rounds) > 1 else name,
                script="compare",
                arguments=("--only", *_REQUESTS, "--tokens", str(n_tokens), "--rounds", str(some)),
                samples="requests",
            )
    for number in (1, 2, 3):
        yield Piece(
            name=f"talks-{number}",
            script="compare",
            arguments=("--only", "chat", "agent", "--rounds", "1"),
            samples="talks",
        )
    for cells in ("unified", "separate"):
        yield _serving(f"burst-{cells}", "burst", "--cells", cells)
    for streams in (1, 2, 4, 8):
        yield _serving(f"decode-{streams}", "decode", "--streams", str(streams))
    yield _serving("stall", "stall")
    yield _serving("tick", "tick")
    for scenario in ("rag", "processes", "turns", "recompute-demo", "recompute-tiny"):
        yield Piece(name=scenario, script="scenarios.py", arguments=("--only", scenario))
    yield Piece(name="trace", script="cache.py", arguments=("--only", "trace"))


def _serving(name: str, section: str, *arguments: str) -> Piece:
    return Piece(name=name, script="serving.py", arguments=("--only", section, *arguments))


def missing_peers() -> list[str]:
    """Of the libraries that others run on, those that cannot be measured here."""
    if not PEERS.exists():
        return list(_PEERS)
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return [
        name
        for name in _PEERS
        if subprocess.run([PEERS, "-c", program, name], check=False).returncode
    ]


def measure(asked: Sequence[Piece], results: Path, options: Sequence[str]) -> list[str]:
    """Run the pieces that are not there; the names of those that left nothing."""
    failed = []
    results.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(asked, 1):
        where = f"{piece.name} ({number} of {len(asked)})"
        if piece.file(results).exists():
            print(f"{where}: measured already", flush=True)
            continue
        print(where, flush=True)
        began = time.monotonic()
        # It returns 1 for targets that were missed; what counts is what it leaves.
        done = subprocess.run([*piece.command(results), *options], check=False)
        if not piece.file(results).exists():
            failed.append(piece.name)
            print(f"{piece.name} left no results, and returned {done.returncode}", flush=True)
        print(f"{piece.name} took {time.monotonic() - began:.0f} s", flush=True)
    return failed


def write(asked: Sequence[Piece], results: Path) -> int:
    """Tables and plots of all pieces that are there; how many targets were missed."""
    files = [file for piece in asked if (file := piece.file(results)).exists()]
    sections = joined(section for file in files for section in read_json(file))
    for section in sections:
        print(section.name)
        show(section)
    write_json(results / "all.json", sections)
    write_markdown(results / "tables.md", sections)
    print(f"tables: {results / 'tables.md'}")
    try:
        write_plots(results / "plots", sections)
        print(f"plots:  {results / 'plots'}")
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
    return sum(not figure.is_met for section in sections for figure in section.figures)


def main() -> int:
    """Measure and print; 1 when a target was missed at full size, or a piece failed."""
    every = {piece.name: piece for piece in pieces()}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=every, default=list(every))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--list", action="store_true", help="print the pieces, and measure none")
    arguments = parser.parse_args()
    asked = [every[name] for name in arguments.only]
    if arguments.list:
        for piece in asked:
            done = "measured" if piece.file(arguments.results).exists() else ""
            print(f"{piece.name:<20} {done}")
        return 0
    for name in missing_peers():
        print(f"not installed: {name}; what needs it is left out (make .venv-peers/.ready)")
    options = ["--quick"] if arguments.quick else []
    if arguments.model is not None:
        options += ["--model", str(arguments.model.resolve())]
    failed = measure(asked, arguments.results, options)
    count = write(asked, arguments.results)
    if failed:
        print(f"not measured: {', '.join(failed)}")
    print(f"{count} targets missed" if count else "all targets reached")
    return 1 if failed or (count and not arguments.quick) else 0


if __name__ == "__main__":
    sys.exit(main())

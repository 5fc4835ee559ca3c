"""First tokens of erllama beside those of what people would use instead.

    python bench/compare [--only SCENARIO ...] [--tokens N ...] [--rounds N] [--who NAME ...]
                         [--model FILE] [--samples FILE] [--json FILE] [--quick]

Everybody runs in a process of its own, on the same file, with the same threads, context, prompts
and greedy sampling. In every round each takes its turn, another one first; ratios are of one
round, and figures are medians with the least and the most. With ``--samples`` rounds are added to
those that an earlier command has left there, so that a long measurement can be made in pieces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import show, write_json

from compare import judged, one_request, talks
from compare.contestants import KINDS
from compare.samples import Samples
from compare.sizes import QUICK, Sizes
from erllama_backend_llama.context_params import default_threads
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.cli.logs import configure_logs

SCENARIOS = (*one_request.TITLES, *talks.TITLES)


def main() -> int:
    """Measure and print; 1 when a target was missed at full size."""
    parser = argparse.ArgumentParser(
        prog="bench/compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths of prompts")
    parser.add_argument("--rounds", type=int, help="how often everybody takes a turn")
    parser.add_argument("--who", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model")
    parser.add_argument("--samples", type=Path, help="add to this file's measurements")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    configure_logs()
    sizes = QUICK if arguments.quick else Sizes()
    path: Path = arguments.model or fetch_demo_model()
    samples = Samples.read(arguments.samples)
    asked = set(arguments.only)
    if requests := asked & one_request.TITLES.keys():
        for n_tokens in arguments.tokens or sizes.rounds:
            rounds = arguments.rounds or sizes.rounds.get(n_tokens, 3)
            one_request.measure(
                path, arguments.who, requests, n_tokens, rounds, sizes, samples, default_threads()
            )
    if conversations := asked & talks.TITLES.keys():
        rounds = arguments.rounds or sizes.talk_rounds
        talks.measure(path, arguments.who, conversations, rounds, sizes, samples, default_threads())
    if arguments.samples is not None:
        samples.write(arguments.samples)
    sections = judged.sections(samples)
    for section in sections:
        print(section.name)
        show(section)
    if arguments.json is not None:
        write_json(arguments.json, sections)
    count = sum(not figure.is_met for section in sections for figure in section.figures)
    print(f"{count} targets missed" if count else "all targets reached")
    return 1 if count and not arguments.quick else 0

"""Decoding under a JSON grammar, beside decoding without one.

    python bench/grammar.py [--model FILE] [--pairs 9] [--tokens 128] [--threads N]

Each pair is a reply without a grammar and one with it, one behind the other, in turns of order, on
the same prompt with the same options; what is compared is tokens per second from the first token
to the last. The prompt shows JSON that goes on, so that both replies are much the same text, and
how many of the drawn tokens the grammar turned down is told beside. The last two lines are a
prompt that asks for no JSON at all, where nearly every token is a second choice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import attrs
from figure import Figure

from erllama_core import Completion, Engine, Model, load_config
from erllama_core.cli.demo_model import fetch_demo_model

JSON = r"""
root   ::= array
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"
array  ::= "[" ws (value ("," ws value)*)? ws "]"
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
ws     ::= ([ \t\n] ws)?
"""
RECORD = r"""
root   ::= "[" record ("," record){7} "]"
record ::= "{\"id\":" [0-9]{1,3} ",\"name\":\"" [A-Za-z]{3,12} "\",\"age\":" [0-9]{2} "}"
"""
RECORDS = "\n".join(
    f'  {{"id": {number}, "name": "{name}", "age": {age}, "city": "{city}"}},'
    for number, (name, age, city) in enumerate(
        [
            ("Ann", 31, "Oslo"),
            ("Ben", 45, "Rome"),
            ("Cho", 27, "Seoul"),
            ("Dee", 52, "Paris"),
            ("Eva", 38, "Berlin"),
            ("Fay", 24, "London"),
        ],
        start=1,
    )
)
FOLLOWS = f"A list of people, as JSON:\n\n[\n{RECORDS}\n]\n\nAnother such list, longer:\n\n"
ANYTHING = "Once upon a time, in a quiet village by the sea, there lived a fox who"
MOST_REJECTED = 0.05


@attrs.frozen
class Case:
    """A prompt and how its reply is drawn."""

    name: str
    prompt: str
    options: dict[str, Any]
    follows: bool = True
    """Whether the model says JSON by itself; else it is held to records of one form."""


CASES = (
    Case("greedy", FOLLOWS, {}),
    Case("temperature 0.7", FOLLOWS, {"temperature": 0.7}),
    Case(
        "temperature 0.7, penalty 1.05", FOLLOWS, {"temperature": 0.7, "repetition_penalty": 1.05}
    ),
    Case("temperature 0.7, all of the vocabulary", FOLLOWS, {"temperature": 0.7, "top_k": 0}),
    Case("greedy, of no JSON", ANYTHING, {}, follows=False),
    Case("temperature 0.7, of no JSON", ANYTHING, {"temperature": 0.7}, follows=False),
)


def rate(done: Completion) -> float:
    """Tokens per second, from the first token on."""
    return (len(done.generated) - 1) / done.stats.decode_s


def measure(model: Model, case: Case, *, pairs: int, tokens: int) -> list[Figure]:
    """The ratio of both rates, and how much was turned down."""
    ratios, plain_rates, rejected, drawn = [], [], 0, 0
    for number in range(pairs):
        options: dict[str, Any] = {**case.options, "seed": number, "response_tokens": tokens}
        done: dict[bool, Completion] = {}
        for with_grammar in (number % 2 == 0, number % 2 == 1):
            options["grammar"] = (JSON if case.follows else RECORD) if with_grammar else None
            done[with_grammar] = model.complete(case.prompt, **options)
        if min(len(reply.generated) for reply in done.values()) < 16:
            continue  # too short to be timed
        ratios.append(rate(done[True]) / rate(done[False]))
        plain_rates.append(rate(done[False]))
        rejected += done[True].stats.grammar_rejections
        drawn += len(done[True].generated)
    share = rejected / drawn
    is_target = case.follows and share <= MOST_REJECTED
    return [
        Figure.of_runs(
            f"{case.name}: of the speed without ({statistics.median(plain_rates):.0f} tokens/s)",
            ratios,
            target=0.9 if is_target else None,
            bound="at least",
        ),
        Figure(
            name=f"{case.name}: of {drawn} tokens turned down",
            measured=100 * share,
            unit="%",
            digits=1,
            target=100 * MOST_REJECTED if case.follows else None,
        ),
    ]


def main() -> int:
    """Measure and print; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a GGUF file; the demo model without it")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="of each reply, at most")
    parser.add_argument("--threads", type=int, help="one per core without it")
    options = parser.parse_args()
    missed = False
    with Engine(load_config({}, environ={})) as engine:
        model = engine.load_model(
            backend="llama",
            model_path=str(options.model or fetch_demo_model()),
            tier=[],
            context_opts={"n_ctx": 2048, "n_threads": options.threads},
        )
        model.complete(FOLLOWS, response_tokens=32, grammar=JSON)  # warms up
        print("decoding under a JSON grammar, medians of pairs")
        for case in CASES:
            for figure in measure(model, case, pairs=options.pairs, tokens=options.tokens):
                print(figure)
                missed |= not figure.is_met
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

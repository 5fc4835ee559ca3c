"""What stream processors cost for each token: bare, on a reply of tokens of four bytes.

    python bench/streams.py [--tokens 200000] [--model demo|FILE]

With a model, also which part of the time they take in which it generates a reply, whose words are
the markers, so that every processor has something to do.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erllama_core import Engine, Prompt, load_config
from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.host import PluginHost
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.interfaces.stream import Event, ProcessorRequest
from erllama_core.providers import NoOptions
from erllama_core.signing import SigningKey
from erllama_core.stream.pipeline import Pipeline, Stage

TARGET_US = 10.0
TARGET_SHARE = 0.01
REPLY_TOKENS = 256
RUNS = 5
STOPS = ("\n\nUser:", "END OF REPLY", "</answer>", "<|end|>")
NAMES = ("thinking", "tool_calls", "stop_sequences", "utf8")

PARTS = {
    "plain text": "The quick brown fox jumps over a lazy dog, and so on. ",
    "text with '<', and characters of several bytes": "if (a < b) { x <<= 1 } « naïve » 日本 END? ",
    "thinking": "<think>let me think of it, 日本, and more of it</think>It is so. ",
    "tool calls": '<tool_call>{"name": "f", "q": "<arg>some text</arg>"}</tool_call> ',
}


class PieceVocabulary:
    """Tokens of four bytes of a text; a token's id is its place."""

    control_tokens: Mapping[int, str] = {}

    def __init__(self, data: bytes) -> None:
        self._pieces = [data[at : at + 4] for at in range(0, len(data), 4)]
        self.n_tokens = len(self._pieces)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]


def seconds(vocabulary: Any, n_tokens: int, names: tuple[str, ...]) -> float:
    """For ``n_tokens`` tokens through the processors of these names."""
    host = PluginHost(discover=False)
    make: Any = functools.partial(
        ProcessorRequest,
        vocabulary=vocabulary,
        prompt=Prompt([0]),
        stop_sequences=STOPS,
        thinking=True,
        thinking_markers=ThinkingMarkers(start="<think>", end="</think>"),
        tool_call_markers=ToolCallMarkers(
            start="<tool_call>", end="</tool_call>", payload_start="<arg>", payload_end="</arg>"
        ),
        begin_signature=SigningKey(bytes(32)).begin,
    )
    stages = [Stage(host.get("processor", name), NoOptions()) for name in names]
    pipeline = Pipeline(vocabulary, stages, make)
    feed, last = pipeline.feed, vocabulary.n_tokens
    start = time.thread_time()  # its own work, on a machine that may be busy
    for token in range(n_tokens):
        feed(token % last)
    return time.thread_time() - start


def decode_shares(path: Path, processors: Sequence[str]) -> tuple[float, float]:
    """Of a model's replies: the part of decoding that processors take, and microseconds a token.

    Medians. What the worker's thread spends in the pipeline, the clock's own cost included,
    against the time from the first token to the last.
    """
    spent = [0.0]
    feed = Pipeline.feed

    def timed(self: Pipeline, token: int) -> Sequence[Event]:
        start = time.thread_time()
        events = feed(self, token)
        spent[0] += time.thread_time() - start
        return events

    shares, costs = [], []
    Pipeline.feed = timed  # type: ignore[method-assign]
    try:
        with Engine(load_config({}, environ={})) as engine:
            markers: dict[str, Any] = {
                "thinking_markers": {"start": " the", "end": "."},
                "tool_call_markers": {"start": ",", "end": " a"},
            }
            model = engine.load_model(
                model_path=str(path),
                tier=[],
                context_opts={"n_ctx": 1024},
                processors=list(processors),
                **(markers if processors else {}),
            )
            prompt = model.apply_chat_template(
                [{"role": "user", "content": "Tell me everything about lighthouses."}]
            )
            for _ in range(RUNS):
                spent[0] = 0.0
                done = model.complete(
                    prompt,
                    response_tokens=REPLY_TOKENS,
                    thinking=True,
                    stop_sequences=STOPS if processors else None,
                )
                shares.append(spent[0] / done.stats.decode_s)
                costs.append(spent[0] / len(done.generated) * 1e6)
    finally:
        Pipeline.feed = feed  # type: ignore[method-assign]
    return statistics.median(shares), statistics.median(costs)


def report_decoding(path: Path) -> None:
    """Print what the processors take of decoding, and what UTF-8 assembly takes alone."""
    share, cost = decode_shares(path, NAMES[:-1])
    bare, bare_cost = decode_shares(path, ())
    judged = "ok" if share <= TARGET_SHARE else "MISSED"
    print(
        f"of decoding, {path.stem}: {share:.3%} with all four, at most {TARGET_SHARE:.0%}: "
        f"{judged} ({cost:.1f} us a token; with UTF-8 assembly alone {bare:.3%}, "
        f"{bare_cost:.1f} us)"
    )


def main() -> None:
    """Print one line for each kind of reply."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--model", help="a GGUF file, or 'demo'")
    arguments = parser.parse_args()
    n_tokens = arguments.tokens
    for what, part in PARTS.items():
        vocabulary = PieceVocabulary((part * 4).encode())
        some, bare = (
            min(seconds(vocabulary, n_tokens, names) for _ in range(3)) / n_tokens * 1e6
            for names in (NAMES, ("utf8",))
        )
        judged = "ok" if some <= TARGET_US else "MISSED"
        print(
            f"{what}: {some:.2f} us a token with all four, at most {TARGET_US:g}: {judged} "
            f"({bare:.2f} with UTF-8 assembly alone)"
        )
    if arguments.model:
        demo = arguments.model == "demo"
        report_decoding(fetch_demo_model() if demo else Path(arguments.model))


if __name__ == "__main__":
    main()

"""What stream processors cost for each token: bare, on a reply of tokens of four bytes.

python bench/streams.py [--tokens 200000]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping
from typing import Any

from erllama_core import Prompt
from erllama_core.host import PluginHost
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers
from erllama_core.interfaces.stream import ProcessorRequest
from erllama_core.providers import NoOptions
from erllama_core.signing import SigningKey
from erllama_core.stream.pipeline import Pipeline, Stage

TARGET_US = 10.0
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
        stop_sequences=("\n\nUser:", "END OF REPLY", "</answer>", "<|end|>"),
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


def main() -> None:
    """Print one line for each kind of reply."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    n_tokens = parser.parse_args().tokens
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


if __name__ == "__main__":
    main()

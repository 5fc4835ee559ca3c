"""What every process of a peer does: read commands, answer them, end when nobody asks any more.

Lines of JSON come in on standard input, and each is answered on standard output. The first says
how to start. Whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Commands = Mapping[str, Callable[[Any], Any]]
"""What may be asked for; each takes and returns what JSON can say."""


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Commands]]) -> None:
    """Start, say what ``start`` says of itself, and serve until standard input ends."""
    # Native libraries print to standard output as well; only answers are to arrive there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    about, commands = start(json.loads(sys.stdin.readline()))
    answer(about)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer({"done": commands[command["do"]](command["with"])})
        except Exception as error:  # noqa: BLE001 - told to the parent
            answer({"error": repr(error)})
    answers.flush()
    if "close" in commands:
        commands["close"](None)
    os._exit(0)  # native threads would run on

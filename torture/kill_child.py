"""The process that is killed: serves a real model from a root, and says every reply.

    python -m torture.kill_child ROOT MODEL SEED QUESTIONS PARENT

It ends by itself only when its parent does.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

from stub_engine import make_engine
from torture.real_answers import MOST_TOKENS, QUESTIONS, SEPARATE, load_real

STREAMS = 3
_saying = threading.Lock()


def say(**values: Any) -> None:
    """A line for the parent."""
    with _saying:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def ask(model: Any, chance: random.Random, n_questions: int, parent: int) -> None:
    """Ask one question after another, for as long as the parent lives."""
    try:
        while os.getppid() == parent:
            number = chance.randrange(n_questions)
            # Half of it is everybody's, half is new: there is always something to write.
            salt = chance.choice([None, f"{chance.random()}"])
            done = model.complete(QUESTIONS[number], response_tokens=MOST_TOKENS, cache_salt=salt)
            say(number=number, said=done.generated, kind=done.cache_hit_kind)
    except BaseException as error:  # noqa: BLE001 - told to the parent
        say(error=repr(error))


def main() -> None:
    """Serve until killed."""
    root, model_path, seed, n_questions, parent = sys.argv[1:]
    tiers = [{"name": "disk", "kind": "disk", "root": root, "rescan_interval_s": 0.2}]
    with make_engine(tiers=tiers) as engine:
        model = load_real(engine, Path(model_path), ["disk"], context_opts=SEPARATE)
        say(ready=True)
        askers = [
            threading.Thread(
                target=ask,
                args=(model, random.Random(f"{seed} {n}"), int(n_questions), int(parent)),
            )
            for n in range(STREAMS)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()


if __name__ == "__main__":
    main()

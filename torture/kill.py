"""SIGKILL of processes that serve a real model and store what they compute in one root."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from erllama_core.cli.demo_model import fetch_demo_model
from erllama_core.interfaces.block import Header
from torture.environment import environment
from torture.fault import Setup
from torture.real_answers import QUESTIONS, SEPARATE, RealAnswers
from torture.store import check_whole, headers, is_kept
from torture.tally import Tally

PATIENCE_S: Final = 120.0
"""For a child to be ready, on a machine that is busy."""
LONGEST_S: Final = 3.0
"""From ready to the kill."""
ROUNDS_A_ROOT: Final = 5
"""Then it is emptied: what is all stored already is not written again."""


class Child:
    """A process that serves until it is killed."""

    def __init__(self, root: Path, model_path: Path, seed: int, n_questions: int) -> None:
        command = [sys.executable, "-m", "torture.kill_child"]
        command += [str(root), str(model_path), str(seed), str(n_questions), str(os.getpid())]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_ready(self) -> bool:
        """Whether it came to serve."""
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            return False
        if line is None:
            self._lines.put(None)  # whoever reads on is to see the end too
        return line is not None

    def kill(self) -> list[dict[str, Any]]:
        """End it now; what it said since it was asked last."""
        self._process.kill()
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        said: list[dict[str, Any]] = []
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(ValueError):  # a line that the kill cut short
                said.append(json.loads(line))
        if code != -signal.SIGKILL:
            said.append({"error": f"it ended by itself, with {code}"})
        return said


class Kill:
    """The fault. Its root lasts for some rounds, so that each child starts on what others left."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._path = setup.model_path or fetch_demo_model()
        self._n_questions = setup.times(len(QUESTIONS))
        self._answers = RealAnswers(
            self._path, QUESTIONS[: self._n_questions], context_opts=SEPARATE
        )
        self._root = Path(tempfile.mkdtemp(prefix="erllama-kill-"))
        self._published: dict[Path, Header] = {}
        self._rounds = 0

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """One child, or two at once, killed while they serve; then the root is looked at."""
        del folder
        tally = Tally()
        if self._rounds % ROUNDS_A_ROOT == 0:
            shutil.rmtree(self._root)
            self._published.clear()
        self._rounds += 1
        children = [
            Child(self._root, self._path, chance.randrange(1 << 32), self._n_questions)
            for _ in range(chance.choice([1, 1, 1, 2]))
        ]
        try:
            if chance.random() < 0.15:  # while it starts
                time.sleep(chance.uniform(0.0, 1.5))
            else:
                for child in children:
                    tally.check("a child did not come to serve", holds=child.wait_ready())
        finally:
            for child in children:
                # Not a wait for something: it spreads the moments of the kills.
                time.sleep(chance.uniform(0.0, LONGEST_S * self._setup.scale))
                self._published |= headers(self._root)
                self._judge(child.kill(), tally)
                tally.note("kills")
        self._look(tally)
        self._answers.note_rounded(tally)
        return tally

    def _judge(self, said: list[dict[str, Any]], tally: Tally) -> None:
        for reply in said:
            if "error" in reply:
                tally.accuse(f"a child: {reply['error']}")
            elif "number" in reply:
                if self._answers.is_right(reply["number"], reply["said"]):
                    tally.survive(f"replies, {reply['kind']}")
                else:
                    tally.accuse(f"a reply that is not the model's: {reply}")

    def _look(self, tally: Tally) -> None:
        """All that was published is there, or in a longer block, and whole; nothing else is."""
        if not (self._root / "objects").is_dir():
            return  # it was killed before it opened the root
        check_whole(self._root, tally)
        there = headers(self._root)
        for path in self._published.keys() - there.keys():
            header = self._published.pop(path)
            if not is_kept(header, there.values()):
                tally.lose("published objects gone")
        self._published |= there

    def close(self) -> None:
        """The root is removed."""
        self._answers.close()
        shutil.rmtree(self._root, ignore_errors=True)


def open_fault(setup: Setup) -> Kill:
    """See ``Known.module``."""
    return Kill(setup)

"""Using model files in processes of their own, which may die of them.

As a program it is the process that all of these are forked from: it has one thread, whatever
the tests' own has. It reads paths, one a line, and answers each with what came of it.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

MOST_SECONDS = 30


def use(path: Path) -> None:
    """Do with a model whatever touches its metadata."""
    from erllama_backend_llama.model import load_model
    from erllama_backend_llama.options import LlamaOptions
    from erllama_core.interfaces.backend import BackendRequest, ContextOptions, Row, SamplingParams

    context = ContextOptions(n_ctx=256, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1)
    model = load_model(BackendRequest(model_path=path, options=LlamaOptions(), context=context))
    vocabulary = model.vocabulary
    tokens = vocabulary.tokenize(
        "Hello there, <|im_start|>all of you", add_bos=vocabulary.add_bos, parse_special=True
    )
    tokens = tokens or bytes(8)  # of a vocabulary in which the text has none
    vocabulary.detokenize(tokens)
    opened = model.open_context()
    model.identity()
    opened.step([Row(0, 0, tokens, logits=True)])
    sampler = model.new_sampler(SamplingParams(temperature=1.0, repetition_penalty=1.1), tokens)
    drawn = opened.sample(0, sampler).to_bytes(4, "little")
    opened.step([Row(0, len(tokens) // 4, drawn, logits=True)])
    sampler.close()
    model.close()


class Users:
    """Processes that use model files; a context manager. ``unchecked``: without our checks."""

    def __init__(self, *, unchecked: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(["unchecked"] if unchecked else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def fate(self, path: Path) -> str:
        """``"used"``, ``"refused"``, or how a process that used the file ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def fate_of(use: Callable[[Path], None], path: Path) -> str:
    """``"used"``, ``"refused"``, or how a fork of this process ended that used the file."""
    from erllama_core.errors import ErllamaError

    child = os.fork()
    if child == 0:
        code = 3
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            # Where a fuzzer runs, they are its own.
            for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGALRM, signal.SIGPROF):
                signal.signal(number, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(MOST_SECONDS)
            use(path)
            code = 0
        except ErllamaError:
            code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return {0: "used", 1: "refused"}.get(os.WEXITSTATUS(status), "an error of Python")


def main() -> None:
    """Answer paths until there are no more."""
    import erllama_backend_llama.model

    if "unchecked" in sys.argv:
        # A file that has tensors: one without any is a vocabulary, and is loaded as such.
        vars(erllama_backend_llama.model)["check_model"] = lambda _: {"some": None}
    for line in sys.stdin:
        sys.stdout.write(fate_of(use, Path(line.strip())) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

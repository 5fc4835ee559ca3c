"""Texts that would overflow the stack of a tokenizer that recurses once a character."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from erllama_backend_llama.large_stack import check_runs, on_large_stack
from erllama_backend_llama.model import LlamaModel, load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.errors import EngineClosed, InvalidPrompt
from erllama_core.interfaces.backend import BackendRequest, ContextOptions
from tiny_gguf import write_tiny_gguf

TOKENISE = """
import sys, threading
from pathlib import Path
from erllama_backend_llama.model import load_model
from erllama_backend_llama.options import LlamaOptions
from erllama_core.interfaces.backend import BackendRequest, ContextOptions

model = load_model(
    BackendRequest(
        model_path=Path(sys.argv[1]), options=LlamaOptions(), context=ContextOptions(n_threads=1)
    )
)
def tokenise():
    for text in ("a" * 60_000, " " * 60_000, "字" * 20_000, "!" * 60_000):
        tokens = model.vocabulary.tokenize(text, add_bos=False, parse_special=True)
        assert model.vocabulary.detokenize(tokens) == text.encode(), text[:5]
threading.stack_size(512 << 10)  # what a thread has on macOS
thread = threading.Thread(target=tokenise)
thread.start()
thread.join()
model.close()
print("whole")
"""


def test_a_long_run_does_not_end_the_process(tmp_path: Path) -> None:
    """Sixty thousand equal characters, on a small stack, with a tokenizer that recurses."""
    path = tmp_path / "bloom.gguf"
    write_tiny_gguf(path, "llama")
    data = path.read_bytes()
    assert data.count(b"qwen2") == 1
    path.write_bytes(data.replace(b"qwen2", b"bloom"))
    result = subprocess.run(
        [sys.executable, "-c", TOKENISE, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    assert result.stdout.endswith("whole\n")


def test_a_run_without_an_end_is_refused() -> None:
    """Half a million characters without a space, or of spaces, are an InvalidPrompt."""
    check_runs(b"word " * 200_000)
    check_runs(b"a" * 500_000)
    with pytest.raises(InvalidPrompt, match="600000 bytes without a space"):
        check_runs(b"a" * 600_000)
    with pytest.raises(InvalidPrompt, match="anything but spaces"):
        check_runs(b"a" + b" " * 600_000)


def test_outcomes_come_back() -> None:
    """Results and errors pass through, and the process's stack size is as before."""
    before = threading.stack_size()
    assert on_large_stack(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        on_large_stack(lambda: 1 // 0)
    assert threading.stack_size() == before


def test_unloading_waits_for_those_who_tokenise(tmp_path: Path) -> None:
    """Threads that tokenise while the model is freed get tokens or EngineClosed, nothing else."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, "llama")
    for _ in range(5):
        model = load_model(
            BackendRequest(model_path=path, options=LlamaOptions(), context=ContextOptions())
        )
        started = threading.Barrier(5)
        wrong: list[BaseException] = []

        def tokenise(
            model: LlamaModel = model,
            started: threading.Barrier = started,
            wrong: list[BaseException] = wrong,
        ) -> None:
            started.wait()
            try:
                while True:
                    model.vocabulary.tokenize("some words " * 50, add_bos=True, parse_special=True)
            except EngineClosed:
                return
            except BaseException as error:  # noqa: BLE001 - told by the test
                wrong.append(error)

        threads = [threading.Thread(target=tokenise) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        model.close()
        for thread in threads:
            thread.join(30)
        assert wrong == []

"""The example configurations: each is right, and those for several processes are really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from erllama_core import Engine
from erllama_core.config import examine_config
from erllama_core.interfaces.tier import ScanFailure
from erllama_tier_disk.store import FileTier
from tiny_gguf import write_tiny_gguf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("config/*.toml"))
PROMPTS = [
    f"The lamp of tower number {n} is lit at dusk, and its keeper counts. " * 8 for n in (1, 2)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for llama.cpp, with random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_gguf(path, "llama")
    return path


def adapted(file: Path, folder: Path, model: Path) -> Path:
    """An example with the paths of a machine that has none of its."""
    key = folder / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    text = file.read_text("utf-8")
    for name in ("chat", "large", "small", "classifier", "assistant"):
        text = text.replace(f"/srv/models/{name}.gguf", str(model))
        text = text.replace(f"~/models/{name}.gguf", str(model))
    text = text.replace("/var/lib/erllama/kvc", str(folder / "kvc"))
    text = text.replace("~/.cache/erllama/kvc", str(folder / "kvc"))
    text = text.replace("/run/secrets/erllama-signing-key", str(key))
    copy = folder / file.name
    copy.write_text(text)
    return copy


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ERLLAMA_")}
    return {**own, **more}


def test_there_is_an_example_for_each_kind_of_place() -> None:
    """The files, and the page that lists them."""
    names = {file.name for file in FILES}
    assert names == {
        "laptop.toml",
        "single_model_server.toml",
        "several_models.toml",
        "read_only_replica.toml",
        "worker_processes.toml",
    }
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"(config/{name})" in listed for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_right(
    file: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the paths of this machine there is no mistake, and nothing to warn of."""
    copy = adapted(file, tmp_path, model)
    if file.stem == "read_only_replica":
        (tmp_path / "kvc").mkdir()
    found = examine_config(copy, environ={})
    assert [str(problem) for problem in found.problems] == []
    assert [str(warning) for warning in found.warnings] == []
    # As it is, what is missing here is told, and nothing else.
    for problem in examine_config(file, environ={}).problems:
        assert problem.path.endswith(("model_path", "root", "key_file")), problem


@pytest.mark.parametrize("name", ["laptop.toml", "single_model_server.toml", "several_models.toml"])
def test_an_example_runs(name: str, tmp_path: Path, model: Path) -> None:
    """An engine of the file answers, with every model, in less memory than the file is for."""
    copy = adapted(EXAMPLES / "config" / name, tmp_path, model)
    smaller = {
        f"ERLLAMA_MODELS__{model_id}__CONTEXT_OPTS__{key}": value
        for model_id in ("ASSISTANT", "CHAT", "LARGE", "SMALL", "CLASSIFIER")
        if f"[models.{model_id.lower()}]" in copy.read_text()
        for key, value in (("N_CTX", "1024"), ("N_BATCH", "256"), ("N_THREADS", "1"))
    }
    if "[models.chat]" in copy.read_text():
        smaller["ERLLAMA_MODELS__CHAT__CONTEXT_SIZE"] = "512"
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in smaller.items():
            patch.setenv(variable, value)
        with Engine.from_config(copy) as engine:
            for info in engine.models():
                assert engine.complete(info.id, PROMPTS[0], response_tokens=2).generated


# -------------------------------------------------------------- several processes

REPLICA = """
import json, sys
from erllama_core import Engine
hits = []
with Engine.from_config(sys.argv[1]) as engine:
    engine.cache.wait_scanned(30)
    for prompt in json.load(sys.stdin):
        done = engine.complete("chat", prompt, response_tokens=4)
        hits.append([done.cache_hit_kind, done.cache_delta.read, list(done.generated)])
    engine.flush()
print(json.dumps(hits))
"""


def complete(config: Path, prompts: list[str], **environ: str) -> list[tuple[str, int, list[int]]]:
    """What a process of its own makes of prompts, with an engine of a file."""
    done = subprocess.run(
        [sys.executable, "-c", REPLICA, str(config)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment(**environ),
    )
    return [tuple(hit) for hit in json.loads(done.stdout)]


def contents(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in [root, *root.rglob("*")]
    }


def test_a_read_only_replica(tmp_path: Path, model: Path) -> None:
    """It restores what the other process stored, and changes nothing in its folder."""
    one_thread = {
        "ERLLAMA_MODELS__CHAT__CONTEXT_OPTS__N_THREADS": "1",
        "ERLLAMA_MODELS__CHAT__CONTEXT_OPTS__N_CTX": "2048",
    }
    writer = adapted(EXAMPLES / "config/worker_processes.toml", tmp_path, model)
    cold = complete(writer, PROMPTS[:1], **one_thread)
    assert cold[0][0] == "cold"
    before = contents(tmp_path / "kvc")
    assert any(path.endswith(".kvc") for path in before) or len(before) > 4
    replica = adapted(EXAMPLES / "config/read_only_replica.toml", tmp_path, model)
    warm = complete(replica, PROMPTS, **one_thread)
    assert warm[0][0] == "exact"
    assert warm[0][2] == cold[0][2]
    assert warm[1][0] != "exact"
    assert contents(tmp_path / "kvc") == before


def serve(config: Path, prompts: list[str]) -> list[str]:
    """The kinds of hits of all prompts, served by two workers."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "workers.py"), str(config), "--workers", "2"],
        input="\n".join(prompts),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(
            ERLLAMA_MODELS__CHAT__CONTEXT_OPTS__N_THREADS="1",
            ERLLAMA_MODELS__CHAT__CONTEXT_OPTS__N_CTX="2048",
            ERLLAMA_MODELS__CHAT__CONTEXT_OPTS__RESIDENT_CELLS_MAX="0",
            ERLLAMA_TIERS__RAM__QUOTA_BYTES="1",  # so that all comes from the shared root
        ),
    )
    assert (done.stderr, done.returncode) == ("", 0)
    lines = sorted(done.stdout.splitlines(), key=lambda line: int(line.split(":")[0]))
    assert [int(line.split(":")[0]) for line in lines] == list(range(len(prompts)))
    return [line.split(": ")[1].split(",")[0] for line in lines]


def test_worker_processes(tmp_path: Path, model: Path) -> None:
    """The script answers every prompt; what one process has computed, no other one computes."""
    config = adapted(EXAMPLES / "config/worker_processes.toml", tmp_path, model)
    kinds = serve(config, [PROMPTS[number % 2] for number in range(8)])
    # Two that begin at once may both compute the same.
    assert kinds.count("cold") + kinds.count("partial") <= 4
    assert serve(config, PROMPTS * 2) == ["exact"] * 4
    tier = FileTier(tmp_path / "kvc", read_only=True)
    try:
        assert not [found for found in tier.scan() if isinstance(found, ScanFailure)]
    finally:
        tier.close()


def test_a_worker_that_cannot_start(tmp_path: Path, model: Path) -> None:
    """The script ends, with a code that says so, when its workers do."""
    config = adapted(EXAMPLES / "config/worker_processes.toml", tmp_path, model)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "workers.py"), str(config), "--workers", "1"],
        input="a prompt",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(ERLLAMA_MODELS__CHAT__BACKEND="none"),
    )
    assert done.returncode == 1
    assert "unknown backend 'none'" in done.stderr

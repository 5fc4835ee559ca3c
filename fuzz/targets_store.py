"""A cache's root: whatever lies in it, requests are answered."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs
from target import Run, Target
from targets_format import resealed

from erllama_core import Engine
from erllama_core.errors import BlockNotFound, CacheError, CorruptBlock
from erllama_core.interfaces.block import decode_header

MAGIC = b"ERLLAMA\0"
PROMPT = "The lamp was lit for the first time in the autumn, and all of them came to see it."
FORGED = b"F"
"""What a container begins with whose objects get the right checksums."""


def in_memory() -> Path:
    """A folder of this process's, in memory where there is such a place."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="erllama-fuzz-", dir=shm if shm.is_dir() else None))


def objects_of(data: bytes) -> tuple[bool, list[bytes]]:
    """What a container holds: whether its objects are forged, and they themselves."""
    return data[:1] == FORGED, [MAGIC + piece for piece in data.split(MAGIC)[1:]]


def write_root(root: Path, data: bytes) -> None:
    """The objects of a container, each under the name that its bytes give it."""
    forged, objects = objects_of(data)
    for number, content in enumerate(objects[:64]):
        sealed = resealed(content) if forged else content
        try:
            name = str(decode_header(resealed(content)).object_id)
        except CorruptBlock:
            name = f"{content[80:112].ljust(32, b'x').hex()}.{number}.kv"
        folder = root / "objects" / name[:2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.kvc").write_bytes(sealed)
        if number == 0 and forged:
            (root / "pins").mkdir(exist_ok=True)
            (root / "pins" / name[:64]).touch()


def read_root(root: Path) -> bytes:
    """The objects of a root, as a container."""
    return b"".join(path.read_bytes() for path in sorted(root.glob("objects/*/*.kvc")))


def serving(root: Path, kv_class: str) -> Engine:
    """An engine on a root, with a model named ``stub``."""
    config: Mapping[str, Any] = {
        "tiers": [{"name": "disk", "kind": "disk", "root": str(root)}],
        "models": {
            "stub": {
                "backend": "stub",
                "tier": ["disk"],
                "context_opts": {"n_ctx": 256, "resident_cells_max": 0},
                "policy": {
                    "boundary_align_tokens": 32,
                    "min_tokens": 8,
                    "cold_min_tokens": 8,
                    "cost_gate": "off",
                },
                "model_opts": {"kv_class": kv_class},
            }
        },
    }
    return Engine.from_config(config)


def _answer(engine: Engine, prompt: str) -> tuple[int, ...]:
    return engine.complete("stub", prompt, response_tokens=4).generated


@contextmanager
def _store() -> Iterator[Run]:
    folder = in_memory()
    prompts = (PROMPT, PROMPT[:50] + " and then they left.")
    cold = {}
    with serving(folder / "cold", "span") as engine:
        for prompt in prompts:
            cold[prompt] = _answer(engine, prompt)

    def run(data: bytes) -> None:
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        write_root(root, data)
        with capture_logs() as events, serving(root, "span") as engine:
            engine.cache.wait_scanned()
            for prompt in prompts:
                answer = _answer(engine, prompt)
                # A forged state may say anything; what is only damaged is found out.
                assert answer == cold[prompt] or data[:1] == FORGED
            engine.cache.flush()
            for row in engine.cache.dump():
                with suppress(CacheError):
                    engine.cache.load(row.tier, row.key)
                with suppress(BlockNotFound):
                    engine.cache.pin(row.key)
                engine.cache.unpin(row.key)
            engine.model("stub").get_replay("turn")
            engine.cache.gc()
        failures = [event for event in events if event["event"] == "scan.failed"]
        assert not failures, failures

    try:
        yield run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def made_stores() -> dict[str, bytes]:
    """What models of each class store of a short conversation, whole and forged."""
    made = {}
    folder = in_memory()
    for kv_class in ("span", "checkpoint", "whole"):
        root = folder / kv_class
        with serving(root, kv_class) as engine:
            done = engine.complete("stub", PROMPT, response_tokens=4)
            engine.model("stub").put_replay("turn", done)
            engine.complete("stub", PROMPT, response_tokens=4)
        made[kv_class] = read_root(root)
        made[f"{kv_class}-forged"] = FORGED + made[kv_class]
    shutil.rmtree(folder)
    return made


TARGETS = (
    Target(
        name="store",
        open=_store,
        made=made_stores,
        words=(MAGIC, FORGED),
        seconds=10.0,
        base_bytes=64 << 20,
        quick_runs=20,
    ),
)

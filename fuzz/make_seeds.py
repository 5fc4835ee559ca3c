"""Writes those seeds that are not written by hand: what this erllama stores and reads.

    python fuzz/make_seeds.py

Nothing that is there is changed: inputs that were kept for what they found stay as they are.
"""

from __future__ import annotations

import shutil

from target import CORPUS
from targets_model import shortened
from targets_redis import numbers
from targets_store import in_memory, made_stores, objects_of

from erllama_core.cache.marks import encode_mark
from erllama_core.interfaces.backend import Mark
from erllama_core.model.replay import encode
from erllama_core.prompt import pack
from erllama_core.results import Replay
from tiny_gguf import ARCHS, write_tiny_gguf, write_tiny_lora


def write(target: str, name: str, data: bytes) -> None:
    """Add a seed, unless it is there."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(data)


def main() -> None:
    """Write them all."""
    kinds = set()
    for name, data in made_stores().items():
        for one in objects_of(data)[1]:
            if one[10] not in kinds:
                kinds.add(one[10])
                write("object", f"{name}-{one[10]}", one)
    mark = Mark(pack([3, 0, 2]), b"\0\0\x80?" * 3, 1.5, 4)
    write("mark", "three", encode_mark(mark))
    turn = Replay(generated=(1, 2), data=b"a\xffb", reply="a\ufffdb", prompt_end=(7,))
    write("replay", "turn", encode(turn))
    key = "ab" * 32
    for name, text in {
        "kv": f"{key}.32.kv",
        "file": f"{key}.0.snapshot.kvc",
        "temporary": f".{'0f' * 16}.4026531836.4711.99.{'ab' * 8}.tmp",
        "unknown": f".unknown.0.1.0.{'ab' * 8}.tmp",
    }.items():
        write("object_name", name, text.encode())
    write("stub_state", "range", b"stub" + bytes([1, 0, 0, 0, 16, 0, 0, 0, 1, 0, 0, 0]) + bytes(16))
    write("stub_state", "state", b"stub" + bytes([2, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0]) + bytes(32))
    folder = in_memory()
    for arch in ARCHS:
        write("model_file", arch, shortened(write_tiny_gguf(folder / "model.gguf", arch)))
    write("adapter_file", "lora", shortened(write_tiny_lora(folder / "lora.gguf")))
    shutil.rmtree(folder)
    stored_as = f"{key}.32.kv".encode()
    stored = numbers(1) + bytes([len(stored_as)]) + stored_as + b"\x02100"
    write("redis", "one", stored + numbers(64) + b"\x04head" + numbers(0) + b"\x03123")
    put = b"\x03put" + bytes([len(stored_as)]) + stored_as
    write("redis", "log", b"\x00" * 8 + numbers(1, 5, 1, 1) + put)
    write("redis", "pins", numbers(1) + b"\x20" + b"\xab" * 32)


if __name__ == "__main__":
    main()

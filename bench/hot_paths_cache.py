"""Finding, restoring and saving state: what they take, and the bytes that they have to move."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from cache_index import ALIGN, NAMESPACE, Filler
from cache_restore import BLOCK_BYTES
from hot_paths_floors import Floors, median_s
from hot_paths_part import Part
from hot_paths_sizes import Sizes
from serving_load import Prompts

from erllama_backend_llama.context import LlamaContext
from erllama_core import Cache, Engine, Model, NamedTier, load_config
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import TOKEN_BYTES
from erllama_tier_disk.options import DiskOptions
from erllama_tier_disk.plugin import open_disk


def lookup(sizes: Sizes, floors: Floors) -> list[Part]:
    """Of a prompt that is stored to its end: its tokens hashed, its blocks found."""
    with Cache([NamedTier("ram", "ram", RamTier(1 << 60))]) as cache:
        filler = Filler(cache, sizes.lookup_tokens)
        filler.fill(sizes.index_objects)
        space = _space(cache, "ram")
        tokens = filler.prompts[0]

        def find() -> None:
            match = space.find(space.keys(bytearray(tokens), None), may_sample=True)
            assert match.covered == sizes.lookup_tokens

        seconds = median_s(find, 4 * sizes.runs)
    return [
        Part(
            name=f"look-up of {sizes.lookup_tokens:,} tokens among {sizes.index_objects:,} objects",
            seconds=seconds,
            floor_s=TOKEN_BYTES * sizes.lookup_tokens / floors.sha256,
            floor="SHA-256 over the tokens",
        )
    ]


def restore(sizes: Sizes, floors: Floors, path: Path) -> list[Part]:
    """The same prompt again, its state in one tier and nowhere else."""
    parts = []
    for tier in ("disk", "ram"):
        with _engine(path, sizes, tier) as (engine, model):
            prompt = Prompts(model.tokenize).ledger(1, sizes.context_tokens)
            model.complete(prompt, response_tokens=1)
            engine.flush()
            runs = [_restored(engine, model, prompt, tier) for _ in range(sizes.runs + 1)][1:]
        parts += _restore_parts(tier, runs, floors)
    return parts


@attrs.frozen(kw_only=True)
class _Restored:
    """One exact hit: bytes, and seconds."""

    n_bytes: int
    first_token_s: float
    lookup_s: float
    load_s: float
    import_s: float


def _restored(engine: Engine, model: Model, prompt: Any, tier: str) -> _Restored:
    before = engine.cache.counters()
    with _timed(LlamaContext, "import_ranges") as imports:
        stats = model.complete(prompt, response_tokens=1).stats
    after = engine.cache.counters()
    engine.flush()
    assert stats.cache_hit_kind == "exact", f"{stats.cache_hit_kind} hit in {tier}"
    assert stats.first_token_s is not None
    return _Restored(
        n_bytes=stats.restored_bytes,
        first_token_s=stats.first_token_s,
        lookup_s=(after.lookup_ns - before.lookup_ns) / 1e9,
        load_s=(after.load_ns - before.load_ns) / 1e9,
        import_s=sum(imports),
    )


def _restore_parts(tier: str, runs: list[_Restored], floors: Floors) -> list[Part]:
    def median(field: str) -> float:
        return float(statistics.median(getattr(run, field) for run in runs))

    n_bytes = runs[0].n_bytes
    read = n_bytes / floors.read + n_bytes / floors.checksum if tier == "disk" else 0.0
    copy = n_bytes / floors.copy
    whole, load, imported = median("first_token_s"), median("load_s"), median("import_s")
    found = median("lookup_s")
    parts = [
        Part(
            name=f"restore of {n_bytes / 1e6:.1f} MB from {tier}, call to first token",
            seconds=whole,
            floor_s=read + copy,
            floor="read, checksum, copy" if read else "copy",
        ),
        Part(name="    look-ups of it", seconds=found),
        Part(
            name="    fetched from the tier",
            seconds=load,
            floor_s=read or None,
            floor="read, checksum",
        ),
        Part(name="    imported into cells", seconds=imported, floor_s=copy, floor="copy"),
    ]
    return [*parts, Part(name="    everything else", seconds=whole - found - load - imported)]


def save(sizes: Sizes, floors: Floors, path: Path) -> list[Part]:
    """What the worker does between two steps, and what the writer does behind it."""
    copies, n_bytes = [], 0
    with _engine(path, sizes, "ram") as (engine, model):
        prompts = Prompts(model.tokenize)
        for number in range(sizes.runs + 1):
            before = engine.cache.counters().pack_ns
            model.complete(prompts.ledger(number, sizes.context_tokens), response_tokens=1)
            engine.flush()
            if number:  # the first one maps the pages
                copies.append((engine.cache.counters().pack_ns - before) / 1e9)
            n_bytes = sum(row.size_bytes for row in engine.cache.dump())
            engine.cache.evict_bytes(1 << 62)
    written = [_written(sizes, durable=durable) for durable in (False, True)]
    file_bytes = sizes.written_blocks * BLOCK_BYTES
    return [
        Part(
            name=f"save of {n_bytes / 1e6:.1f} MB: copied out of cells, by the worker",
            seconds=statistics.median(copies),
            floor_s=n_bytes / floors.copy,
            floor="copy",
        ),
        Part(
            name=f"    {file_bytes / 1e6:.0f} MB written to disk, by the writer",
            seconds=written[0],
            floor_s=file_bytes / floors.checksum + file_bytes / floors.write,
            floor="checksum, write",
        ),
        Part(
            name="    the same, durable",
            seconds=written[1],
            floor_s=file_bytes / floors.checksum + file_bytes / floors.durable,
            floor="checksum, write and fsync",
        ),
    ]


def _written(sizes: Sizes, *, durable: bool) -> float:
    """Seconds from the first block handed over to the last one that can be found on disk."""
    content = bytes(range(250)) * (BLOCK_BYTES // 250)
    with (
        tempfile.TemporaryDirectory(prefix="erllama-bench-") as root,
        Cache([NamedTier("disk", "disk", open_disk(DiskOptions(root=Path(root))))]) as cache,
    ):
        cache.wait_scanned()
        space = _space(cache, "disk")
        seconds = []
        for number in range(sizes.runs + 1):
            end, position = ALIGN * sizes.written_blocks, 0
            keys = space.keys(bytearray(number.to_bytes(TOKEN_BYTES, "little") * end), None)
            blocks = []
            while block := space.next_block(keys, position, end):
                pages = space.reserve(BLOCK_BYTES, beyond_bound=True)
                assert pages is not None
                pages.view[:] = content
                blocks.append((block, pages))
                position = block.end
            began = time.perf_counter()
            for block, pages in blocks:
                space.submit_block(keys, block, pages, "finish" if durable else "cold")
            cache.flush()
            seconds.append(time.perf_counter() - began)
            # As in a tier that is full: what is written next finds pages that were in use before.
            cache.evict_bytes(1 << 62)
    return statistics.median(seconds[1:])


def _space(cache: Cache, tier: str) -> ModelSpace:
    return ModelSpace(
        cache, namespace=NAMESPACE, kv_class=KVClass.SPAN, tiers=(tier,), align_tokens=ALIGN
    )


@contextmanager
def _engine(path: Path, sizes: Sizes, tier: str) -> Iterator[tuple[Engine, Model]]:
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
        config = {"tiers": [{"name": "disk", "kind": "disk", "root": root}]}
        with Engine(load_config(config, environ={})) as engine:
            model = engine.load_model(
                "bench",
                backend="llama",
                model_path=str(path),
                tier=[tier],
                # No residents: what is asked for is to come from the tier.
                context_opts={"n_ctx": sizes.context_tokens + 8, "resident_cells_max": 0},
            )
            engine.cache.wait_scanned()
            yield engine, model


@contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a method."""
    method = getattr(owner, name)
    seconds: list[float] = []

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = method(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)

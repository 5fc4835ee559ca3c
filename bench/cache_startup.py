"""Opening a cache on a disk tier that holds many objects already."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

from cache_sizes import Sizes
from figure import Figure, median_of

from erllama_core import Cache, Engine, Model, NamedTier, load_config
from erllama_core.cache.keys import ContextKeys
from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header
from erllama_core.interfaces.tier import Tier
from erllama_tier_disk.options import DiskOptions
from erllama_tier_disk.plugin import open_disk

ALIGN = 256
NAMESPACE = bytes(range(32))
PAYLOAD = bytes(4096)
PROMPT_TOKENS = 2000


def measure(sizes: Sizes) -> list[Figure]:
    """The scan, and a request that comes while it is under way."""
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        root = Path(folder)
        tier = open_disk(DiskOptions(root=root))
        fill(tier, sizes.scanned_objects)
        tier.close()
        scan = median_of(sizes.runs, lambda: _scan(root, sizes.scanned_objects))
        rng = random.Random(3)
        prompt = [rng.randrange(256) for _ in range(PROMPT_TOKENS)]
        with _engine(root) as engine:
            _model(engine).complete(prompt, response_tokens=1)
            engine.flush()
        firsts = [_first_request(root, prompt) for _ in range(sizes.runs)]
    count = f"{sizes.scanned_objects:,} objects on disk"
    return [
        Figure(name=f"{count}: scanned (warm page cache)", measured=scan, unit="s", target=2.0),
        Figure(
            name="    a first request that is stored: its first token, from opening on",
            measured=statistics.median(firsts),
            unit="s",
            target=2.0,
        ),
    ]


def fill(tier: Tier, n_objects: int) -> None:
    """Store blocks of 256 tokens, in contexts of 32."""
    rng = random.Random(4)
    stored = 0
    while stored < n_objects:
        keys = ContextKeys(NAMESPACE, rng.randbytes(4 * 32 * ALIGN), ALIGN)
        for start in range(0, min(32, n_objects - stored) * ALIGN, ALIGN):
            end = start + ALIGN
            head = encode_header(
                kind=ObjectKind.KV,
                start=start,
                end=end,
                namespace=NAMESPACE,
                key=keys.key(end),
                segment_key=keys.key(start),
                lead_tokens=b"",
                tokens=keys.slice(start, end),
                align_tokens=ALIGN,
                payload=PAYLOAD,
                info={"save_reason": "cold", "created_ns": time.time_ns()},
            )
            tier.put(ObjectId(ObjectKind.KV, start, keys.key(end)), (head, PAYLOAD))
            stored += 1


def _scan(root: Path, n_objects: int) -> float:
    began = time.perf_counter()
    with Cache([NamedTier("disk", "disk", open_disk(DiskOptions(root=root)))]) as cache:
        assert cache.wait_scanned(60)
        seconds = time.perf_counter() - began
        assert len(cache.catalog.index) == n_objects
    return seconds


def _engine(root: Path) -> Engine:
    tier = {"name": "disk", "kind": "disk", "root": str(root)}
    return Engine(load_config({"tiers": [tier]}, environ={}))


def _model(engine: Engine) -> Model:
    return engine.load_model("startup", backend="stub", tier=["disk"], context_opts={"n_ctx": 4096})


def _first_request(root: Path, prompt: list[int]) -> float:
    began = time.perf_counter()
    with _engine(root) as engine:
        completion = _model(engine).complete(prompt, response_tokens=1)
        seconds = time.perf_counter() - began
        assert completion.cache_hit_kind == "exact"
    return seconds

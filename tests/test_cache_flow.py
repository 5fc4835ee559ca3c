"""How objects flow between tiers: none harms another, and nothing is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cache_contexts import space_of, store
from erllama_backend_stub.faults import gate
from erllama_core import BlockMeta, Cache, Engine, NamedTier
from erllama_core.cache.durability import Unsynced
from erllama_core.cache.loader import Fetch
from erllama_core.cache.ram import RamTier
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.interfaces.tier import TierUsage
from erllama_tier_disk.store import FileTier
from held_tier import HeldTier, engine_with
from stub_engine import KV_CLASSES, load_stub, make_engine
from waiting import wait_until

PROMPT = "The lamp is lit on every evening, whatever the weather of the day has been. "


@pytest.fixture(params=KV_CLASSES)
def kv_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def users(engine: Engine) -> list[int]:
    with engine.cache.catalog.lock:
        return [c.users for e in engine.cache.catalog.index for c in e.copies if c.users]


def is_all_in(engine: Engine, tier: str) -> bool:
    """Whether everything that is known is stored in a tier."""
    catalog = engine.cache.catalog
    store = catalog.store(tier)
    with catalog.lock:
        return all(entry.copy_in(store) for entry in catalog.index)


def tiers_of(engine: Engine) -> dict[str, set[tuple[str, int, int]]]:
    """What each tier has."""
    found: dict[str, set[tuple[str, int, int]]] = {}
    for row in engine.cache.dump():
        found.setdefault(row.tier, set()).add((row.kind, row.start, row.end))
    return found


# ------------------------------------------------------------- tiers that hang


def test_a_tier_whose_writes_hang_keeps_no_other_waiting(kv_class: str) -> None:
    """RAM gets all that is saved; the other tier loses what exceeds its bound, and no more."""
    held = HeldTier()
    held.writes.clear()
    settings = {"max_inflight_bytes": 30_000, "write_timeout_ms": 200}
    with engine_with({"held": held}, cache=settings) as engine:
        model = load_stub(engine, tier=["held", "ram"], kv_class=kv_class)
        firsts = []
        for number in range(20):
            firsts.append(model.complete(f"{number}{PROMPT}", response_tokens=4))
            assert model.settle(20)
            wait_until(lambda: is_all_in(engine, "ram"))
        with capture_logs() as logs:
            assert not engine.flush()
        assert [entry["event"] for entry in logs] == ["tier.hangs"]
        counters = engine.cache.counters()
        assert counters.tier_drops["held"] > 0
        assert (counters.saves_dropped, "ram" in counters.tier_drops) == (0, False)
        for number, first in enumerate(firsts):
            again = model.complete(f"{number}{PROMPT}", response_tokens=4)
            assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
        held.writes.set()
        wait_until(engine.flush)  # until its thread moves, it counts as hanging
        assert held.ids()
        assert tiers_of(engine).keys() == {"held", "ram"}
        rows = [row for row in engine.cache.dump() if row.status == "writing"]
        assert rows == []


def test_closing_leaves_a_tier_behind_that_hangs() -> None:
    """close() returns after write_timeout_ms; what went to other tiers is there."""
    hanging, sound = HeldTier(), HeldTier()
    hanging.writes.clear()
    tiers = {"hanging": hanging, "sound": sound}
    engine = engine_with(tiers, cache={"write_timeout_ms": 100})
    load_stub(engine, tier=["hanging", "sound"]).complete(PROMPT, response_tokens=4)
    with capture_logs() as logs:
        engine.close()
    [abandoned] = [entry for entry in logs if entry["event"] == "tier.abandoned"]
    assert abandoned["tier"] == "hanging"
    assert abandoned["unwritten"] > 1
    assert {o.kind for o in sound.ids()} == {ObjectKind.KV, ObjectKind.LOGITS}
    hanging.writes.set()  # its thread ends


def test_state_is_findable_while_any_buffer_holds_it(kv_class: str) -> None:
    """What RAM has evicted and a slow tier has not written yet is restored from its buffer."""
    held = HeldTier()
    held.writes.clear()
    with engine_with({"held": held}) as engine:
        model = load_stub(engine, tier=["ram", "held"], kv_class=kv_class)
        first = model.complete(PROMPT, response_tokens=4)
        assert model.settle(20)
        wait_until(lambda: is_all_in(engine, "ram"))
        engine.cache.evict_bytes(1 << 40, ["ram"])
        again = model.complete(PROMPT, response_tokens=4)
        assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
        held.writes.set()
        assert engine.flush(20)
        assert tiers_of(engine)["held"]


def test_a_read_that_hangs_is_given_up(kv_class: str) -> None:
    """The prompt is computed, the tier rests, and its late answer leaves nothing behind."""
    held = HeldTier()
    with engine_with({"held": held}) as engine:
        first = load_stub(engine, tier=["held"], kv_class=kv_class).complete(
            PROMPT, response_tokens=4
        )
    held.reads.clear()
    with (
        capture_logs() as logs,
        engine_with({"held": held}, cache={"read_timeout_ms": 800}) as (engine),
    ):
        model = load_stub(engine, tier=["held"], kv_class=kv_class)
        assert engine.cache.wait_scanned(10)
        again = model.complete(PROMPT, response_tokens=4)
        assert (again.cache_hit_kind, again.generated) == ("cold", first.generated)
        assert engine.cache.counters().reads_given_up == 1
        # It is left alone: the next request does not wait for it.
        store = engine.cache.catalog.store("held")
        assert store.rests_until_s > time.monotonic()
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "cold"
        assert engine.cache.counters().reads_given_up == 1
        assert users(engine)
        held.reads.set()
        wait_until(lambda: not users(engine) and not store.rests_until_s)
        with engine.cache.catalog.lock:
            for entry in engine.cache.catalog.index:
                for copy in entry.copies:
                    copy.rests_until_s = 0.0
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"
    assert [e["event"] for e in logs if e["event"].startswith("tier.failed")] == ["tier.failed"]


def test_a_tier_that_hangs_keeps_no_reader_of_another() -> None:
    """While every read of one tier hangs, models restore from the others at once."""
    hanging, sound = HeldTier(), HeldTier()
    tiers = {"hanging": hanging, "sound": sound}
    with engine_with(tiers) as engine:
        for name in tiers:
            load_stub(engine, name, tier=[name]).complete(PROMPT + name, response_tokens=4)
    hanging.reads.clear()
    with engine_with(tiers, cache={"read_timeout_ms": 600_000}) as engine:
        assert engine.cache.wait_scanned(10)
        stuck = load_stub(engine, "hanging", tier=["hanging"])
        streams = [stuck.infer(PROMPT + "hanging", response_tokens=4) for _ in range(2)]
        assert hanging.asked.acquire(timeout=10)
        assert hanging.asked.acquire(timeout=10), "both of its readers"
        other = load_stub(engine, "sound", tier=["sound"])
        done = other.complete(PROMPT + "sound", response_tokens=4)
        assert done.cache_hit_kind == "exact"
        hanging.reads.set()
        assert [stream.result().cache_hit_kind for stream in streams] == ["exact", "exact"]
        assert users(engine) == []


def test_closing_while_a_scan_hangs_is_bounded() -> None:
    """A scan that never ends keeps neither other tiers unknown nor the engine open."""
    held, sound = HeldTier(), HeldTier()
    with engine_with({"held": held, "sound": sound}) as engine:
        load_stub(engine, tier=["sound"]).complete(PROMPT, response_tokens=4)
    release = threading.Event()
    plain = held.scan

    def scan() -> object:
        release.wait()
        return plain()

    held.scan = scan  # type: ignore[method-assign, assignment]
    engine = engine_with({"held": held, "sound": sound}, cache={"write_timeout_ms": 100})
    model = load_stub(engine, tier=["sound"])
    assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"
    with capture_logs() as logs:
        engine.close()
    assert "scan.abandoned" in [entry["event"] for entry in logs]
    release.set()


# ------------------------------------------------------------------ write-back


def small_ram(quota_bytes: int) -> list[dict[str, object]]:
    return [{"name": "ram", "kind": "ram", "quota_bytes": quota_bytes}]


BACK = {"write": "back", "marks_share": 1.0}  # the tiers here are tiny


def test_through_writes_to_every_tier(kv_class: str) -> None:
    """The default: what one tier of a model has, all of them have."""
    held = HeldTier()
    with engine_with({"held": held}) as engine:
        model = load_stub(engine, tier=["ram", "held"], kv_class=kv_class)
        model.complete(PROMPT, response_tokens=4)
        assert engine.flush(20)
        found = tiers_of(engine)
        assert found["ram"] == found["held"]


def test_back_writes_unfinished_state_to_the_first_tier_alone(kv_class: str) -> None:
    """Until a request has finished, only the nearest tier has what it computed; then also
    the first one that lasts, all of it.
    """
    held, far = HeldTier(), HeldTier()
    step = gate(f"back {kv_class}")
    faults = {"hang_step": 9, "hang_gate": f"back {kv_class}"}
    with engine_with({"held": held, "far": far}, cache=BACK) as engine:
        model = load_stub(engine, tier=["ram", "held", "far"], kv_class=kv_class, faults=faults)
        stream = model.infer("#" + PROMPT * 4, response_tokens=20)
        assert step.wait_reached(20)
        assert engine.cache.flush(20)
        assert set(tiers_of(engine)) == {"ram"}
        assert held.ids() == set()
        step.open()
        done = stream.result()
        assert engine.flush(20)
        found = tiers_of(engine)
        ends = {row.end for row in engine.cache.dump() if row.tier == "held"}
        assert max(ends) == len(done.context_tokens)
        assert far.ids() == set()
        assert held.durable == held.ids()
        assert set(tiers_of(engine)) == {"ram", "held"}
        if kv_class != "whole":
            covered = {n for _, start, end in found["held"] for n in range(start, end)}
            assert covered == set(range(len(done.context_tokens)))


def test_what_back_mode_evicts_goes_to_the_next_tier(kv_class: str) -> None:
    """A context that no longer fits the nearest tier is restored from the one below."""
    near, far = HeldTier(40_000), HeldTier()
    with engine_with({"near": near, "far": far}, cache=BACK) as engine:
        model = load_stub(engine, tier=["near", "far"], kv_class=kv_class)
        prompts = [f"{n:03d} {PROMPT}" for n in range(12)]
        firsts = [model.complete(prompt, response_tokens=4) for prompt in prompts]
        assert engine.flush(20)
        counters = engine.cache.counters()
        assert counters.demotions == len(far.ids()) > 0
        assert near.usage().used_bytes <= 40_000
        assert not near.ids() & far.ids()
        for prompt, first in zip(prompts, firsts, strict=True):
            again = model.complete(prompt, response_tokens=4)
            assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)
            engine.flush(20)
        assert users(engine) == []


def test_a_chain_in_several_tiers_is_one_chain() -> None:
    """Blocks in RAM, in two further tiers, and on their way are restored together."""
    near, far = HeldTier(), HeldTier()
    with engine_with({"near": near, "far": far}, cache=BACK) as engine:
        model = load_stub(engine, tier=["ram", "near", "far"])
        first = model.complete(PROMPT * 4, response_tokens=4)
        assert engine.flush(20)
        engine.cache.evict_bytes(6_000, ["near"])
        assert engine.flush(20)
        for copies in (engine.cache.catalog.store("ram"),):
            engine.cache.evictor.evict(copies, 12_000)
        found = tiers_of(engine)
        assert all(found[name] for name in ("ram", "near", "far"))
        again = model.complete(PROMPT * 4, response_tokens=4)
        assert (again.cache_hit_kind, again.generated) == ("exact", first.generated)


def test_closing_hands_down_what_only_memory_holds() -> None:
    """After write-back a restart finds what no request had finished, too; salted as well."""
    held = HeldTier()
    step = gate("hand down")
    faults = {"hang_step": 2, "hang_gate": "hand down"}
    policy = {"prefill_chunk_size": 64}
    with engine_with({"held": held}, cache=BACK) as engine:
        model = load_stub(engine, tier=["ram", "held"], policy=policy, faults=faults)
        stream = model.infer(PROMPT * 3, response_tokens=1, cache_salt="a")
        assert step.wait_reached(20)
        stream.cancel()
        step.open()
        assert stream.result().finish_reason == "cancelled"
        assert engine.flush(20)
        assert set(tiers_of(engine)) == {"ram"}
    assert held.ids()
    with engine_with({"held": held}) as engine:
        model = load_stub(engine, tier=["ram", "held"])
        again = model.complete(PROMPT * 3, response_tokens=1, cache_salt="a")
        assert again.cache_delta.read >= 64


def test_gc_hands_nothing_down() -> None:
    """gc() empties all tiers, in write-back too."""
    held = HeldTier()
    with engine_with({"held": held}, cache=BACK) as engine:
        load_stub(engine, tier=["ram", "held"]).complete(PROMPT, response_tokens=4)
        assert engine.flush(20)
        engine.cache.gc()
        assert engine.flush(20)
        assert engine.cache.dump() == []
        assert held.ids() == set()


def test_another_models_objects_are_not_handed_down() -> None:
    """A model without the lower tier never has its state there."""
    held = HeldTier()
    with engine_with({"held": held}, cache=BACK) as engine:
        load_stub(engine, "both", tier=["ram", "held"], weights="other")
        load_stub(engine, "alone", tier=["ram"]).complete(PROMPT, response_tokens=4)
        assert engine.flush(20)
        engine.cache.evict_bytes(1 << 40, ["ram"])
    assert held.ids() == set()


def test_what_a_full_tier_does_not_take_goes_to_the_next() -> None:
    """In write-back an object that is too large for the first tier is stored in the second."""
    held = HeldTier()
    with engine_with({"held": held}, cache=BACK, tiers=small_ram(100)) as engine:
        model = load_stub(engine, tier=["ram", "held"])
        model.complete(PROMPT, response_tokens=4)
        assert engine.flush(20)
        assert engine.cache.counters().saves_dropped == 0
        assert model.complete(PROMPT, response_tokens=4).cache_hit_kind == "exact"


def test_a_demotion_without_room_is_dropped_and_counted() -> None:
    """What the tier below has no room for on its way is gone, and nobody waits for it."""
    near, far = HeldTier(), HeldTier()
    settings = {**BACK, "max_inflight_bytes": 20_000}
    with engine_with({"near": near, "far": far}, cache=settings) as engine:
        model = load_stub(engine, tier=["near", "far"])
        for number in range(8):
            model.complete(f"{number}{PROMPT}", response_tokens=4)
            assert engine.flush(20)
        assert far.ids() == set()
        far.writes.clear()
        rows = engine.cache.evict_bytes(1 << 40, ["near"]).rows
        counters = engine.cache.counters()
        assert 0 < counters.demotions < rows
        assert counters.tier_drops["far"] == rows - counters.demotions
        far.writes.set()
        assert engine.flush(20)
        assert len(far.ids()) == counters.demotions


# ------------------------------------------------------------------- promotion


@pytest.mark.parametrize("promote", [True, False])
def test_promotion_can_be_switched(promote: bool, kv_class: str) -> None:
    """What was read from a further tier is kept in RAM, or left where it is."""
    held = HeldTier()
    with engine_with({"held": held}) as engine:
        load_stub(engine, tier=["held"], kv_class=kv_class).complete(PROMPT, response_tokens=4)
    with engine_with({"held": held}) as engine:
        model = load_stub(
            engine, tier=["ram", "held"], kv_class=kv_class, policy={"promote": promote}
        )
        assert engine.cache.wait_scanned(10)
        stream = model.infer(PROMPT, response_tokens=1)
        assert stream.result().cache_hit_kind == "exact"
        if promote:
            wait_until(lambda: engine.cache.counters().promotions)
        assert engine.flush(20)
        assert (engine.cache.counters().promotions > 0) is promote


def test_promotion_outlives_the_fetch(tmp_path: Path) -> None:
    """All that was read is kept, though the fetch is released as soon as it is complete."""
    tiers = [
        NamedTier("near", "ram", RamTier(1 << 20)),
        NamedTier("far", "disk", FileTier(tmp_path)),
    ]
    with Cache(tiers) as cache:
        keys = store(space_of(cache, ("far",)), list(range(40)))
        assert cache.flush(20)
        space = space_of(cache, ("near", "far"))
        match = space.find(keys, may_sample=True)
        stored = len(cache.dump())
        assert space.fetch(match, Fetch.release) is None
        cache._loader.close()  # waits for what the readers do
        assert cache.counters().promotions == stored > 2


def test_promotion_evicts_nothing_that_is_worth_more() -> None:
    """A RAM tier full of what is hit all the time does not give way to a single hit."""
    held = HeldTier()
    with engine_with({"held": held}) as engine:
        load_stub(engine, tier=["held"]).complete("#" + PROMPT, response_tokens=2)
    quota = 20_000
    with engine_with({"held": held}, tiers=small_ram(quota)) as engine:
        often = load_stub(engine, "often", tier=["ram"])
        once = load_stub(engine, "once", tier=["ram", "held"], policy={"min_tokens": 1000})
        assert engine.cache.wait_scanned(10)
        for number in range(20):
            often.complete(f"{number}{PROMPT}", response_tokens=2)
            assert engine.flush(20)
        catalog = engine.cache.catalog
        ram = catalog.store("ram")
        with catalog.lock:
            full = [entry for entry in catalog.index if entry.copy_in(ram)]
        for _ in range(5):
            catalog.touch(full)
        assert once.complete("#" + PROMPT, response_tokens=1).cache_hit_kind == "exact"
        assert engine.flush(20)
        # Promotion comes after the reply, on a reader's thread; closing waits for those.
        engine.cache._loader.close()
        assert {entry for entry in full if entry.copy_in(ram)} == set(full)


# ------------------------------------------------------------------ durability


@pytest.mark.parametrize("write", ["through", "back"])
def test_all_of_a_finished_context_is_durable(kv_class: str, write: str) -> None:
    """A power cut after flush() loses nothing of a context whose request has finished."""
    held = HeldTier()
    with engine_with({"held": held}, cache={"write": write, "writer_threads": 3}) as engine:
        model = load_stub(engine, tier=["ram", "held"], kv_class=kv_class)
        model.complete(PROMPT * 5, response_tokens=40)
        model.complete(PROMPT * 5 + "and more", response_tokens=40)
        assert engine.flush(20)
        assert len(held.ids()) > 3
        finished = {o for o in held.ids() if o.kind is ObjectKind.KV}
        assert finished <= held.durable


def test_what_a_shutdown_saves_is_durable(kv_class: str) -> None:
    """The context of a request that the end of the engine cuts off, from its first block on."""
    held = HeldTier()
    engine = engine_with({"held": held})
    model = load_stub(engine, tier=["held"], kv_class=kv_class)
    stream = model.infer(PROMPT * 5, response_tokens=400)
    next(iter(stream))
    engine.close()
    assert {o for o in held.ids() if o.kind is ObjectKind.KV} <= held.durable
    assert held.ids()


def test_back_mode_keeps_a_finished_context_that_is_larger_than_its_bound(kv_class: str) -> None:
    """However long it is, a tier that lasts has all of a finished context."""
    held = HeldTier()
    with engine_with({"held": held}, cache={**BACK, "max_inflight_bytes": 20_000}) as engine:
        model = load_stub(engine, tier=["ram", "held"], kv_class=kv_class)
        held.writes.clear()
        model.complete(PROMPT * 8, response_tokens=4)
        assert model.settle(20)
        held.writes.set()
        assert engine.flush(20)
        found = tiers_of(engine)
        # What memory had no room for on its way went to the other tier at once, marks too.
        known = found["ram"] | found["held"]
        length = len(PROMPT * 8) + 4
        finished = {o for o in known if o[0] == "kv" or o[2] == length}
        assert finished
        assert finished <= found["held"]


def test_blocks_that_a_tier_missed_are_written_when_the_context_is_finished() -> None:
    """What found no room on its way to the lasting tier is copied to it from RAM."""
    held = HeldTier()
    held.writes.clear()
    with engine_with({"held": held}, cache={"max_inflight_bytes": 4000}) as engine:
        model = load_stub(engine, tier=["ram", "held"])
        model.complete(PROMPT * 4, response_tokens=4)
        assert engine.cache.counters().tier_drops["held"] > 0
        held.writes.set()
        assert engine.flush(20)
        kv = {name: {o for o in found if o[0] == "kv"} for name, found in tiers_of(engine).items()}
        assert kv["ram"] == kv["held"]


def test_what_is_asked_for_while_it_is_written_is_synced_then() -> None:
    """sync() of objects on their way, written and unknown: each that comes is synced once."""
    held = HeldTier()
    synced: list[list[ObjectId]] = []

    def keep(object_ids: Sequence[ObjectId]) -> None:
        synced.append(list(object_ids))

    def broken(object_ids: Sequence[ObjectId]) -> None:
        raise OSError(5, "I/O error")

    held.make_durable = keep  # type: ignore[method-assign]
    coming, written, unknown, lost = (ObjectId(ObjectKind.KV, n, bytes(32)) for n in range(4))
    with Cache([NamedTier("held", "held", held)]) as cache:
        unsynced = Unsynced(cache.catalog.store("held"), held)
        for object_id in (coming, written, lost):
            unsynced.expect(object_id)
        unsynced.settle(written, stored=True)
        assert synced == []
        unsynced.sync([coming, written, unknown, lost])
        assert synced == [[written]]
        unsynced.settle(coming, stored=True)
        unsynced.settle(lost, stored=False)
        assert synced == [[written], [coming]]
        unsynced.sync([coming, written, lost])
        assert synced == [[written], [coming]]

        unsynced.expect(coming)
        unsynced.settle(coming, stored=True)
        held.make_durable = broken  # type: ignore[method-assign]
        with capture_logs():
            unsynced.sync([coming])
        held.make_durable = keep  # type: ignore[method-assign]
        unsynced.sync([coming])
        assert synced[-1] == [coming], "what failed is tried again"


def test_files_are_made_durable(tmp_path: Path) -> None:
    """The disk tier has the ability; a tmpfs says that it does not outlive a power cut."""
    tiers = [{"name": "tmpfs", "kind": "ram_file", "root": str(tmp_path / "shm")}]
    with make_engine(tmp_path / "disk", tiers=tiers, cache=BACK) as engine:
        stores = engine.cache.catalog.stores
        assert stores["disk"].durable is not None
        assert (stores["tmpfs"].is_volatile, stores["tmpfs"].durable) == (True, None)
        model = load_stub(engine, tier=["tmpfs", "disk"])
        model.complete(PROMPT, response_tokens=4)
        assert engine.flush(20)
        found = tiers_of(engine)
        finished = {o for o in found["tmpfs"] if o[0] == "kv" or o[2] == len(PROMPT) + 4}
        assert found["disk"] == finished


# ------------------------------------------------------------- explicit saves


class InterruptedTier(RamTier):
    """Has somebody else at work while a save makes room for its object."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.meanwhile: Callable[[], None] | None = None

    def usage(self) -> TierUsage:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().usage()


def test_of_two_saves_of_one_key_the_later_one_stands() -> None:
    """What was reported as stored last is what is there, with its size."""
    tier = InterruptedTier()
    stored: list[int] = []
    meta = BlockMeta(
        save_reason="cold",
        fingerprint=bytes(32),
        fingerprint_mode="safe",
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=bytes(32),
        tokens=(1, 2),
        context_size=64,
    )
    with Cache(
        [NamedTier("ram", "ram", tier)], on_event=lambda event: stored.append(event.size_bytes)
    ) as cache:
        other = threading.Thread(target=lambda: cache.save("ram", meta, b"the other payload"))

        def meanwhile() -> None:
            other.start()
            other.join(0.2)  # it should wait until this save is over

        tier.meanwhile = meanwhile
        key, _, _ = cache.save("ram", meta, b"one payload")
        other.join(10)
        assert cache.load("ram", key)[1] == b"the other payload"
        (row,) = cache.dump()
        assert row.size_bytes == stored[-1] == tier.usage().used_bytes

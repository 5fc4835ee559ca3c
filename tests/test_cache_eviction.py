"""Eviction against a brute-force model: what goes next, and what never goes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache_contexts import CLASSES, space_of, store
from erllama_core import Cache, NamedTier
from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import ORPHAN_GRACE_S, score_ns
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.ram import RamTier
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import ObjectKind
from erllama_core.prompt import pack

ALIGN = 5
GRACE_NS = int(ORPHAN_GRACE_S * 1e9)
TIERS = (("a",), ("b",), ("a", "b"))

contexts = st.lists(st.integers(0, 1), min_size=1, max_size=13)
numbers = st.integers(0, 1 << 16)


class Eviction(RuleBasedStateMachine):
    """Contexts of every class come and go in two tiers, and are used, pinned and evicted."""

    def __init__(self) -> None:
        super().__init__()
        tiers = [NamedTier(name, "ram", RamTier(1 << 24)) for name in ("a", "b")]
        self.cache = Cache(tiers, marks_share=1.0)
        self.catalog: Catalog = self.cache.catalog
        self.now = 10**18
        self.catalog.clock = self.tick
        self.contexts: dict[bytes, list[int]] = {}
        """Tokens by key, of every prefix of what was stored."""
        self.lost: list[tuple[TierStore, Entry]] = []
        self.used: list[tuple[Entry, Copy]] = []
        self.pinned: dict[tuple[TierStore, bytes], list[int]] = {}
        self.since: dict[Entry, int] = {}

    def tick(self) -> int:
        self.now += 1
        return self.now

    def teardown(self) -> None:
        """Nothing is stuck: all goes once it is neither used nor pinned."""
        for entry, copy in self.used:
            self.catalog.let_go(entry, copy)
        for _, key in self.pinned:
            self.cache.unpin(key)
        self.cache.gc()
        assert self.cache.dump() == []
        assert all(usage.used_bytes == 0 for usage in self.cache.usage())
        self.cache.close()

    # -------------------------------------------------------------------- events

    @rule(tokens=contexts, kv_class=st.sampled_from(CLASSES), tiers=st.sampled_from(TIERS))
    def save(self, tokens: list[int], kv_class: KVClass, tiers: tuple[str, ...]) -> None:
        keys = store(space_of(self.cache, tiers, kv_class=kv_class, align=ALIGN), tokens)
        assert self.cache.flush(10)
        for n in range(len(tokens) + 1):
            self.contexts[keys.key(n)] = tokens[:n]

    @rule(tokens=contexts, kv_class=st.sampled_from(CLASSES))
    def touch(self, tokens: list[int], kv_class: KVClass) -> None:
        space = space_of(self.cache, ("a", "b"), kv_class=kv_class, align=ALIGN)
        keys = space.keys(bytearray(pack(tokens)), None)
        space.count(space.find(keys, may_sample=True), len(tokens), None)

    @rule(seconds=st.sampled_from((7, 70, 700)))
    def wait(self, seconds: int) -> None:
        self.now += seconds * 10**9

    @precondition(lambda self: len(self.catalog.index) > 0)
    @rule(number=numbers)
    def lose(self, number: int) -> None:
        """A copy turns out to be damaged, or another process removed it."""
        entry, copy = self.some_copy(number)
        self.catalog.forget_copy(copy.tier, entry)
        copy.tier.tier.delete(entry.object_id)
        self.lost.append((copy.tier, entry))

    @precondition(lambda self: self.lost)
    @rule(number=numbers)
    def find_again(self, number: int) -> None:
        """A scan finds an object."""
        tier, gone = self.lost.pop(number % len(self.lost))
        entry = Entry(
            gone.object_id, gone.end, gone.namespace, gone.segment_key, gone.lead, gone.tokens
        )
        tier.tier.put(entry.object_id, (b"x",))
        self.catalog.add_copy(tier, entry, 1, self.now, "cold")

    @precondition(lambda self: len(self.catalog.index) > 0)
    @rule(number=numbers)
    def use(self, number: int) -> None:
        entry, copy = self.some_copy(number)
        copy.users += 1
        self.used.append((entry, copy))

    @precondition(lambda self: self.used)
    @rule(number=numbers)
    def let_go(self, number: int) -> None:
        self.catalog.let_go(*self.used.pop(number % len(self.used)))

    @precondition(lambda self: self.contexts)
    @rule(number=numbers, tier=st.sampled_from("ab"))
    def pin(self, number: int, tier: str) -> None:
        key = sorted(self.contexts)[number % len(self.contexts)]
        try:
            self.cache.pin(key, tier=tier)
        except BlockNotFound:
            return
        self.pinned[self.catalog.store(tier), key] = self.contexts[key]

    @precondition(lambda self: self.pinned)
    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        _, key = list(self.pinned)[number % len(self.pinned)]
        self.cache.unpin(key)
        self.pinned = {name: p for name, p in self.pinned.items() if name[1] != key}

    @precondition(lambda self: len(self.catalog.index) > 0)
    @rule(tier=st.sampled_from("ab"), pinned=st.booleans(), times=st.integers(1, 6))
    def evict(self, tier: str, pinned: bool, times: int) -> None:
        place = self.catalog.store(tier)
        for _ in range(times):
            before = {e: c for e in self.catalog.index if (c := e.copy_in(place)) is not None}
            covered = [self.covered(place, key) for key in self.kept_in(place)]
            allowed = self.allowed(place, before, pinned)
            evicted = self.cache.evictor.evict(place, 1, pinned=pinned)
            gone = [entry for entry in before if entry.copy_in(place) is not before[entry]]
            assert len(gone) == evicted.rows == (1 if allowed else 0)
            if not gone:
                return
            assert gone[0] in allowed
            if not pinned:
                assert [self.covered(place, key) for key in self.kept_in(place)] == covered
            since = self.since.get(gone[0])
            self.note_orphans(self.now if since is None else since)

    # ------------------------------------------------------------------- checking

    @invariant()
    def counts_are_right(self) -> None:
        """Each copy knows how many objects of its tier stand on it."""
        entries = list(self.catalog.index)
        for tier in self.catalog.stores.values():
            amounts = dict.fromkeys(ObjectKind, 0)
            for entry in entries:
                copy = entry.copy_in(tier)
                if copy is not None:
                    amounts[entry.object_id.kind] += copy.size_bytes
                    standing = [e for e in entries if e.copy_in(tier) and self.stands(e, entry)]
                    assert copy.needed == len(standing)
            known = self.catalog.queues[tier].amounts
            assert {kind: amount.size_bytes for kind, amount in known.items()} == amounts

    @invariant()
    def orphans_are_those_without_ancestors(self) -> None:
        """What hangs on nothing could hang on nothing."""
        for entry in self.catalog.index:
            assert self.catalog.index.is_orphan(entry) == self.is_orphan(entry)
        self.note_orphans()

    def some_copy(self, number: int) -> tuple[Entry, Copy]:
        copies = [(entry, copy) for entry in self.catalog.index for copy in entry.copies]
        return copies[number % len(copies)]

    def stands(self, entry: Entry, on: Entry) -> bool:
        """Whether ``entry`` is of no use without ``on``; checks that it hangs where it may."""
        if entry.parent is not None:
            assert self.may_hang(entry, entry.parent)
            return entry.parent is on
        return not entry.lead and self.is_just_before(on, entry)

    def may_hang(self, entry: Entry, on: Entry) -> bool:
        return (
            on.object_id.kind is ObjectKind.KV
            and on.segment_key == entry.segment_key
            and len(on.lead) < len(entry.lead) <= len(on.path)
            and on.path.startswith(entry.lead)
        )

    def is_just_before(self, before: Entry, entry: Entry) -> bool:
        return (
            before.object_id.kind is entry.object_id.kind is ObjectKind.KV
            and before.object_id.key == entry.segment_key
            and entry.start > 0
        )

    def is_orphan(self, entry: Entry) -> bool:
        entries = list(self.catalog.index)
        kind = entry.object_id.kind
        if kind is ObjectKind.SNAPSHOT:
            return False
        if kind is ObjectKind.LOGITS and any(
            e.object_id.kind is ObjectKind.SNAPSHOT and e.object_id.key == entry.object_id.key
            for e in entries
        ):
            return False
        if entry.lead:
            return not any(self.may_hang(entry, e) and not self.is_loose(e) for e in entries)
        return entry.start > 0 and not any(self.is_just_before(e, entry) for e in entries)

    def is_loose(self, entry: Entry) -> bool:
        """Whether a block of a segment does not reach down to the segment's start."""
        if not entry.lead:
            return False
        return not any(self.may_hang(entry, e) and not self.is_loose(e) for e in self.catalog.index)

    def note_orphans(self, new_since: int | None = None) -> None:
        since = self.now if new_since is None else new_since
        orphans = [entry for entry in self.catalog.index if self.is_orphan(entry)]
        self.since = {entry: self.since.get(entry, since) for entry in orphans}

    def allowed(self, tier: TierStore, there: dict[Entry, Copy], pinned: bool) -> set[Entry]:
        """What the next victim may be."""
        free = {entry: copy for entry, copy in there.items() if not copy.users}
        plain = {e: c for e, c in free.items() if not self.catalog.pins[tier].protects(e)}
        leaves = {
            e: c
            for e, c in plain.items()
            if not any(self.stands(other, e) for other in there if other is not e)
        }
        allowed = {e for e in plain if e in self.since and self.is_orphan(e)}
        if leaves:
            least = min(score_ns(copy) for copy in leaves.values())
            allowed |= {e for e, copy in leaves.items() if score_ns(copy) == least}
        young = all(self.now - self.since[e] < GRACE_NS for e in allowed if e in self.since)
        if young:
            allowed = {e for e in allowed if e in leaves and score_ns(leaves[e]) == least}
        if allowed or not pinned:
            return allowed
        return {e for e in free if not any(self.stands(o, e) for o in there if o is not e)}

    def kept_in(self, tier: TierStore) -> list[bytes]:
        return [key for place, key in self.pinned if place is tier]

    def covered(self, tier: TierStore, key: bytes) -> set[tuple[str, int]]:
        """Which parts of a pinned context a tier has."""
        tokens = self.contexts[key]
        parts = set()
        for entry in self.catalog.index:
            if entry.copy_in(tier) is None or entry.namespace != self.namespace_of(key):
                continue
            if entry.object_id.kind is not ObjectKind.KV:
                if entry.object_id.key == key:
                    parts.add((entry.object_id.kind.value, entry.end))
                continue
            own = self.contexts[entry.object_id.key]
            parts |= {
                ("kv", n) for n in range(entry.start, entry.end) if own[: n + 1] == tokens[: n + 1]
            }
        return parts

    def namespace_of(self, key: bytes) -> bytes:
        for kv_class in CLASSES:
            namespace = bytes([CLASSES.index(kv_class)]) * 32
            tokens = self.contexts[key]
            if ContextKeys(namespace, pack(tokens), ALIGN).key(len(tokens)) == key:
                return namespace
        raise AssertionError("a key of no context")


Eviction.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEviction = Eviction.TestCase


def test_what_nothing_stands_on_any_longer_can_go() -> None:
    """A block that is freed as what hung on it finds another one is evicted like any other."""
    state = Eviction()
    for tiers, tokens in ((("a",), [0, 0]), (("a", "b"), [0])):
        store(space_of(state.cache, tiers, align=ALIGN), tokens)
        assert state.cache.flush(10)
    state.cache.evictor.evict(state.catalog.store("a"), 1)
    for tiers in (("a", "b"), ("b",)):
        store(space_of(state.cache, tiers, align=ALIGN), [0, 1])
        assert state.cache.flush(10)
    state.cache.evictor.evict(state.catalog.store("b"), 1)
    state.teardown()

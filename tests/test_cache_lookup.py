"""Look-up against a brute-force model: it finds exactly the longest reusable prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from erllama_core import Cache, NamedTier
from erllama_core.cache.entry import Entry
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.loader import Fetch
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ABSORBED_TOKENS, ModelSpace, NewBlock
from erllama_core.interfaces.backend import KVClass, Mark
from erllama_core.interfaces.block import ObjectKind
from erllama_core.prompt import pack, unpack

# Few distinct tokens and short segments make contexts branch everywhere.
CONTEXT = st.lists(st.integers(0, 1), min_size=1, max_size=22)
CONTEXTS = st.lists(CONTEXT, min_size=1, max_size=8)
NAMESPACE = bytes(32)


@contextmanager
def open_space(kv_class: KVClass, align: int) -> Iterator[tuple[Cache, ModelSpace]]:
    with Cache([NamedTier("ram", "ram", RamTier(1 << 24))]) as cache:
        yield (
            cache,
            ModelSpace(
                cache, namespace=NAMESPACE, kv_class=kv_class, tiers=("ram",), align_tokens=align
            ),
        )


def store(space: ModelSpace, tokens: list[int]) -> ContextKeys:
    """Save a context as a worker would; a cell's bytes are its token's."""
    keys = space.keys(bytearray(pack(tokens)), None)
    position = 0
    while block := space.next_block(keys, position, len(tokens)):
        save(space, keys, block)
        position = block.end
    if space.kv_class is not KVClass.SPAN and not space.has_snapshot(keys, len(tokens)):
        pages = space.reserve(4 * len(tokens))
        assert pages is not None
        pages.view[:] = pack(tokens)
        space.submit_snapshot(keys, len(tokens), pages, "cold")
    return keys


def save(space: ModelSpace, keys: ContextKeys, block: NewBlock) -> None:
    cells = keys.slice(block.start, block.end)
    if space.kv_class is KVClass.WHOLE:
        cells = b""  # its blocks name tokens and hold nothing
    pages = space.reserve(len(cells))
    assert pages is not None
    pages.view[:] = cells
    space.submit_block(keys, block, pages, "cold")


def restored(space: ModelSpace, prompt: list[int], *, may_sample: bool = False) -> list[int]:
    """The tokens whose cells a look-up brings back; checks that pieces join."""
    keys = space.keys(bytearray(pack(prompt)), None)
    match = space.find(keys, may_sample=may_sample)
    if not match.length:
        return []
    fetch = space.fetch(match, _never)
    assert fetch is not None
    assert not fetch.failed
    tokens: list[int] = []
    if space.kv_class is KVClass.WHOLE:
        view = fetch.snapshot()
        assert view is not None
        tokens = unpack(view)
    else:
        for part in fetch.ranges():
            assert part.start == len(tokens)
            tokens += unpack(part.data)[: part.stop - part.start]
    fetch.release()
    assert len(tokens) == match.length
    return tokens


def _never(_: Fetch) -> None:
    raise AssertionError("everything is in memory")


def shared(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@settings(max_examples=150)
@given(CONTEXTS, CONTEXTS, st.integers(1, 9))
def test_span_reuses_to_the_token(
    stored: list[list[int]], prompts: list[list[int]], align: int
) -> None:
    """A span model reuses the longest prefix it shares with any stored context."""
    with open_space(KVClass.SPAN, align) as (_, space):
        for tokens in stored:
            store(space, tokens)
        for prompt in prompts + stored:
            longest = max(shared(prompt, tokens) for tokens in stored)
            # One token is left to compute, as its logits are needed.
            assert restored(space, prompt) == prompt[: min(longest, len(prompt) - 1)]


@settings(max_examples=100)
@given(CONTEXTS, CONTEXTS, st.integers(1, 9), st.sampled_from([KVClass.CHECKPOINT, KVClass.WHOLE]))
def test_without_truncation_reuse_is_where_a_snapshot_is(
    stored: list[list[int]], prompts: list[list[int]], align: int, kv_class: KVClass
) -> None:
    """A model that cannot rewind reuses the longest stored context that begins the prompt."""
    with open_space(kv_class, align) as (_, space):
        for tokens in stored:
            store(space, tokens)
        for prompt in prompts + stored:
            whole = [len(t) for t in stored if t == prompt[: len(t)] and len(t) < len(prompt)]
            assert restored(space, prompt) == prompt[: max(whole, default=0)]


@settings(max_examples=150)
@given(CONTEXTS, CONTEXTS, st.integers(1, 9), st.data())
def test_objects_may_come_and_go_in_any_order(
    stored: list[list[int]], prompts: list[list[int]], align: int, data: st.DataObject
) -> None:
    """With any objects missing, reuse ends at the first gap, and goes on when they are back."""
    with open_space(KVClass.SPAN, align) as (cache, space):
        owners: dict[Entry, list[int]] = {}
        for tokens in stored:
            store(space, tokens)
            for entry in list(cache.catalog.index):
                owners.setdefault(entry, tokens)
        assert cache.flush(10)
        entries = list(owners)
        gone = data.draw(st.lists(st.sampled_from(entries), unique=True), label="gone")
        ram = cache.catalog.store("ram")
        for entry in gone:
            cache.catalog.forget_copy(ram, entry)

        def model(prompt: list[int], there: list[Entry]) -> int:
            position = 0
            while True:
                ends = [
                    min(e.end, shared(owners[e], prompt))
                    for e in there
                    if e.start <= position and shared(owners[e], prompt) > position
                ]
                best = max(ends, default=position)
                if best <= position:
                    return position
                position = best

        there = [entry for entry in entries if entry not in gone]
        for prompt in prompts + stored:
            longest = model(prompt, there)
            assert restored(space, prompt) == prompt[: min(longest, len(prompt) - 1)]
        for entry in data.draw(st.permutations(gone), label="back"):
            cache.catalog.add_copy(ram, entry, 64, 0, "cold")
        for prompt in prompts + stored:
            longest = max(shared(prompt, tokens) for tokens in stored)
            keys = space.keys(bytearray(pack(prompt)), None)
            assert space.find(keys, may_sample=False).covered == longest


@settings(max_examples=200)
@given(CONTEXTS, CONTEXTS, st.integers(1, 9), st.data())
def test_what_cannot_be_read_hides_nothing(
    stored: list[list[int]], prompts: list[list[int]], align: int, data: st.DataObject
) -> None:
    """Models with different tiers, copies and tiers at rest: each model reuses the longest
    prefix that it can read, whatever else is stored of the same tokens.
    """
    names = ("a", "b", "c")
    lists = st.lists(st.sampled_from(names), min_size=1, unique=True)
    with Cache([NamedTier(name, "ram", RamTier(1 << 24)) for name in names]) as cache:
        spaces = [
            ModelSpace(
                cache, namespace=NAMESPACE, kv_class=KVClass.SPAN, tiers=tiers, align_tokens=align
            )
            for tiers in data.draw(st.lists(lists, min_size=1, max_size=3), label="models")
        ]
        catalog = cache.catalog
        owners: dict[Entry, list[int]] = {}
        for tokens in stored:
            store(data.draw(st.sampled_from(spaces), label="saved by"), tokens)
            assert cache.flush(10)
            for entry in list(catalog.index):
                owners.setdefault(entry, tokens)
        copies = [(entry, copy) for entry in catalog.index for copy in entry.copies]
        for entry, copy in data.draw(st.lists(st.sampled_from(copies), unique=True), label="gone"):
            catalog.forget_copy(copy.tier, entry)
        for _, copy in data.draw(st.lists(st.sampled_from(copies), unique=True), label="resting"):
            copy.rests_until_s = math.inf
        for name in data.draw(st.lists(st.sampled_from(names), max_size=1), label="tiers at rest"):
            catalog.store(name).rests_until_s = math.inf

        def model(space: ModelSpace, prompt: list[int]) -> int:
            there = [
                entry
                for entry in catalog.index
                if any(
                    copy.tier in space.tiers
                    and not copy.rests_until_s
                    and not copy.tier.rests_until_s
                    for copy in entry.copies
                )
            ]
            position = 0
            while True:
                ends = [
                    min(e.end, shared(owners[e], prompt))
                    for e in there
                    if e.start <= position and shared(owners[e], prompt) > position
                ]
                best = max(ends, default=position)
                if best <= position:
                    return position
                position = best

        for space in spaces:
            for prompt in prompts + stored:
                longest = model(space, prompt)
                assert restored(space, prompt) == prompt[: min(longest, len(prompt) - 1)]


@given(CONTEXTS, st.integers(1, 9), st.integers(0, 4000))
def test_eviction_takes_contexts_from_their_end(
    stored: list[list[int]], align: int, n_bytes: int
) -> None:
    """Whatever is evicted, all that stays can still be reached from the start of a context."""
    with open_space(KVClass.SPAN, align) as (cache, space):
        owners: dict[Entry, list[int]] = {}
        for tokens in stored:
            store(space, tokens)
            for entry in list(cache.catalog.index):
                owners.setdefault(entry, tokens)
        assert cache.flush(10)
        total = sum(row.size_bytes for row in cache.dump())
        evicted = cache.evict_bytes(n_bytes)
        assert evicted.bytes >= min(n_bytes, total)
        assert total - evicted.bytes == sum(row.size_bytes for row in cache.dump())
        for entry in list(cache.catalog.index):
            keys = space.keys(bytearray(pack(owners[entry])), None)
            assert space.find(keys, may_sample=False).covered >= entry.end


@given(CONTEXTS, st.integers(1, 9), st.booleans())
def test_each_token_is_stored_once(stored: list[list[int]], align: int, wait: bool) -> None:
    """Storage grows with the distinct tokens: one cell for every different prefix."""
    with open_space(KVClass.SPAN, align) as (cache, space):
        for tokens in stored:
            store(space, tokens)
            if wait:  # only what is written already can become part of a longer block
                assert cache.flush(10)
        assert cache.flush(10)
        cells = sum(entry.end - entry.start for entry in cache.catalog.index)
        prefixes = {tuple(t[: n + 1]) for t in stored for n in range(len(t))}
        assert cells == len(prefixes)
        for entry in cache.catalog.index:
            assert entry.start // align == (entry.end - 1) // align


@given(CONTEXT, st.integers(1, 9), st.booleans())
def test_an_exact_hit_needs_the_mark(tokens: list[int], align: int, whole: bool) -> None:
    """The whole prompt is reused only where its logits were stored and would do."""
    kv_class = KVClass.WHOLE if whole else KVClass.SPAN
    with open_space(kv_class, align) as (_, space):
        keys = store(space, tokens)
        assert space.find(keys, may_sample=True).length < len(tokens)
        mark = Mark(pack([7]), bytes(4), 0.5, 1)
        space.submit_mark(keys, len(tokens), mark, "cold")
        assert space.find(keys, may_sample=False).length < len(tokens)
        match = space.find(keys, may_sample=True)
        assert match.length == len(tokens)
        fetch = space.fetch(match, _never)
        assert fetch is not None
        assert fetch.mark == mark
        fetch.release()


def test_a_salt_shares_nothing() -> None:
    """Whether a request hits never depends on what another salt stored."""
    with open_space(KVClass.SPAN, 4) as (_, space):
        store(space, [1] * 10)
        salted = space.keys(bytearray(pack([1] * 10)), "tenant")
        assert space.find(salted, may_sample=True).covered == 0


def test_marks_are_objects_of_their_own_kind() -> None:
    """A mark has no tokens of its own and stands at one position."""
    with open_space(KVClass.SPAN, 4) as (cache, space):
        keys = store(space, [1, 2, 3, 4, 5])
        space.submit_mark(keys, 5, Mark(pack([7]), bytes(4), 0.0, 1), "cold")
        [entry] = [e for e in cache.catalog.index if e.object_id.kind is ObjectKind.LOGITS]
        assert (entry.start, entry.end, entry.tokens) == (5, 5, b"")


@given(CONTEXT, st.integers(1, 9), st.integers(0, 30))
def test_a_match_is_cut_to_the_cells_that_are_free(
    tokens: list[int], align: int, cells: int
) -> None:
    """No block is imported that does not fit whole; what is left is a prefix still."""
    with open_space(KVClass.SPAN, align) as (_, space):
        keys = store(space, tokens)
        whole = space.find(keys, may_sample=False)
        part = whole.within(cells)
        assert all(piece.entry.end <= cells for piece in part.pieces)
        assert part.length == (part.pieces[-1].stop if part.pieces else 0)
        assert part.pieces == whole.pieces[: len(part.pieces)]
        if cells >= len(tokens):
            assert part == whole


def test_the_short_end_of_a_turn_becomes_part_of_the_next() -> None:
    """A conversation leaves whole blocks behind, not one for the end of every turn."""
    with open_space(KVClass.SPAN, 256) as (cache, space):
        context: list[int] = []
        for turn in range(20):
            context += [turn] * 9
            store(space, context)
            assert cache.flush(10)
        blocks = sorted((e.start, e.end) for e in cache.catalog.index)
        assert len(blocks) <= 180 // ABSORBED_TOKENS + 1
        assert sum(end - start for start, end in blocks) == 180
        assert restored(space, [*context, 1]) == context

"""The cache as one model sees it: its namespace, its tiers, its way of cutting state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs

from erllama_core.cache.anchors import Rendering, TextKeys
from erllama_core.cache.cache import Cache
from erllama_core.cache.discovery import wanted_after
from erllama_core.cache.entry import Entry
from erllama_core.cache.gate import CostGate, Portion
from erllama_core.cache.keys import ContextKeys, adapted, salted
from erllama_core.cache.loader import Fetch
from erllama_core.cache.lookup import Divergence, Finder, Match, entry_at
from erllama_core.cache.marks import MARK_SIZE, encode_mark
from erllama_core.cache.passage import Draft, Route, SaveBuffer
from erllama_core.cache.policy import WriteMode
from erllama_core.cache.thinning import thin
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.backend import KVClass, Mark
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.results import GateEstimate

ABSORBED_TOKENS: Final = 16
"""Longer blocks are not stored again for being extended."""
_MAX_RESPELLINGS: Final = 8
"""Stored contexts that are compared with a prompt's text, at most."""


@attrs.frozen
class NewBlock:
    """A block to be stored: the cells [start, end)."""

    start: int
    end: int
    absorbs: Entry | None
    """A block that is of no use beside the new one."""


class ModelSpace:
    """Look-ups and saves of one model. Called by its worker; nothing here does I/O."""

    def __init__(
        self,
        cache: Cache,
        *,
        namespace: bytes,
        kv_class: KVClass,
        tiers: Sequence[str],
        align_tokens: int,
        rendering: Rendering | None = None,
        gate: CostGate | None = None,
        write: WriteMode = "through",
        promote: bool = True,
    ) -> None:
        self._cache: Final = cache
        self._catalog: Final = cache.catalog
        self._flow: Final = cache.flow
        self._model_namespace: Final = namespace
        self._namespace = namespace
        self._rendering: Final = rendering
        self._tiers: Final = tuple(cache.catalog.store(name) for name in tiers)
        self._finder: Final = Finder(cache.catalog.index, kv_class, self._tiers)
        in_memory = (store for store in self._tiers if store.keeps is not None)
        self._promote_to: Final = next(in_memory, None) if promote else None
        self._route: Final = Route(self._tiers, write == "back", align_tokens)
        self._flow.register(namespace, self._route)
        self.named: Final = cache.named_objects(self._route)
        """What is kept under names of the caller's own; see :meth:`namespace`."""
        self.gate: Final = gate
        """None: whatever is stored is restored."""
        self.kv_class: Final = kv_class
        self.align_tokens: Final = align_tokens
        self.mark_size: Final = MARK_SIZE if kv_class is KVClass.SPAN else None
        """Logits kept of a mark. All of them where no token can be computed again."""

    @property
    def tiers(self) -> tuple[TierStore, ...]:
        """The model's tiers, nearest first."""
        return self._tiers

    @property
    def has_tiers(self) -> bool:
        """Whether there is anywhere to save to."""
        return bool(self._tiers)

    def adapt(self, adapters: Iterable[tuple[bytes, float]]) -> None:
        """Name what is looked up and stored from now on for these adapters: see ``adapted``.

        Keys that were made before are still of the adapters before.
        """
        self._namespace = adapted(self._model_namespace, adapters)
        self._flow.register(self._namespace, self._route)

    def namespace(self, salt: str | None) -> bytes:
        """Whose state a request with this salt shares. Thread-safe."""
        namespace = salted(self._namespace, salt)
        if salt is not None:
            self._flow.register(namespace, self._route)
        return namespace

    def keys(self, tokens: bytearray, salt: str | None) -> ContextKeys:
        """The keys of a context that will grow; ``tokens`` stays the caller's. Thread-safe."""
        namespace = self.namespace(salt)
        text = None
        if self._rendering is not None:
            text = TextKeys(namespace, self._rendering, tokens)
        return ContextKeys(namespace, tokens, self.align_tokens, text)

    # ------------------------------------------------------------------ finding

    def find(self, keys: ContextKeys, *, may_sample: bool) -> Match:
        """The longest stored prefix of a prompt. :meth:`count` says what became of it.

        ``may_sample``: whether the request could sample its first token from a mark.
        """
        started = time.perf_counter_ns()
        with self._catalog.lock:
            match = self._finder.find(keys, may_sample)
        self._catalog.counters.add("lookup_ns", time.perf_counter_ns() - started)
        return match

    def respell(self, keys: ContextKeys, match: Match) -> bytes | None:
        """The prompt in tokens of which more is stored than ``match``; None when none are known.

        Packed. The text is the same, control tokens stand where they stood: a stored context
        that reads like the beginning of the prompt replaces that beginning.
        """
        text, rendering = keys.text, self._rendering
        if text is None or rendering is None:
            return None
        reached = self._reach(match)
        tries = 0
        for position, digest in text.probes(reached):
            with self._catalog.lock:
                found = [
                    context
                    for entry in self._catalog.index.anchored(digest)
                    if entry.namespace == keys.namespace
                    and (context := self._catalog.index.context_of(entry)) is not None
                ]
            for context in found:
                beginning = keys.slice(0, position)
                stored = rendering.prefix(context, rendering.text(beginning))
                if stored is None or stored == beginning:
                    continue
                tokens = stored + keys.slice(position, len(keys))
                if self._reads_further(keys, reached, tokens):
                    return tokens
                tries += 1
                if tries == _MAX_RESPELLINGS:
                    return None
        return None

    def _reads_further(self, keys: ContextKeys, reached: int, tokens: bytes) -> bool:
        """Whether more text of a prompt is stored when it is spelt with ``tokens``."""
        assert self._rendering is not None
        other = ContextKeys(keys.namespace, tokens, self.align_tokens)
        with self._catalog.lock:
            match = self._finder.find(other, may_sample=True)
        covered = self._rendering.text(other.slice(0, self._reach(match)))
        return len(covered) > len(self._rendering.text(keys.slice(0, reached)))

    def _reach(self, match: Match) -> int:
        """How far a match brings a request: what cannot be cut is of use where it stands."""
        return match.covered if self.kv_class is KVClass.SPAN else match.length

    def judge(self, match: Match, n: int) -> GateEstimate | None:
        """What the gate would make of a match for ``n`` tokens; changes nothing. Thread-safe."""
        if self.gate is None or match.length in {0, n}:
            return None
        return self.gate.judge(self._portions(match)).estimate

    def admit(
        self, keys: ContextKeys, match: Match, parent_key: bytes | None
    ) -> tuple[Match, GateEstimate | None]:
        """The part of a prompt's match that the gate lets through; None where it has no say.

        That is on a whole prompt, and on the context that the caller says it goes on from.
        """
        if self.gate is None or match.length in {0, len(keys)}:
            return match, None
        portions = self._portions(match)
        if parent_key is not None and self.gate.judge(portions).estimate.withheld_tokens:
            # Its end need not be that of a block, which may have become part of a longer one;
            # what others stored beyond it is not searched for far.
            nearest = range(match.length, max(0, match.length - 2 * self.align_tokens), -1)
            if any(keys.key(position) == parent_key for position in nearest):
                return match, None
        decision = self.gate.admit(portions)
        return match.first(decision.portions), decision.estimate

    def _portions(self, match: Match) -> list[Portion]:
        """A match as the gate sees it; with a snapshot, which stands at its end, in one piece."""
        now_ns = self._catalog.clock()
        with self._catalog.lock:
            if match.snapshot is not None:
                sources = [self._source(entry, now_ns) for entry in _used(match)]
                reads = tuple(read_s for _, read_s in sources if read_s is not None)
                return [Portion(match.length, sum(size for size, _ in sources), reads)]
            found = []
            for piece in match.pieces:
                size, read_s = self._source(piece.entry, now_ns)
                reads = () if read_s is None else (read_s,)
                found.append(Portion(piece.stop - piece.entry.start, size, reads))
            return found

    def _source(self, entry: Entry, now_ns: int) -> tuple[int, float | None]:
        """Bytes of an object, and what its read would take; None when it is in memory."""
        if entry.pages is not None:
            return len(entry.pages.view), None
        for copy in entry.copies_along(self._tiers):
            if copy.tier.keeps is not None:
                return copy.size_bytes, None
            line = copy.tier.reads.line(copy.last_used_ns, now_ns)
            return copy.size_bytes, line.seconds(copy.size_bytes)
        return 0, None  # gone meanwhile, which the fetch will find

    def count(
        self, match: Match | None, n: int, parent_key: bytes | None, *, withheld: bool = False
    ) -> None:
        """Count what a request ended up with: ``match`` restored, of ``n`` tokens, or None.

        ``parent_key`` is a hint, and one that is never waited for: look-up by content finds
        that context, or a longer one, by itself. ``withheld``: whether the gate kept any back.
        """
        if withheld:
            self._catalog.counters.add("gated")
        if match is None or not match.length:
            self._catalog.counters.add("misses")
            return
        used = _used(match)
        if any(entry.object_id.key == parent_key for entry in used):
            self._catalog.counters.add("hits_resume")
        else:
            self._catalog.counters.add("hits_exact" if match.length == n else "hits_longest_prefix")
        self._catalog.touch(used)

    def divergence(self, keys: ContextKeys, covered: int) -> Divergence:
        """Where a prompt of which ``covered`` tokens are stored leaves what is stored."""
        with self._catalog.lock:
            return self._finder.divergence(keys, covered)

    def fetch(self, match: Match, done: Callable[[Fetch], None]) -> Fetch | None:
        """The state of a match; at once, or later through ``done`` on another thread."""
        return self._cache.fetch(match, self._tiers, self._promote_to, done)

    @property
    def is_scanned(self) -> bool:
        """Whether what this model's tiers held at opening is known, or not worth waiting for."""
        return self._cache.is_scanned(self._tiers)

    def when_scanned(self, then: Callable[[], None]) -> None:
        """Call ``then`` on another thread when it is."""
        self._cache.when_scanned(self._tiers, then)

    def discover(self, keys: ContextKeys, match: Match, then: Callable[[], None]) -> bool:
        """Look for more of a prompt than a look-up found, in what other processes stored since.

        False when there is nothing to look for. Otherwise ``then`` is called on another thread,
        soon in any case; what was found is then known to a look-up.
        """
        shared = [store for store in self._tiers if store.shared is not None]
        if not shared:
            return False
        wanted = wanted_after(keys, match, self.kv_class)
        return wanted is not None and self._cache.discover(wanted, shared, then)

    def refused(self, match: Match) -> None:
        """The backend refused what was stored: a second time, it is not kept any longer."""
        self._catalog.counters.add("state_rejected")
        for entry in _used(match):
            entry.refusals += 1
            if entry.refusals > 1:
                self._cache.disown(entry, "refused by the backend twice")

    def condemned(self, match: Match) -> None:
        """What was stored is no state of this model: it is not kept."""
        self._catalog.counters.add("state_rejected")
        for entry in _used(match):
            self._cache.disown(entry, "what was computed from it are not numbers")

    # ------------------------------------------------------------------- saving

    def next_block(self, keys: ContextKeys, start: int, end: int) -> NewBlock | None:
        """The first run in [start, end) that no block covers; None when all is covered.

        Everything before ``start`` must be covered. A short block in which the run begins, and
        which nothing else hangs on, becomes part of the new one: the ends of many turns would
        otherwise each leave a block of a few tokens behind.
        """
        with self._catalog.lock:
            aligned = start // self.align_tokens * self.align_tokens
            covered, pieces = self._finder.chain(keys, end, aligned)
            position = max(start, covered)
            if position >= end:
                return None
            limit = (position // self.align_tokens + 1) * self.align_tokens
            stop = min(limit, end)
            last = pieces[-1].entry if pieces else None
            if last is not None and position % self.align_tokens and _is_small_leaf(last, position):
                return NewBlock(last.start, stop, last)
            return NewBlock(position, stop, None)

    def covered(self, keys: ContextKeys, n: int) -> int:
        """How many of the first ``n`` tokens of a context are stored in blocks, without a gap."""
        with self._catalog.lock:
            return self._finder.chain(keys, n)[0]

    def has_snapshot(self, keys: ContextKeys, position: int) -> bool:
        return self._has(ObjectKind.SNAPSHOT, keys, position)

    def has_mark(self, keys: ContextKeys, position: int) -> bool:
        return self._has(ObjectKind.LOGITS, keys, position)

    def _has(self, kind: ObjectKind, keys: ContextKeys, position: int) -> bool:
        object_id = ObjectId(kind, position, keys.key(position))
        with self._catalog.lock:
            entry = self._catalog.index.get(object_id)
            return entry is not None and self._finder.readable(entry)

    def reserve(self, size: int, *, beyond_bound: bool = False) -> SaveBuffer | None:
        """A buffer to copy state into; None when too much is on its way to every tier."""
        return self._flow.reserve(size, self._route, beyond_bound=beyond_bound)

    def forgo(self, buffer: SaveBuffer) -> None:
        """Give a buffer back, unsaved."""
        self._flow.forgo(buffer)

    def submit_block(
        self, keys: ContextKeys, block: NewBlock, buffer: SaveBuffer, reason: str
    ) -> None:
        """Store a block whose cells were copied into ``buffer``, which is handed over."""
        self._submit(ObjectKind.KV, keys, block.start, block.end, buffer, reason, block.absorbs)

    def submit_snapshot(
        self, keys: ContextKeys, position: int, buffer: SaveBuffer, reason: str
    ) -> None:
        """Store the snapshot at ``position``, copied into ``buffer``, which is handed over."""
        self._submit(ObjectKind.SNAPSHOT, keys, position, position, buffer, reason)

    def submit_mark(self, keys: ContextKeys, position: int, mark: Mark, reason: str) -> None:
        """Store the logits after the first ``position`` tokens."""
        payload = encode_mark(mark)
        buffer = self.reserve(len(payload))
        if buffer is not None:
            buffer.view[:] = payload
            self._submit(ObjectKind.LOGITS, keys, position, position, buffer, reason)

    def thin_snapshots(self, keys: ContextKeys, n: int, most_bytes: int) -> None:
        """Have the snapshots along the first ``n`` tokens take ``most_bytes`` in each tier.

        With each goes the mark at its position. What is pinned, in use or on its way to a tier
        stays, and the last few do.
        """
        with self._catalog.lock:
            snapshots = list(self._finder.snapshots(keys, n))[::-1]
            removed = [
                (store, entry, copy)
                for store in self._tiers
                for entry, copy in thin(self._catalog, store, snapshots, n, most_bytes)
            ]
        for store, entry, copy in removed:
            self._flow.delete_soon(store, entry.object_id)
            self._catalog.report(
                "evicted", store, entry.object_id, copy.size_bytes, copy.save_reason
            )

    def make_durable(self, keys: ContextKeys, n: int) -> None:
        """Have a tier that lasts keep the first ``n`` tokens' state, so that no power cut takes it.

        For a context that is finished, whose beginning was saved before that was known.
        """
        with self._catalog.lock:
            _, pieces = self._finder.chain(keys, n)
            entries = [piece.entry for piece in pieces]
            for kind in (ObjectKind.SNAPSHOT, ObjectKind.LOGITS):
                entry = self._catalog.index.get(ObjectId(kind, n, keys.key(n)))
                if entry is not None:
                    entries.append(entry)
        self._flow.make_durable(entries, self._route)

    def count_unsaved(self) -> None:
        """Count a save that failed before it came to anything."""
        self._catalog.counters.add("saves_dropped")

    def touch(self, keys: ContextKeys, n: int) -> None:
        """Note that the first ``n`` tokens of a context were in use until now."""
        with self._catalog.lock:
            _, pieces = self._finder.chain(keys, n)
            self._catalog.touch([piece.entry for piece in pieces])

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until everything submitted before is written; False when time ran out."""
        return self._cache.flush(timeout_s)

    def add_pack_time(self, nanoseconds: int) -> None:
        """Account for copying state out of a context."""
        self._catalog.counters.add("pack_ns", nanoseconds)

    def _submit(
        self,
        kind: ObjectKind,
        keys: ContextKeys,
        start: int,
        end: int,
        buffer: SaveBuffer,
        reason: str,
        absorbs: Entry | None = None,
    ) -> None:
        after = self._block_before(keys, start)
        if after is None and start:
            self._flow.forgo(buffer)  # what it goes on from was evicted meanwhile
            self._catalog.counters.add("saves_dropped")
            return
        entry = entry_at(keys, kind, start, end, self._anchors(kind, keys, start, end))
        self._flow.submit(Draft(entry, buffer, self._route, reason, after, absorbs))

    def _anchors(self, kind: ObjectKind, keys: ContextKeys, start: int, end: int) -> bytes:
        """A block names what is in it; what stands at one position names the context's end."""
        if keys.text is None or kind is ObjectKind.SNAPSHOT:
            return b""
        after = start if kind is ObjectKind.KV else end - 1
        return keys.text.anchors(after, end, ends_there=end == len(keys))

    def _block_before(self, keys: ContextKeys, position: int) -> Entry | None:
        """The block that covers the token before ``position``."""
        if not position:
            return None
        with self._catalog.lock:
            covered, pieces = self._finder.chain(keys, position, keys.segment_start(position))
        return pieces[-1].entry if covered >= position and pieces else None


def _used(match: Match) -> list[Entry]:
    entries = [piece.entry for piece in match.pieces]
    entries.extend(e for e in (match.snapshot, match.mark) if e is not None)
    return entries


def _is_small_leaf(entry: Entry, end: int) -> bool:
    """Whether a block ends at ``end``, is short, and no other goes on from it."""
    return (
        entry.end == end
        and end - entry.start <= ABSORBED_TOKENS
        and not any(child.tokens for child in entry.children or ())
        and not entry.writing
    )

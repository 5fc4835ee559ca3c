"""A model and its callers in any order of events, against a model of what each must be told.

The worker's turns are taken by the test, so that a sequence of events that goes wrong goes wrong
every time. The stub's arithmetic is exact: whatever was restored, shared, preempted, sliced or
batched, a reply is the one that a context of its own computes.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from erllama_backend_stub import plugin
from erllama_backend_stub.model import StubModel
from erllama_backend_stub.vocabulary import VOCABULARY, StubVocabulary
from erllama_core import Done, Engine, Model, Stream, TextDelta, load_config
from erllama_core.cache.keys import salted
from erllama_core.cache.marks import decode_mark
from erllama_core.cache.reading import read_object
from erllama_core.errors import (
    DecodeFailed,
    DecodeTimeout,
    EngineClosed,
    EngineReset,
    NoSession,
    PluginFailed,
    PromptTooLong,
    SeqCapacity,
    StickyBusy,
    TimeoutExceeded,
    TranscriptMismatch,
)
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.backend import (
    KVClass,
    RangeExport,
    SamplingParams,
)
from erllama_core.interfaces.block import ObjectKind
from erllama_core.interfaces.tier import Pages
from erllama_core.model import admission, restorer
from erllama_core.model.request import Request
from erllama_core.prompt import pack, unpack
from erllama_core.providers import TierProvider
from erllama_core.results import Stats
from held_tier import HeldTier
from stepped import Hand, by_hand
from stub_alone import computed, sampled
from stub_engine import KV_CLASSES

N_CTX = 72
N_SEQ = 4
MIN_TOKENS = 6
ALIGN = 8
EOG_RATE = 0.02
SALTS = (None, None, None, "other")
SESSIONS = ("a", "b")
TIERS = ((), ("ram",), ("held",), ("ram", "held"))

STEMS = (
    "the quick brown fox jumps over the lazy dogs",
    "the quick brown bear sleeps all winter",
    "x",
)
CHATS = ("<|im_start|>the thing on the lake<|im_end|>", "<|im_start|>the thing<|im_end|>no")


class Plugins:
    """A tier that the test holds."""

    held: HeldTier

    @hookimpl
    def erllama_tiers(self) -> list[TierProvider]:
        return [TierProvider("held", "", lambda _: Plugins.held)]


@functools.cache
def host() -> PluginHost:
    made = PluginHost(discover=False)
    made.register(plugin)
    made.register(Plugins())
    return made


# ------------------------------------------------------------------- what is right


@attrs.frozen
class Made:
    """How a prompt is made."""

    base: int
    part: int
    tail: list[int]


MADE = st.builds(
    Made,
    st.integers(0, 30),
    st.sampled_from([8, 8, 8, 1, 2, 4, 6, 7]),
    st.lists(st.sampled_from([65, 66]), max_size=3),
)


def _options(
    response_tokens: int | None, on_full: str, seed: int | None, more: dict[str, Any]
) -> dict[str, Any]:
    drawn = {} if seed is None else {"temperature": 0.8, "seed": seed}
    return {"response_tokens": response_tokens, "on_full": on_full, **drawn, **more}


OPTIONS = st.builds(
    _options,
    st.sampled_from([1, 2, 5, 20, None]),
    st.sampled_from(["block", "block", "block", "error"]),
    st.sampled_from([None, None, 1, 2]),
    st.sampled_from(
        [{}, {}, {"explain": True}, {"repetition_penalty": 1.3}, {"stop_sequences": ["e"]}]
    ),
)


@attrs.define(eq=False)
class Session:
    tokens: tuple[int, ...] | None = None
    salt: str | None = None
    running: Ask | None = None


@attrs.define(eq=False, repr=False, slots=False)
class Ask:
    """A request, as its caller remembers it."""

    stream: Stream
    request: Request
    prompt: tuple[int, ...]
    text: str | None
    generates: bool
    options: dict[str, Any]
    session: Session | None
    continues: bool = False
    cancelled: bool = False
    must: set[type] | None = None
    """If it has no answer yet, its answer is one of these errors."""
    may: set[type] = attrs.field(factory=set)
    """Errors that it may end with instead."""
    outcome: object = None
    longest: bytes = b""
    """Its context, before it was cut short."""
    heard: bytes = b""

    def __repr__(self) -> str:
        return f"request {self.request.id}"

    def _repr_pretty_(self, printer: Any, cycle: object) -> None:
        printer.text(repr(self))

    @property
    def salt(self) -> str | None:
        salt: str | None = self.request.options.cache_salt
        return salt


class Callers(RuleBasedStateMachine):
    def __init__(self, kv_class: str, *, unified: bool) -> None:
        super().__init__()
        self.kv_class, self.unified = kv_class, unified
        self.asks: list[Ask] = []
        self.sessions: dict[str, Session] = {}
        self.finished: list[tuple[int, ...]] = [tuple(STEMS[0].encode())]
        self.samplers: list[Any] = []
        self.engine: Any = None
        self._stack = pytest.MonkeyPatch()
        self._by_hand = by_hand()
        self._logs = capture_logs()
        self._by_hand.__enter__()
        self._logs.__enter__()
        self._stack.setattr(restorer, "_WORTH_WAITING", 4)
        self._stack.setattr(admission, "_HEADROOM", 8)
        new_sampler = StubModel.new_sampler

        def counted(model: StubModel, params: SamplingParams, history: Any) -> Any:
            sampler = new_sampler(model, params, history)
            plain = sampler.close
            closes: list[int] = []

            def close() -> None:
                closes.append(1)
                plain()

            sampler.close = close  # type: ignore[method-assign]
            self.samplers.append(closes)
            return sampler

        self._stack.setattr(StubModel, "new_sampler", counted)

    @property
    def open(self) -> list[Ask]:
        return [ask for ask in self.asks if ask.outcome is None]

    # ---------------------------------------------------------------- the engine

    @initialize(
        tiers=st.sampled_from(TIERS),
        residents=st.sampled_from([None, 0, 40]),
        chunk=st.sampled_from([4, 16, 64]),
        n_batch=st.sampled_from([2, 24, 256]),
        interval=st.sampled_from([0, 5]),
        small=st.booleans(),
    )
    def begin(
        self,
        tiers: tuple[str, ...],
        residents: int | None,
        chunk: int,
        n_batch: int,
        interval: int,
        small: bool,
    ) -> None:
        self.held = HeldTier(6_000 if small else 1 << 30)
        config = {
            "cache": {
                "max_inflight_bytes": 3_000 if small else 1 << 28,
                "writer_threads": 1,
                "loader_threads": 1,
            },
            "tiers": [
                {"name": "ram", "kind": "ram", "quota_bytes": 9_000 if small else 1 << 28},
                {"name": "held", "kind": "held"},
            ],
        }
        Plugins.held = self.held
        self.engine = Engine(load_config(config, environ={}), plugins=host())
        assert self.engine.cache.wait_scanned(10)
        self.config: dict[str, Any] = {
            "backend": "stub",
            "tier": list(tiers),
            "context_opts": {
                "n_ctx": N_CTX,
                "n_seq_max": N_SEQ,
                "n_batch": n_batch,
                "kv_unified": self.unified,
                "resident_cells_max": residents,
                "decode_budget_ms": 0,
            },
            "policy": {
                "boundary_align_tokens": ALIGN,
                "min_tokens": MIN_TOKENS,
                "cold_min_tokens": MIN_TOKENS,
                "prefill_chunk_size": chunk,
                "continued_interval": interval,
                # No clock and no other thread decides anything.
                "stall_target_ms": 0,
                "promote": False,
            },
            "model_opts": {"kv_class": self.kv_class, "eog_rate": EOG_RATE, "digraphs": True},
        }
        self.load()

    def load(self) -> None:
        self.model: Model = self.engine.load_model("stub", **self.config)
        self.hand = Hand(self.model)
        self.namespace = self.hand.runner.space._namespace

    # ------------------------------------------------------------------- requests

    def prompt(self, made: Made) -> tuple[int, ...]:
        """Of a stem or of a context that has ended, a first part and a tail."""
        bases = [*(tuple(stem.encode()) for stem in STEMS), *self.finished[-5:]]
        base = bases[made.base % len(bases)]
        return (*base[: max(1, len(base) * made.part // 8)], *made.tail)

    @rule(
        made=MADE,
        options=OPTIONS,
        salt=st.sampled_from(SALTS),
        session=st.sampled_from([None, None, *SESSIONS]),
        of=st.sampled_from(["tokens", "tokens", "again", "session", "session", "text"]),
    )
    def ask(
        self, made: Made, options: dict[str, Any], salt: str | None, session: str | None, of: str
    ) -> None:
        """A request of tokens, of text, or of a session's tokens and more."""
        prompt, text = self.prompt(made), None
        known = self.sessions.get(session or "")
        if of == "session" and known is not None and known.tokens is not None:
            prompt = (*known.tokens, *made.tail)
        elif of == "again" and self.asks:
            prompt = self.asks[made.base % len(self.asks)].prompt
        elif of == "text":
            text = CHATS[made.base % len(CHATS)] + ("", "the", "n")[made.part % 3]
            prompt = tuple(self.model.tokenize(text))
        self.submit(prompt, text, options | {"cache_salt": salt}, session)

    @rule(made=MADE, salt=st.sampled_from(SALTS))
    def ask_for_a_prompt(self, made: Made, salt: str | None) -> None:
        prompt = self.prompt(made)[:N_CTX]
        stream = self.model.start_prefill(list(prompt), cache_salt=salt)
        self.note(stream, prompt, None, {}, None, generates=False)

    @rule(made=MADE, options=OPTIONS, count=st.integers(2, 4))
    def ask_for_several_of_a_kind(self, made: Made, options: dict[str, Any], count: int) -> None:
        """Agents with one prefix."""
        for number in range(count):
            self.submit((*self.prompt(made)[:50], 97 + number), None, options, None)

    def submit(
        self, prompt: tuple[int, ...], text: str | None, options: dict[str, Any], key: str | None
    ) -> None:
        def call() -> Stream:
            given = list(prompt) if text is None else text
            return self.model.infer(given, session_id=key, **options)

        self.try_to(call, prompt, text, options, key)

    def try_to(
        self,
        call: Any,
        prompt: tuple[int, ...],
        text: str | None,
        options: dict[str, Any],
        key: str | None,
        *,
        continues: bool = False,
    ) -> None:
        session = None if key is None else self.sessions.get(key)
        busy = session is not None and session.running is not None
        full = options["on_full"] == "error" and len(self.open) >= N_SEQ
        try:
            stream = call()
        except PromptTooLong:
            assert len(prompt) >= N_CTX
            return
        except StickyBusy:
            assert busy
            return
        except SeqCapacity:
            assert full
            return
        assert not full
        assert not busy
        assert len(prompt) < N_CTX
        if key is not None and session is None:
            session = self.sessions[key] = Session()
        self.note(stream, prompt, text, options, session, continues=continues)

    def note(
        self,
        stream: Stream,
        prompt: tuple[int, ...],
        text: str | None,
        options: dict[str, Any],
        session: Session | None,
        *,
        generates: bool = True,
        continues: bool = False,
    ) -> None:
        unfinished = self.hand.worker._unfinished
        [request] = [one for one in unfinished if one.id == stream.request_id]
        ask = Ask(stream, request, prompt, text, generates, options, session, continues)
        self.asks.append(ask)
        if session is not None:
            session.running = ask

    @rule(
        options=OPTIONS,
        key=st.sampled_from(SESSIONS),
        suffix=st.lists(st.just(67), max_size=2),
        is_sure=st.sampled_from([True, True, False, None]),
    )
    def go_on(
        self, options: dict[str, Any], key: str, suffix: list[int], is_sure: bool | None
    ) -> None:
        session = self.sessions.get(key)
        believed = None if session is None or is_sure is None else session.tokens
        if is_sure is False:
            believed = (1, 2, 3)
        call = functools.partial(
            self.model.continue_session,
            suffix,
            session_id=key,
            expect_committed=believed,
            **options,
        )
        try:
            if session is None or session.running is not None or session.tokens is None:
                call()
                raise AssertionError("there was nothing to go on from")
            self.try_to(call, (*session.tokens, *suffix), None, options, key, continues=True)
        except NoSession:
            assert session is None or (session.tokens is None and session.running is None)
        except StickyBusy:
            assert session is not None
            assert session.running is not None
        except TranscriptMismatch as error:
            assert session is not None
            assert believed != session.tokens
            assert error.stored_len == len(session.tokens or ())  # noqa: PT017

    @rule(
        made=MADE,
        options=OPTIONS,
        key=st.sampled_from(SESSIONS),
        how=st.lists(st.sampled_from(["prompt", "suffix", "nothing"]), min_size=1, max_size=3),
    )
    def talk(self, made: Made, options: dict[str, Any], key: str, how: list[str]) -> None:
        """Turns of a session, one right after the other's answer."""
        for what in how:
            before, pinned = self.sessions.get(key), self.is_at_hand(key)
            salt = None if before is None else before.salt
            if what == "prompt":
                self.ask(made, options, None, key, "session")
            else:
                self.go_on(options, key, [67] if what == "suffix" else [], None)
            session = self.sessions.get(key)
            asked = None if session is None else session.running
            for _ in range(60):
                if asked is None or asked.outcome is not None:
                    break
                self.turn()
            is_next = asked is not None and before is session and asked.salt == salt
            if asked is not None and is_next and pinned is not None:
                self.check_turn(asked, pinned)

    def is_at_hand(self, key: str) -> tuple[int, ...] | None:
        """The tokens of a session that nothing can take away from its next turn."""
        session, runner = self.sessions.get(key), self.hand.runner
        quiet = not (self.open or runner.roster.active or runner.has_work)
        breaks = {"drop", "share", "truncate", "length"} & vars(self.hand.context).keys()
        spoilt = self.hand.reads_held or self.hand.faults.in_step or breaks
        pinned = self.hand.worker._sessions._sessions.get(key)
        if session is None or pinned is None or pinned.live is None or not quiet or spoilt:
            return None
        return session.tokens

    def check_turn(self, ask: Ask, before: tuple[int, ...]) -> None:
        """It went on in the very cells."""
        done = ask.outcome
        if not isinstance(done, Stats) or done.prompt_tokens < len(before):
            return
        if len(ask.prompt) > len(before):
            assert done.cache_hit_kind == ("continuation" if ask.continues else "sticky")
            assert done.cache_delta.read == len(before)
        elif self.kv_class == "span" and len(before) > 1:
            assert done.cache_hit_kind in {"continuation", "sticky"}
            assert done.cache_delta.read >= len(before) - 1

    # ----------------------------------------------------------------------- time

    @rule(count=st.sampled_from([1, 2, 3]))
    def a_few_turns(self, count: int) -> None:
        self.turns(count)

    @rule(count=st.sampled_from([5, 10, 20, 60]))
    def turns(self, count: int) -> None:
        for _ in range(count):
            if not self.turn():
                return

    def turn(self) -> bool:
        done = self.hand.turn()
        assert self.engine.cache.flush(10)
        self.listen()
        self.hand.checks()
        return done

    @rule(which=st.integers(0, 30), by_id=st.booleans())
    def cancel(self, which: int, by_id: bool) -> None:
        if not self.open:
            return
        ask = self.open[which % len(self.open)]
        if by_id:
            assert self.model.cancel(ask.stream.request_id)
        else:
            ask.stream.cancel()
        ask.cancelled = True
        if ask.must == {TimeoutExceeded}:  # which is looked at afterwards
            ask.must, ask.may = None, {*ask.may, TimeoutExceeded}

    @rule(which=st.integers(0, 30))
    def run_out_of_time(self, which: int) -> None:
        if not self.open:
            return
        ask = self.open[which % len(self.open)]
        ask.request.deadline = 0.0  # type: ignore[misc]
        if ask.cancelled:  # which is looked at first
            ask.may.add(TimeoutExceeded)
        else:
            ask.must = {TimeoutExceeded}

    @rule(key=st.sampled_from(SESSIONS), lot=st.integers(0, 3))
    def end_session(self, key: str, lot: int) -> None:
        if lot:
            return
        self.model.end_session(key)
        self.sessions.pop(key, None)

    @rule(key=st.sampled_from(SESSIONS), lot=st.integers(0, 3))
    def reset_session(self, key: str, lot: int) -> None:
        if lot:
            return
        session = self.sessions.pop(key, None)
        running = None if session is None else session.running
        if running is not None:
            running.may.add(EngineReset)
        assert self.hand.during(lambda: self.model.reset_session(key)) == (session is not None)
        self.listen()
        assert running is None or running.outcome is not None

    @rule(what=st.sampled_from(["gc", "some", "residents", "live"]))
    def make_room(self, what: str) -> None:
        if what == "gc":
            self.engine.cache.gc()
        elif what == "some":
            self.engine.cache.evict_bytes(900)
        elif what == "residents":
            self.hand.worker.drop_residents()
        else:
            self.hand.during(self.hand.worker.save_live)
            self.listen()

    @rule(held=st.booleans())
    def hold_reads(self, held: bool) -> None:
        """The tier that is not in memory answers no reads, or goes on."""
        if held:
            self.held.reads.clear()
        else:
            self.held.reads.set()
        self.hand.reads_held = held

    def let_go(self) -> None:
        self.held.reads.set()
        self.hand.reads_held = False

    # -------------------------------------------------------------------- trouble

    def in_the_batch(self) -> list[Ask]:
        batch = {request.id for request in self.hand.runner.watch.batch}
        return [ask for ask in self.open if ask.request.id in batch and not _is_answered(ask)]

    def running(self) -> list[Ask]:
        active = {request.id for request in self.hand.runner.roster.active}
        return [ask for ask in self.open if ask.request.id in active and not _is_answered(ask)]

    @rule(what=st.sampled_from(["fail", "abort", "abort", "overrun", "hang"]))
    def spoil_the_next_step(self, what: str) -> None:
        def spoil() -> None:
            if what == "fail":
                self.hand.faults.fail_step = True
                self.lose(self.in_the_batch(), DecodeFailed)
            elif what == "hang":
                self.lose(self.running(), DecodeTimeout)
                self.hand.give_up()
            else:
                if what == "overrun":
                    self.hand.runner.watch.over_budget = True
                    self.lose(self.in_the_batch(), DecodeTimeout)
                self.hand.context.abort()

        self.hand.faults.in_step = spoil

    def lose(self, asks: list[Ask], error: type) -> None:
        for ask in asks:
            ask.must = {error}

    @rule(what=st.sampled_from(["export", "import"]))
    def refuse_state(self, what: str) -> None:
        if what == "export":
            self.hand.faults.fail_export = True
        else:
            self.hand.faults.fail_import = True

    @rule(what=st.sampled_from(["drop", "share", "truncate", "length"]))
    def break_the_context(self, what: str) -> None:
        """A call that never fails does, once."""
        context, hand = self.hand.context, self.hand
        if not hand.runner.watch.count:
            return  # one that never computed anything is not replaced

        def broken(*_: Any) -> Any:
            delattr(context, what)
            if hand.context is context:
                waiting = list(hand.runner.roster.waiting)[:1]
                for ask in self.open:
                    if ask in self.running() or ask.request in waiting:
                        ask.may.add(PluginFailed)
            raise RuntimeError("careless")

        setattr(context, what, broken)

    @rule(lot=st.integers(0, 7))
    def load_anew(self, lot: int) -> None:
        if lot:
            return
        self.let_go()
        self.mend()
        self.lose(self.open, EngineClosed)
        self.model.unload()
        self.listen()
        assert not self.open
        self.sessions.clear()
        self.load()

    def mend(self) -> None:
        for what in ("drop", "share", "truncate", "length"):
            self.hand.context.__dict__.pop(what, None)

    # --------------------------------------------------------------------- answers

    def listen(self) -> None:
        """Take what callers were told, and see that it is right."""
        for ask in self.open:
            ask.longest = max(ask.longest, bytes(ask.request.tokens), key=len)
            try:
                while ask.outcome is None:
                    event = ask.stream.next_event(0)
                    if isinstance(event, TextDelta):
                        ask.heard += event.data
                    elif isinstance(event, Done):
                        ask.outcome = event.stats
            except Exception as error:  # noqa: BLE001 - looked at below
                if isinstance(error, TimeoutError) and not isinstance(error, TimeoutExceeded):
                    continue
                ask.outcome = error
            self.check(ask)

    def check(self, ask: Ask) -> None:
        outcome, session = ask.outcome, ask.session
        if session is not None and session.running is ask:
            session.running = None
        if isinstance(outcome, Exception) and not isinstance(outcome, TimeoutExceeded):
            allowed = ask.may | (ask.must or set())
            assert type(outcome) in allowed, f"{outcome!r}, and not one of {allowed}"
            return
        if isinstance(outcome, TimeoutExceeded):
            assert TimeoutExceeded in ask.may | (ask.must or set())
            partial = outcome.partial
            assert partial is not None
            done = partial
        else:
            assert ask.must is None, f"it should have ended with {ask.must}"
            done = ask.stream.result()
        self.check_completion(ask, done)
        if session is not None and done.context_tokens:
            session.tokens, session.salt = done.context_tokens, ask.salt

    def check_completion(self, ask: Ask, done: Any) -> None:
        stats, tokens = done.stats, done.context_tokens
        cut_short = done.finish_reason == "cancelled" and not done.generated
        assert done.committed_tokens == len(tokens)
        prompt = tokens[: stats.prompt_tokens]
        if not cut_short:
            assert done.committed_tokens == stats.prompt_tokens + stats.completion_tokens
            assert tokens[stats.prompt_tokens :] == done.generated
        if ask.text is None:
            assert prompt == ask.prompt[: len(prompt)]
            assert stats.prompt_tokens == len(ask.prompt)
        elif not cut_short:
            text = StubVocabulary(digraphs=True).detokenize(pack(prompt))
            assert text.decode() == ask.text
        self.check_reply(ask, prompt, done)
        self.check_cache(ask, prompt, done)

    def check_reply(self, ask: Ask, prompt: tuple[int, ...], done: Any) -> None:
        assert done.finish_reason != "cancelled" or ask.cancelled or ask.must or ask.may
        text = bytes(token for token in done.generated if token < 256)
        if done.stop_sequence:
            text = text[: text.index(done.stop_sequence.encode())]
        assert ask.heard == text
        if not ask.generates:
            assert done.generated == ()
            return
        if done.finish_reason == "cancelled" and not done.generated:
            return
        options = ask.request.options
        room = N_CTX - len(prompt)
        most = min(options.response_tokens or room, room)
        said = sampled(self.kv_class, pack(prompt), most, options.sampling(), EOG_RATE)
        expected: list[int] = []
        reason = "length"
        for token in said:
            if token in VOCABULARY.end_of_generation:
                reason = "stop"
                break
            expected.append(token)
            if options.stop_sequences and token == ord("e"):
                reason = "stop"
                break
        if done.finish_reason == "cancelled":
            assert done.generated == tuple(expected[: len(done.generated)])
        else:
            assert done.generated == tuple(expected)
            assert done.finish_reason == reason

    def check_cache(self, ask: Ask, prompt: tuple[int, ...], done: Any) -> None:
        """Pattern 17, and that nothing came from where it must not."""
        read, created = done.cache_delta.read, done.cache_delta.created
        kind, committed = done.cache_hit_kind, done.committed_tokens
        cut_short = done.finish_reason == "cancelled" and not done.generated
        whole = done.stats.prompt_tokens
        if kind == "cold":
            assert read == 0
        elif kind == "exact":
            assert read == whole
        elif kind == "partial":
            assert 0 < read < whole
        else:
            assert ask.session is not None
            assert (kind == "continuation") == ask.continues
            assert 0 < read <= whole
        has_key = done.finish_key is not None
        finished = not cut_short and not (ask.must or ask.may)
        if finished and done.finish_reason != "cancelled":
            assert has_key == (bool(self.config["tier"]) and committed >= MIN_TOKENS)
        assert created == (committed - read if has_key else 0)
        if has_key:
            name = salted(self.namespace, ask.salt) + pack(done.context_tokens)
            assert bytes(done.finish_key) == hashlib.sha256(name).digest()
        self.finished.append(done.context_tokens[:60] or (65,))
        if not cut_short:
            self.check_origin(ask, pack(prompt)[: 4 * read])

    def check_origin(self, ask: Ask, read: bytes) -> None:
        """What was read had been computed before, by somebody with the same salt."""
        others = [other for other in self.asks if other.salt == ask.salt and other is not ask]
        assert not read or any(other.longest.startswith(read) for other in others)

    # ------------------------------------------------------------------------ always

    @invariant()
    def observations_agree(self) -> None:
        if self.engine is None:
            return
        self.hand.checks()
        waiting = {request.id for request in self.hand.runner.roster.waiting}
        queued = [ask for ask in self.open if ask.request.phase.name == "QUEUED"]
        assert {ask.request.id for ask in queued} >= waiting
        assert self.model.pending_len() == len(queued)
        streamed = [ask for ask in self.open if ask.generates]
        assert self.model.queue_depth() == len(streamed)
        info = self.model.info()
        assert info.available_seqs == N_SEQ - len(self.hand.runner.roster.active)

    def teardown(self) -> None:
        try:
            if self.engine is not None:
                self.quiesce()
        finally:
            if self.engine is not None:
                self.let_go()
                self.mend()
                self.engine.close()
            self._logs.__exit__(None, None, None)
            self._by_hand.__exit__(None, None, None)
            self._stack.undo()
        assert all(closes == [1] for closes in self.samplers), "each sampler is closed once"

    def quiesce(self) -> None:
        """Everybody is answered, once, and nothing is left behind."""
        self.let_go()
        for _ in range(5_000):
            if not self.turn():
                break
        else:
            raise AssertionError("it never comes to rest")
        assert not self.open, [(ask, ask.request.phase) for ask in self.open]
        for ask in self.asks:
            assert ask.stream._events._items.empty(), "answered once"
        assert self.hand.during(lambda: self.engine.flush(10))
        runner = self.hand.runner
        assert (runner.roster.active, list(runner.roster.waiting)) == ([], [])
        assert self.model.info().available_seqs == N_SEQ
        assert self.model.phase() == "idle"
        assert runner.restorer.outstanding == 0
        assert not self.hand.worker._unfinished
        assert not self.hand.worker._asking
        with self.engine.cache.catalog.lock:
            copies = [copy for entry in self.engine.cache.catalog.index for copy in entry.copies]
            assert [copy for copy in copies if copy.users] == []
        self.check_stored()

    def check_stored(self) -> None:
        """What is stored is what a context of its own would have stored."""
        catalog = self.engine.cache.catalog
        with catalog.lock:
            stored = [
                (entry, catalog.index.context_of(entry), copy.tier)
                for entry in catalog.index
                for copy in entry.copies
            ]
        for entry, context, store in stored:
            if context is None:
                continue
            if store.keeps is not None:
                pages: Pages = store.keeps.borrow(entry.object_id)
            else:
                _, pages = read_object(catalog, store, entry)
            try:
                self.check_object(entry, context, bytes(pages.view))
            finally:
                pages.release()

    def check_object(self, entry: Any, context: bytes, payload: bytes) -> None:
        alone = computed(self.kv_class, context, EOG_RATE)
        if entry.object_id.kind is ObjectKind.LOGITS:
            mark = alone.mark(0, 1024 if alone.kv_class is KVClass.SPAN else None)
            assert decode_mark(payload) == mark, unpack(context)
            return
        if entry.object_id.kind is ObjectKind.SNAPSHOT:
            expected = bytearray(alone.snapshot_bytes(0))
            alone.export_snapshot(0, memoryview(expected))
        elif alone.kv_class is KVClass.WHOLE:
            expected = bytearray()  # such a block holds its tokens, by which it is found, alone
        else:
            size = alone.range_bytes(0, entry.start, entry.end)
            expected = bytearray(size)
            alone.export_ranges(0, [RangeExport(entry.start, entry.end, memoryview(expected))])
        assert payload == expected, (entry.object_id, unpack(context))


def _is_answered(ask: Ask) -> bool:
    return ask.request.is_answered


MACHINES = pytest.mark.parametrize(
    ("kv_class", "unified"),
    [(kv_class, unified) for kv_class in KV_CLASSES for unified in (True, False)],
)


def run_machine(kv_class: str, *, unified: bool, examples: int, steps: int) -> None:
    factory: Any = functools.partial(Callers, kv_class, unified=unified)
    run_state_machine_as_test(
        factory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Stage.reuse, Stage.generate],  # shrinking takes minutes: ask for it by hand
        ),
    )


@MACHINES
def test_callers_in_any_order(kv_class: str, unified: bool) -> None:
    """Each is answered once, with what it is told alone; the books are right after every turn."""
    run_machine(kv_class, unified=unified, examples=10, steps=50)


@pytest.mark.fuzz
@MACHINES
def test_callers_in_any_order_at_length(kv_class: str, unified: bool) -> None:
    """The same for as long as it takes."""
    run_machine(kv_class, unified=unified, examples=400, steps=80)

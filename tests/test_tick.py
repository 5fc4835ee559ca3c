"""Batches: running replies first, prompts in fair turns, and never more than fits."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from erllama_core import Prompt
from erllama_core.model.options import RequestOptions
from erllama_core.model.request import Phase, Request
from erllama_core.model.sequences import LiveSequence
from erllama_core.model.tick import Pace, TickComposer


class Nothing:
    """Stands where a sampler and a pipeline are, which composing does not look at."""


def request(number: int, prompt: int, computed: int, *, generating: bool) -> Request:
    made = Request(
        number,
        Prompt(range(prompt)),
        RequestOptions(),
        context_size=1000,
        new_sampler=lambda _: Nothing(),  # type: ignore[arg-type,return-value]
        pipeline=Nothing(),  # type: ignore[arg-type]
    )
    made.live = LiveSequence(number)
    made.phase = Phase.GENERATING if generating else Phase.PREFILLING
    made.computed = computed
    if generating:
        made.computed = prompt
        made.append(7)
    return made


SHAPES = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=6)


@given(SHAPES, st.integers(8, 200), st.none() | st.integers(1, 100))
def test_every_prompt_is_computed_in_order_and_in_bounds(
    shapes: list[tuple[int, bool]], batch_tokens: int, chunk: int | None
) -> None:
    """Rows fit the batch, go on where the last one stopped, and ask for logits at the end."""
    active = [request(n, p, 0, generating=g) for n, (p, g) in enumerate(shapes)]
    composer = TickComposer(batch_tokens, chunk)
    limit = chunk or max(64, batch_tokens // 4)
    waiting = sum(p for p, g in shapes if not g)
    for _ in range(waiting + 1):
        tick = composer.compose(active)
        batch, rows = tick.requests, tick.rows
        assert [r.seq for r in rows] == [b.seq for b in batch]
        assert len(set(map(id, batch))) == len(batch)
        assert sum(len(row.tokens) // 4 for row in rows) == tick.n_tokens <= batch_tokens
        assert tick.n_replies == sum(r.phase is Phase.GENERATING for r in batch)
        running = [r for r in active if r.phase is Phase.GENERATING]
        assert batch[: len(running)] == running, "replies first"
        for one, row in zip(batch, rows, strict=True):
            count = len(row.tokens) // 4
            assert row.start == one.computed
            assert row.tokens == bytes(one.tokens[4 * row.start : 4 * (row.start + count)])
            assert row.logits == (row.start + count >= one.prompt_tokens)
            if one.phase is Phase.PREFILLING:
                assert count <= limit
                one.computed += count
                if one.computed == one.prompt_tokens:
                    one.phase = Phase.ENDED
        if not any(r.phase is Phase.PREFILLING for r in active):
            return
    raise AssertionError("a prompt was never finished")


def test_prompts_take_turns() -> None:
    """When a batch holds one part only, each prompt gets its turn before any gets a second."""
    active = [request(n, 100, 0, generating=False) for n in range(3)]
    composer = TickComposer(10, 10)
    order = []
    for _ in range(6):
        tick = composer.compose(active)
        batch, rows = tick.requests, tick.rows
        order += [one.seq for one in batch]
        batch[0].computed += len(rows[0].tokens) // 4
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]


def test_nobody_is_passed_over_while_others_come_and_go() -> None:
    """However the number of prompts changes from step to step, each gets its part."""
    lasting = [request(n, 1000, 0, generating=False) for n in range(2)]
    composer = TickComposer(10, 10)
    for step in range(30):
        passing = [request(2, 1000, 0, generating=False)] if step % 2 else []
        tick = composer.compose([*lasting, *passing])
        for one, row in zip(tick.requests, tick.rows, strict=True):
            one.computed += len(row.tokens) // 4
    assert min(one.computed for one in lasting) >= 70


def test_more_replies_than_a_batch_holds_take_turns() -> None:
    """Where a batch is smaller than the number of replies, none of them stands still."""
    active = [request(n, 5, 0, generating=True) for n in range(5)]
    composer = TickComposer(2, None)
    parts = [0] * 5
    for _ in range(10):
        for one in composer.compose(active).requests:
            parts[one.id] += 1
    assert sum(parts) == 20
    assert min(parts) >= 3


@given(
    reply_ms=st.floats(0.5, 300),
    token_ms=st.floats(0.05, 25),
    slower=st.floats(1, 1.2),
    n_replies=st.integers(1, 8),
    target_ms=st.integers(20, 400),
)
def test_replies_wait_for_the_target_and_two_of_their_steps_at_most(
    reply_ms: float, token_ms: float, slower: float, n_replies: int, target_ms: int
) -> None:
    """Whatever a model takes, and though a prompt gets slower with what lies before it."""
    composer = TickComposer(512, None, target_ms)
    replies = [request(n, 5, 0, generating=True) for n in range(n_replies)]
    long = request(n_replies, 900, 0, generating=False)
    alone_s = n_replies * reply_ms / 1000
    assume(4 * token_ms * slower < target_ms)  # the least that is computed of a prompt
    pace = Pace()
    pace.note(0, n_replies, alone_s)
    pace.note(64, 0, 64 * token_ms / 1000)
    while long.computed < long.length:
        tick = composer.compose([*replies, long], pace)
        count = tick.n_tokens - tick.n_replies
        assert count, "the prompt gets on"
        each_ms = token_ms * (1 + (slower - 1) * long.computed / long.length)
        seconds = alone_s + count * each_ms / 1000
        assert seconds <= (target_ms / 1000 + 2 * alone_s) * 1.05
        pace.note(count, n_replies, seconds)
        long.computed += count


def test_a_model_that_is_slower_than_the_target_computes_prompts_all_the_same() -> None:
    """A part of the time is theirs, though replies alone take longer than they may wait."""
    composer = TickComposer(512, None, 100)
    pace = Pace()
    pace.note(0, 1, 0.5)
    pace.note(64, 0, 0.64)
    active = [request(0, 5, 0, generating=True), request(1, 900, 0, generating=False)]
    tick = composer.compose(active, pace)
    assert tick.n_tokens - tick.n_replies == 37


@given(slower=st.floats(1, 6), n_replies=st.integers(1, 8))
def test_prompts_get_on_where_the_machine_has_become_slower(slower: float, n_replies: int) -> None:
    """Slowness that replies share is not all taken for the prompt's, which gets on."""
    composer = TickComposer(512, None, 100)
    pace = Pace()
    pace.note(0, n_replies, 0.03)
    pace.note(64, 0, 64 * 0.0003)
    active = [request(n, 5, 0, generating=True) for n in range(n_replies)]
    active.append(request(n_replies, 900, 0, generating=False))
    shares = []
    for _ in range(40):
        tick = composer.compose(active, pace)
        count = tick.n_tokens - tick.n_replies
        seconds = (0.03 + count * 0.0003) * slower
        shares.append(count * 0.0003 * slower / seconds)
        pace.note(count, n_replies, seconds)
    assert min(shares[-10:]) > 0.13


@given(slower=st.floats(1, 12))
def test_a_prompt_that_has_become_slower_alone_does_not_halt_replies(slower: float) -> None:
    """Behind many tokens each further one takes longer; replies still come in time."""
    composer = TickComposer(512, None, 100)
    pace = Pace()
    pace.note(0, 3, 0.027)
    pace.note(64, 0, 0.192)
    active = [request(n, 5, 0, generating=True) for n in range(3)]
    active.append(request(3, 900, 0, generating=False))
    steps = []
    for _ in range(40):
        tick = composer.compose(active, pace)
        count = tick.n_tokens - tick.n_replies
        steps.append(0.027 + count * 0.003 * slower)
        pace.note(count, 3, steps[-1])
    assert max(steps[-10:]) <= max(0.1 + 2 * 0.027, 0.027 + 4 * 0.003 * slower)

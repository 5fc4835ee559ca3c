"""Where snapshots are taken, and which of them are kept."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from erllama_core.cache.thinning import KEPT_ENDS, Held, superfluous
from erllama_core.model.snapshots import opening, positions, widened

LIMIT = 5000
SPOTS = st.lists(st.integers(0, LIMIT), max_size=30, unique=True).map(sorted)


@given(st.integers(0, LIMIT), st.integers(0, LIMIT), st.integers(0, 600), SPOTS, SPOTS)
def test_what_is_wanted_is_taken_and_the_rest_keeps_its_distance(
    start: int, limit: int, interval: int, wanted: list[int], offered: list[int]
) -> None:
    """Positions ascend within the prompt; those that nothing speaks for are far from others."""
    least = 64
    found = positions(
        start=start, limit=limit, interval=interval, least=least, wanted=wanted, offered=offered
    )
    assert found == sorted(set(found))
    assert all(start < at <= limit for at in found)
    must = {at for at in wanted if max(start, least - 1) < at <= limit}
    assert must <= set(found)
    if not interval:
        assert set(found) == must
    near = interval // 4
    for before, at, after in zip([start, *found], found, [*found[1:], limit + 1], strict=False):
        if at not in must:
            assert at - before == interval or at in offered
            assert at - before > min(interval - near - 1, max(least, before) - 1)
            assert after - at >= (near if before >= interval else (at - before) // 16)
            assert after - at > 0


@given(st.integers(64, 600), SPOTS, SPOTS, st.integers(0, LIMIT))
def test_a_long_prompt_is_never_without(
    interval: int, wanted: list[int], offered: list[int], start: int
) -> None:
    """Between two snapshots of a prompt there is never much more than the interval."""
    found = positions(
        start=start, limit=LIMIT, interval=interval, least=1, wanted=wanted, offered=offered
    )
    for before, at in pairwise([start, *found, LIMIT]):
        assert at - before <= interval + interval // 4


def test_slices_of_a_plain_text_end_where_they_did() -> None:
    """Where nothing is offered, snapshots cost no slice that would not have ended there."""
    found = positions(start=0, limit=4999, interval=512, least=64, wanted=[], offered=[])
    assert found == list(range(512, 4700, 512))


def test_prompts_that_begin_alike_share_positions() -> None:
    """What follows a common beginning does not change where snapshots of it are taken."""
    common = [100, 490, 500, 1500, 1900]
    one, two = (
        positions(start=0, limit=limit, interval=512, least=64, wanted=[limit], offered=offered)
        for limit, offered in ((2600, [*common, 2590]), (4000, [*common, 2200, 3990]))
    )
    assert one[:4] == two[:4] == [100, 490, 1002, 1500]
    assert 100 in one, "the end of a system prompt"


@given(
    st.integers(1, 4096), st.integers(1, 1 << 28), st.integers(1, 1 << 20), st.integers(0, 1 << 32)
)
def test_large_states_are_taken_seldom(
    interval: int, size: int, n_ctx: int, bytes_max: int
) -> None:
    """Regular snapshots of the longest context fit into half of the bytes, or there are none."""
    wide = widened(interval, size, n_ctx=n_ctx, bytes_max=bytes_max)
    assert wide % interval == 0
    assert n_ctx // wide * size <= bytes_max // 2 or wide >= n_ctx


def test_where_the_reply_is_opened() -> None:
    """As the prompt says, or else before a last control token that stands near its end."""
    assert opening(500, 7, [100, 101, 480, 481]) == 493
    assert opening(500, 0, [100, 101, 480, 481]) == 480
    assert opening(500, 0, [100, 101]) is None
    assert opening(500, 0, [1]) is None
    assert opening(500, 0, []) is None


HELD = st.lists(
    st.builds(
        Held,
        position=st.integers(1, 1000),
        size_bytes=st.integers(1, 100),
        hits=st.integers(0, 50),
        may_go=st.booleans(),
    ),
    max_size=25,
    unique_by=lambda held: held.position,
).map(lambda held: sorted(held, key=lambda item: item.position))


@given(HELD, st.integers(0, 3000))
def test_what_is_kept_fits(held: list[Held], most: int) -> None:
    """What is removed may go and has to; what is left fits, if anything else could have gone."""
    gone = superfluous(held, 1000, most)
    assert len(set(gone)) == len(gone)
    ends = range(max(0, len(held) - KEPT_ENDS), len(held))
    assert all(held[number].may_go and number not in ends for number in gone)
    total = sum(item.size_bytes for item in held)
    removed = [held[number].size_bytes for number in gone]
    left = total - sum(removed)
    could = [n for n in range(len(held)) if held[n].may_go and n not in ends and n not in gone]
    assert left <= most or not could
    assert not gone or left + removed[-1] > most


def test_the_middle_is_thinned_first() -> None:
    """Both ends keep theirs, and so does what was used often."""
    held = [Held(at, 1, 40 if at == 1300 else 0, may_go=True) for at in range(100, 3100, 100)]
    gone = set(superfluous(held, 3000, 12))
    left = [item.position for number, item in enumerate(held) if number not in gone]
    assert len(left) == 12
    assert {100, 2800, 2900, 3000, 1300} <= set(left)
    gaps = [b - a for a, b in pairwise(left)]
    assert max(gaps) not in gaps[:1] + gaps[-4:]

"""The books of a pool of cells, against a pool in which each cell is written down."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from erllama_core.model.cells import CellLedger

SEQUENCES = st.integers(0, 3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), SEQUENCES, st.integers(0, 9)),
        st.tuples(st.just("cut"), SEQUENCES, st.integers(0, 30)),
        st.tuples(st.just("drop"), SEQUENCES, st.just(0)),
        st.tuples(st.just("share"), SEQUENCES, st.integers(0, 30)),
    ),
    max_size=40,
)


@given(STEPS, st.data())
def test_shared_cells_are_counted_once(
    steps: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    """Used and exclusive cells are those of a pool that knows the holders of every cell."""
    ledger = CellLedger(1000)
    cells: dict[int, list[int]] = {seq: [] for seq in range(4)}
    fresh = 0
    for what, seq, number in steps:
        if what == "grow":
            ledger.grow(seq, number)
            cells[seq] += range(fresh, fresh + number)
            fresh += number
        elif what == "cut":
            length = min(number, len(cells[seq]))
            ledger.cut(seq, length)
            del cells[seq][length:]
        elif what == "drop":
            ledger.drop(seq)
            cells[seq] = []
        else:
            target = data.draw(SEQUENCES)
            if target != seq and not cells[target]:
                length = min(number, len(cells[seq]))
                ledger.share(seq, target, length)
                cells[target] = cells[seq][:length]
        assert ledger.used == len(set().union(*map(set, cells.values())))
        assert ledger.free == 1000 - ledger.used
        for one, held in cells.items():
            others = set().union(*(set(c) for other, c in cells.items() if other != one))
            assert ledger.exclusive({one}) == len(set(held) - others)


def test_cells_of_their_own_are_not_booked() -> None:
    """Where sequences cannot take cells from each other there is always room."""
    ledger = CellLedger(None)
    ledger.grow(0, 10**9)
    ledger.share(0, 1, 10**9)
    assert not ledger.is_pooled
    assert ledger.free > 10**12
    assert ledger.exclusive({0}) == 0

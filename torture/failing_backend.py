"""A backend whose steps, exports and imports fail, and whose steps hang."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Final

from erllama_core.errors import DecodeFailed, DecodeTimeout
from stub_engine import KV_CLASSES, load_stub, make_engine
from torture.callers import Caller, Mix, answers_of, check_at_rest, join_callers
from torture.fault import Setup
from torture.random_faults import RandomFaults, failing
from torture.store import check_whole
from torture.tally import Tally

CALLERS: Final = 4
REQUESTS: Final = 80
BUDGET_MS: Final = 150
_MIX: Final = Mix(explained=(DecodeFailed, DecodeTimeout))


class FailingBackend:
    """The fault."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def round(self, chance: random.Random, folder: Path) -> Tally:
        """Serve while calls fail, then with all well again, on what was stored meanwhile."""
        kv_class = chance.choice(KV_CLASSES)
        answers_of(kv_class)  # learnt before anything fails
        tally = Tally()
        root = folder / "root"
        own = random.Random(chance.random())
        # A step that hangs holds everybody up for its budget: now and then, so that it ends.
        hangs_one_in = chance.choice([40, 400])
        faults = RandomFaults(
            own,
            chance.choice([5, 50, 500]),
            lambda _: own.randrange(hangs_one_in) == 0 and len(faults.hung) < 6,
            deaf=chance.random() < 0.5,
        )
        tiers = [{"name": "ram", "kind": "ram", "quota_bytes": 100_000}]
        tiers += [{"name": "disk", "kind": "disk", "root": str(root)}]
        gates: list[Any] = []
        with make_engine(tiers=tiers) as engine:
            try:
                with failing(faults):
                    model = load_stub(
                        engine,
                        tier=["ram", "disk"],
                        kv_class=kv_class,
                        max_block_tokens=chance.choice([None, 16]),
                        context_opts={
                            "n_ctx": chance.choice([300, 600, 2000]),
                            "n_seq_max": 8,
                            "kv_unified": chance.random() < 0.7,
                            "decode_budget_ms": BUDGET_MS,
                            "resident_cells_max": chance.choice([0, 300]),
                        },
                        policy={"prefill_chunk_size": 64},
                    )
                    gates.append(model._backend.gate)  # type: ignore[attr-defined]  # noqa: SLF001
                    callers = self._callers(model, kv_class, tally, chance, REQUESTS)
                    for caller in callers:
                        caller.start()
                    join_callers(callers, tally)
                tally.note("calls that failed", faults.failed)
                tally.note("steps that hung", len(faults.hung))
                tally.note("restores refused", engine.cache.counters().state_rejected)
                calm = self._callers(model, kv_class, tally, chance, 20)
                for caller in calm:
                    caller.start()
                if join_callers(calm, tally):
                    tally.check("the engine came to no rest", holds=engine.flush(60))
                    check_at_rest(model, tally)
                tally.note("preemptions", model.info().preemptions)
            finally:
                for gate in gates:
                    gate.open()
        check_whole(root, tally)
        return tally

    def _callers(
        self, model: Any, kv_class: str, tally: Tally, chance: random.Random, count: int
    ) -> list[Caller]:
        return [
            Caller(
                model,
                answers_of(kv_class),
                tally,
                seed=f"{chance.random()} {number}",
                count=self._setup.times(count),
                streams=4,
                mix=_MIX,
            )
            for number in range(CALLERS)
        ]

    def close(self) -> None:
        """Nothing is kept."""


def open_fault(setup: Setup) -> FailingBackend:
    """See ``Known.module``."""
    return FailingBackend(setup)

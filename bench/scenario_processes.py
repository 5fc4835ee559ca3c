"""Processes that answer prompts with one beginning, with a disk root for all or for each."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Final, Literal

import attrs
from figure import Figure
from report import Section
from scenario_sizes import Sizes
from serving_load import Prompts

from erllama_core import Engine, Model, load_config
from erllama_core.cli.logs import configure_logs

_READY_S = 120.0
Start = Literal["together", "after the first"]
STARTS: Final[tuple[Start, ...]] = ("together", "after the first")


@attrs.frozen(kw_only=True)
class _Setup:
    path: Path
    root: Path
    """A folder; ``shared`` says whether processes have it together or a part of it each."""
    shared: bool
    start: Start
    sizes: Sizes


@attrs.frozen
class _Outcome:
    computed_tokens: int
    """Of prompts; tokens of replies are not counted."""
    began: float
    ended: float
    """By ``time.monotonic``, which all processes of a machine share."""


class _Signals:
    """What processes tell one another, handed over when they start."""

    ready: Barrier
    first_answered: Event


def measure(sizes: Sizes, path: Path) -> Section:
    """All at once, and the others once the first has answered one prompt.

    Each has one thread of the machine. A process looks for what others stored when a request
    arrives: who arrives while another computes the same beginning computes it as well.
    """
    cases = [(shared, start) for start in STARTS for shared in (False, True)]
    tokens: dict[tuple[bool, str], list[float]] = {case: [] for case in cases}
    seconds: dict[tuple[bool, str], list[float]] = {case: [] for case in cases}
    for number in range(sizes.process_runs):
        for shared, start in cases if number % 2 else reversed(cases):
            outcomes = _run(sizes, path, shared=shared, start=start)
            tokens[shared, start].append(sum(one.computed_tokens for one in outcomes))
            begin, end = min(o.began for o in outcomes), max(o.ended for o in outcomes)
            seconds[shared, start].append(end - begin)
    figures = []
    for start in STARTS:
        own, one = (False, start), (True, start)
        ratios = [a / b for a, b in zip(seconds[own], seconds[one], strict=True)]
        figures += [
            Figure.of_runs(
                f"{sizes.processes} processes, {start}: tokens computed, one root",
                tokens[one],
                digits=0,
            ),
            Figure.of_runs("    roots of their own", tokens[own], digits=0),
            Figure.of_runs("    all answered, one root", seconds[one], unit="s", digits=1),
            Figure.of_runs(
                "    all answered, roots of their own", seconds[own], unit="s", digits=1
            ),
            Figure.of_runs("    sooner by", ratios, unit="times", digits=2),
        ]
    return Section(
        name="processes", title="Processes that share one disk root", figures=tuple(figures)
    )


def _run(sizes: Sizes, path: Path, *, shared: bool, start: Start) -> list[_Outcome]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as root:
        setup = _Setup(path=path, root=Path(root), shared=shared, start=start, sizes=sizes)
        with ProcessPoolExecutor(
            sizes.processes,
            mp_context=context,
            initializer=_hand_over,
            initargs=(context.Barrier(sizes.processes), context.Event()),
        ) as pool:
            # Each waits for all others at the barrier, so none takes two of them.
            return list(pool.map(_serve, [setup] * sizes.processes, range(sizes.processes)))


def _hand_over(ready: Barrier, first_answered: Event) -> None:
    _Signals.ready, _Signals.first_answered = ready, first_answered


def _serve(setup: _Setup, number: int) -> _Outcome:
    """What one process does: wait for the others, then answer its prompts."""
    configure_logs()
    sizes = setup.sizes
    root = setup.root / ("shared" if setup.shared else str(number))
    disk = {"name": "disk", "kind": "disk", "root": str(root)}
    with Engine(load_config({"tiers": [disk]}, environ={})) as engine:
        model = engine.load_model(
            "bench",
            backend="llama",
            model_path=str(setup.path),
            tier=["ram", "disk"],
            context_opts={
                "n_ctx": sizes.shared_tokens + sizes.own_tokens + sizes.reply_tokens + 64,
                "n_threads": 1,
            },
        )
        asks = _asks(sizes, model, number)
        engine.cache.wait_scanned()
        _Signals.ready.wait(_READY_S)
        if number and setup.start == "after the first":
            _Signals.first_answered.wait(_READY_S)
        began = time.monotonic()
        computed = 0
        for ask in asks:
            stats = model.complete(ask, response_tokens=sizes.reply_tokens).stats
            computed += stats.prompt_tokens - stats.cache_delta.read
            if not number and not _Signals.first_answered.is_set():
                engine.flush()  # what it has computed is there for others
                _Signals.first_answered.set()
        return _Outcome(computed, began, time.monotonic())


def _asks(sizes: Sizes, model: Model, number: int) -> Sequence[tuple[int, ...]]:
    prompts = Prompts(model.tokenize)
    shared = prompts.ledger(0, sizes.shared_tokens)
    first = number * sizes.asks
    return [shared + prompts.tail(first + n, sizes.own_tokens) for n in range(sizes.asks)]

"""Restoring a prompt against computing it: where a cache wins, where it loses, what the gate says.

Three tiers: RAM, disk with a warm page cache, and a disk whose reads are slowed down to what a
network share or a busy hard disk takes. Two models: the demo's, and a tiny one that computes a
prompt in next to no time.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
from figure import Figure
from report import Section
from scenario_sizes import Sizes
from series import Axis, Plot, Series
from serving_load import Prompts

from erllama_core import Engine, Model, load_config
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import Allocate, Tier
from erllama_core.providers import TierProvider
from erllama_tier_disk.options import DiskOptions
from erllama_tier_disk.store import FileTier

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_gguf import write_tiny_gguf

TIERS: Final = {"ram": "RAM", "disk": "disk", "slow": "slow disk"}
SLOW_S: Final = 0.01
SLOW_S_PER_BYTE: Final = 1e-8
"""10 ms a read, and 100 MB/s."""
TAIL_TOKENS: Final = 8
"""Of a question behind what is stored: with nothing to compute, the gate has no say."""
_PREPARED_TOKENS: Final = 256
_WARM_UP_TOKENS: Final = 1024
"""Longer prompts are not asked in the run that does not count."""


class SlowTier(FileTier):
    """Files whose reads take longer."""

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        found = super().read(object_id, allocate)
        time.sleep(SLOW_S + SLOW_S_PER_BYTE * len(found))
        return found


class _Plugin:
    @hookimpl
    def erllama_tiers(self) -> Sequence[TierProvider]:
        return [TierProvider("slow", "Slow files.", _open_slow, config=DiskOptions)]


def _open_slow(options: DiskOptions) -> Tier:
    return SlowTier(options.root)


@attrs.define
class _Times:
    """Seconds to the first token, a run each, and what the gate left alone in the last run."""

    computed: list[float] = attrs.field(factory=list)
    unsaved: list[float] = attrs.field(factory=list)
    """Computed in a model without a cache; of the tiny model alone, the other takes its time."""
    restored: dict[str, list[float]] = attrs.field(factory=lambda: {tier: [] for tier in TIERS})
    gated: dict[str, list[float]] = attrs.field(factory=lambda: {tier: [] for tier in TIERS})
    withheld: dict[str, int] = attrs.field(factory=dict)


def measure(sizes: Sizes, path: Path, which: str) -> Section:
    """For ``which`` model, ``demo`` or ``tiny``: every length, from every tier."""
    with contextlib.ExitStack() as stack:
        if which == "tiny":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="erllama-bench-"))
            path = write_tiny_gguf(Path(folder) / "tiny.gguf", says="text")
        times = _measure(sizes, path, which)
    return Section(
        name=f"recompute-{which}",
        title=f"Restoring against computing, {which} model",
        figures=tuple(figure for length, of in times.items() for figure in _figures(length, of)),
        plots=(_plot(which, times),),
    )


def _measure(sizes: Sizes, path: Path, which: str) -> dict[int, _Times]:
    times = {length: _Times() for length in sizes.lengths}
    n_ctx = max(*sizes.lengths, _PREPARED_TOKENS) + TAIL_TOKENS + 64
    with _models(path, n_ctx, unsaved=which == "tiny") as (engine, models):
        prompts = Prompts(models["all"].tokenize)
        # What computing takes is to be known to the gates, as it is in a service.
        for number in range(9):
            model = models[f"{list(TIERS)[number % 3]} gated"]
            model.complete(prompts.ledger(number, _PREPARED_TOKENS), response_tokens=1)
        for number in range(sizes.recompute_runs + 1):
            for place, (length, of) in enumerate(times.items()):
                if number or length <= _WARM_UP_TOKENS:
                    engine.cache.flush()
                    engine.cache.gc()
                    stored = prompts.ledger(10 + place + 10 * number, length - TAIL_TOKENS)
                    _round(engine, models, prompts, stored, of if number else _Times())
    return times


def _round(
    engine: Engine,
    models: dict[str, Model],
    prompts: Prompts,
    stored: tuple[int, ...],
    times: _Times,
) -> None:
    """Compute a prompt, store it everywhere, and ask others that begin with it."""

    def ask(name: str, number: int) -> float:
        tokens = stored + prompts.tail(number, TAIL_TOKENS)
        stats = models[name].complete(tokens, response_tokens=1, explain=True).stats
        engine.flush()
        tier = name.partition(" ")[0]
        explained = stats.explain
        assert explained is not None
        if name.endswith("gated") and explained.gate is not None:
            times.withheld[tier] = explained.gate.withheld_tokens
        return stats.first_token_s or 0.0

    times.computed.append(ask("all", 0))
    if "none" in models:
        times.unsaved.append(ask("none", 0))
    for number, tier in enumerate(TIERS):
        times.restored[tier].append(ask(tier, 1 + 2 * number))
        times.gated[tier].append(ask(f"{tier} gated", 2 + 2 * number))


@contextlib.contextmanager
def _models(path: Path, n_ctx: int, *, unsaved: bool) -> Iterator[tuple[Engine, dict[str, Model]]]:
    """One that saves to all tiers, one without any, and two that read from each of them."""
    host = PluginHost()
    host.register(_Plugin())
    with tempfile.TemporaryDirectory(prefix="erllama-bench-") as folder:
        tiers = [
            {"name": name, "kind": name, "root": str(Path(folder) / name)}
            for name in ("disk", "slow")
        ]
        config = load_config({"tiers": tiers}, environ={})
        with Engine(config, plugins=host) as engine:

            def load(name: str, tier: list[str], gate: str) -> Model:
                return engine.load_model(
                    name,
                    backend="llama",
                    model_path=str(path),
                    tier=tier,
                    policy={"cost_gate": gate},
                    context_opts={"n_ctx": n_ctx, "resident_cells_max": 0},
                )

            models = {"all": load("all", list(TIERS), "off")}
            if unsaved:
                models["none"] = load("none", [], "off")
            for tier in TIERS:
                models[tier] = load(tier, [tier], "off")
                models[f"{tier} gated"] = load(f"{tier} gated", [tier], "auto")
            yield engine, models


def _figures(length: int, times: _Times) -> list[Figure]:
    figures = [_ms(f"{length:,} tokens: computed", times.computed)]
    if times.unsaved:
        figures.append(_ms("    computed, nothing saved", times.unsaved))
    for tier, words in TIERS.items():
        restored, gated = times.restored[tier], times.gated[tier]
        ratios = [a / b for a, b in zip(times.computed, restored, strict=True)]
        better = min(statistics.median(restored), statistics.median(times.computed))
        figures += [
            _ms(f"    restored from {words}", restored),
            Figure.of_runs(
                f"        {words}: sooner than computed by", ratios, unit="times", digits=2
            ),
            Figure(
                name=f"        {words}: tokens that the gate had computed instead",
                measured=times.withheld.get(tier, 0),
                digits=0,
            ),
            _ms(f"        {words}: with the gate", gated),
            Figure.of_runs(
                f"        {words}: with the gate, against the better of both",
                [one / better for one in gated],
                digits=2,
            ),
        ]
    return figures


def _plot(which: str, times: dict[int, _Times]) -> Plot:
    curves = [Series.of_runs("computed", [(n, _in_ms(of.computed)) for n, of in times.items()])]
    for tier, words in TIERS.items():
        runs = [(n, _in_ms(of.restored[tier])) for n, of in times.items()]
        curves.append(Series.of_runs(f"from {words}", runs))
    return Plot(
        name=f"restore_against_recompute_{which}",
        title=f"Restoring against computing, {which} model",
        x=Axis("prompt length", "tokens", "log"),
        y=Axis("first token", "ms", "log"),
        series=tuple(curves),
    )


def _in_ms(seconds: Sequence[float]) -> list[float]:
    return [1000 * one for one in seconds]


def _ms(name: str, seconds: Sequence[float]) -> Figure:
    return Figure.of_runs(name, _in_ms(seconds), unit="ms", digits=1)

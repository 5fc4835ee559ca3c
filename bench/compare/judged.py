"""Figures, plots and sections of single measurements, beside the targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from figure import Figure
from report import Section
from series import Axis, Plot, Series

from compare import one_request, talks
from compare.contestants import BARE, KINDS, OWN
from compare.one_request import FLOOR
from compare.samples import Sample, Samples, ratios, seconds

OF_PEERS: Final[Mapping[tuple[str, int, str], float]] = {
    ("exact", 2048, "llama-server"): 0.5,
    ("exact", 2048, "LlamaRAMCache"): 1 / 20,
    ("exact", 2048, "LlamaDiskCache"): 1 / 8,
    ("returned", 2048, "LlamaRAMCache"): 1 / 20,
    ("returned", 2048, "LlamaDiskCache"): 1 / 8,
}
"""The most of a peer's time that ours may take; scenario, tokens, peer. Targets for Llama's caches
hold twice: asked at once again, it has the prompt in its context and needs no cache; what they
restore is seen when another prompt came between."""
SOONER_THAN_COLD: Final = 200.0
OF_THE_FLOOR: Final = 3.0
COMPUTED_OF_NEW: Final = 1.05


def sections(samples: Samples) -> list[Section]:
    """One for each scenario that was measured."""
    return [*_of_requests(samples), *_of_talks(samples)]


def _notes(samples: Samples) -> tuple[str, ...]:
    return tuple(f"{who} was not measured: {why}" for who, why in sorted(samples.absent.items()))


# ------------------------------------------------------------------ one request


def _of_requests(samples: Samples) -> Iterator[Section]:
    for scenario, title in one_request.TITLES.items():
        sizes = samples.sizes(scenario)
        if not sizes:
            continue
        figures = [one for size in sizes for one in _of_size(samples, scenario, size)]
        yield Section(
            name=scenario,
            title=title,
            figures=tuple(figures),
            plots=(_plot(samples, scenario, title),),
            notes=_notes(samples),
        )


def _of_size(samples: Samples, scenario: str, size: int) -> Iterator[Figure]:
    ours = samples.runs(scenario, size, OWN)
    if ours:
        yield _first_tokens(f"{size:,} tokens", ours)
        yield Figure.of_runs(
            f"    tokens computed, of {next(iter(ours.values())).new_tokens} new",
            [one.computed_tokens for one in ours.values()],
            digits=0,
        )
    for who in KINDS:
        theirs = samples.runs(scenario, size, who)
        if who == OWN or not theirs:
            continue
        yield _first_tokens(f"    {who}", theirs)
        if ours.keys() & theirs.keys():
            target = OF_PEERS.get((scenario, size, who))
            yield Figure.of_runs(f"    of {who}'s", ratios(ours, theirs), target=target)
    if scenario == "restart" and ours:
        yield from _of_restart(samples, size, ours)


def _of_restart(samples: Samples, size: int, ours: dict[int, Sample]) -> Iterator[Figure]:
    cold = samples.runs("cold", size, OWN)
    if ours.keys() & cold.keys():
        yield Figure.of_runs(
            "    sooner than cold by",
            ratios(cold, ours),
            unit="times",
            target=SOONER_THAN_COLD,
            bound="at least",
            digits=0,
        )
    floors: dict[int, list[float]] = {}
    for one in samples.samples:
        if (one.scenario, one.size) == (FLOOR, size):
            floors.setdefault(one.round, []).append(one.first_token_s)
    least = {number: statistics.median(runs) for number, runs in floors.items()}
    both = sorted(ours.keys() & least.keys())
    if both:
        yield Figure.of_runs(
            "    the floor: bytes read, checked, copied, and one draw",
            [1000 * least[number] for number in both],
            unit="ms",
            digits=1,
        )
        yield Figure.of_runs(
            "    of the floor",
            [ours[number].first_token_s / least[number] for number in both],
            unit="times",
            target=OF_THE_FLOOR,
            digits=2,
        )


def _first_tokens(name: str, runs: dict[int, Sample]) -> Figure:
    return Figure.of_runs(name, [1000 * one for one in seconds(runs)], unit="ms", digits=1)


def _plot(samples: Samples, scenario: str, title: str) -> Plot:
    curves = []
    for who in KINDS:
        points = [
            (size, [1000 * one for one in seconds(runs)])
            for size in samples.sizes(scenario)
            if (runs := samples.runs(scenario, size, who))
        ]
        if points:
            curves.append(Series.of_runs(who, points))
    return Plot(
        name=f"first_token_{scenario}",
        title=title,
        x=Axis("prompt", "tokens", "log"),
        y=Axis("time to first token", "ms", "log"),
        series=tuple(curves),
    )


# ---------------------------------------------------------------- conversations


def _of_talks(samples: Samples) -> Iterator[Section]:
    for scenario, title in talks.TITLES.items():
        steps = samples.sizes(scenario)
        if not steps:
            continue
        figures = [*_computed(samples, scenario), *_waited(samples, scenario, steps)]
        yield Section(name=scenario, title=title, figures=tuple(figures), notes=_notes(samples))


def _computed(samples: Samples, scenario: str) -> Iterator[Figure]:
    for who in KINDS:
        computed: dict[int, int] = {}
        new: dict[int, int] = {}
        for one in samples.samples:
            if (one.scenario, one.who) == (scenario, who):
                computed[one.round] = computed.get(one.round, 0) + one.computed_tokens
                new[one.round] = new.get(one.round, 0) + one.new_tokens
        if computed:
            ours = who == OWN
            yield Figure.of_runs(
                "tokens computed over tokens new" if ours else f"    {who}",
                [computed[number] / new[number] for number in sorted(computed)],
                target=COMPUTED_OF_NEW if ours and scenario == talks.CHAT else None,
            )


def _waited(samples: Samples, scenario: str, steps: Sequence[int]) -> Iterator[Figure]:
    """First tokens: of a chat's later turns together, of an agent's steps one by one."""
    if scenario == talks.AGENT:
        for step in steps[1:]:
            yield from _step(samples, scenario, talks.STEPS[step - 1], [step])
    elif len(steps) > 1:
        yield from _step(samples, scenario, f"turns 2 to {steps[-1]}, a turn", steps[1:])


def _step(samples: Samples, scenario: str, name: str, steps: Sequence[int]) -> Iterator[Figure]:
    def means(who: str) -> dict[int, float]:
        runs = [samples.runs(scenario, step, who) for step in steps]
        whole = set.intersection(*(set(one) for one in runs))
        return {n: statistics.fmean(one[n].first_token_s for one in runs) for n in sorted(whole)}

    ours = means(OWN)
    for who in KINDS:
        found = ours if who == OWN else means(who)
        if not found:
            continue
        yield Figure.of_runs(
            f"{name}: first token" if who == OWN else f"    {who}",
            [1000 * one for one in found.values()],
            unit="ms",
            digits=1,
        )
        if who not in (OWN, BARE) and (both := sorted(ours.keys() & found.keys())):
            yield Figure.of_runs(f"    of {who}'s", [ours[n] / found[n] for n in both])

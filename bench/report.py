"""What benchmarks measured, written for people and for programs.

    python bench/report.py RESULTS.json ... [--markdown FILE] [--plots FOLDER] [--json FILE]

Each benchmark writes its sections as JSON, a piece at a time if need be. Here pieces are joined:
figures and curves of one section come together, and what was measured again counts as it was
measured last, by the order of the files. Markdown has a table for each section; plots are SVG,
one file each, and need matplotlib. A Markdown file that is there already, and has the line
``<!-- figures -->``, keeps what is above it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import attrs
import cattrs
from figure import Figure
from series import Plot

MARK: Final = "<!-- figures -->\n"


@attrs.frozen(kw_only=True)
class Section:
    """One scenario's figures and plots. ``name`` is what a command line calls it."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know: the sizes, a peer that was not there."""

    def joined(self, other: Self) -> Self:
        """With all that ``other`` measured; its figures and points count where both have one."""
        figures = _by_place(self.figures) | _by_place(other.figures)
        plots = {one.name: one for one in self.plots}
        for one in other.plots:
            plots[one.name] = plots[one.name].joined(one) if one.name in plots else one
        return attrs.evolve(
            other,
            figures=tuple(figures.values()),
            plots=tuple(plots.values()),
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )


def _by_place(figures: Iterable[Figure]) -> dict[tuple[str, str], Figure]:
    """Figures that stand below another one, indented, have its name as well."""
    places: dict[tuple[str, str], Figure] = {}
    above = ""
    for figure in figures:
        if not figure.name.startswith(" "):
            above = figure.name
        places[above, figure.name] = figure
    return places


def joined(sections: Iterable[Section]) -> list[Section]:
    """One section of each name, in the order in which the names first came."""
    found: dict[str, Section] = {}
    for section in sections:
        known = found.get(section.name)
        found[section.name] = section if known is None else known.joined(section)
    return list(found.values())


def show(section: Section) -> None:
    """Print what was measured, a figure a line."""
    for figure in section.figures:
        print(figure)
    for note in section.notes:
        print(f"  {note}")
    sys.stdout.flush()


def run(
    names: Iterable[str], measure: Callable[[str], Section], json_path: Path | None, *, quick: bool
) -> int:
    """Measure sections one after another, print them, write what there is after each.

    The exit code: 1 when a target was missed, but not of quick runs, which measure nothing.
    """
    done: list[Section] = []
    for name in names:
        began = time.perf_counter()
        done.append(measure(name))
        print(f"{name} ({time.perf_counter() - began:.0f} s)")
        show(done[-1])
        if json_path is not None:
            write_json(json_path, done)
    missed = sum(not figure.is_met for section in done for figure in section.figures)
    print(f"{missed} targets missed" if missed else "all targets reached")
    return 1 if missed and not quick else 0


# ---------------------------------------------------------------------- JSON


def write_json(path: Path, sections: Iterable[Section]) -> None:
    """Write what ``read_json`` reads; each figure also says whether it ``is_met``."""
    plain = [attrs.asdict(section) for section in sections]
    for section in plain:
        section["figures"] = [{**one, "is_met": Figure(**one).is_met} for one in section["figures"]]
    path.write_text(json.dumps({"sections": plain}, indent=2) + "\n", "utf-8")


def read_json(path: Path) -> list[Section]:
    """What a benchmark wrote. Raises ValueError, naming the file."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        return cattrs.structure(content["sections"], list[Section])
    except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
        raise ValueError(f"{path} is not what a benchmark writes: {error!r}") from error


# ------------------------------------------------------------------ Markdown


def markdown(sections: Iterable[Section], *, level: int = 2) -> str:
    """A table for each section that has figures, below a heading of that level."""
    parts = []
    for section in sections:
        parts.append(f"{'#' * level} {section.title}\n")
        if section.figures:
            rows = [_row(figure) for figure in section.figures]
            parts.append(table(("figure", "measured", "spread", "target", "verdict"), rows))
        parts += [f"{note}\n" for note in section.notes]
    return "\n".join(parts)


def write_markdown(path: Path, sections: Iterable[Section]) -> None:
    """Write the tables to a file; below the mark, where it is there and has one."""
    above, mark, _ = (path.read_text("utf-8") if path.exists() else "").partition(MARK)
    path.write_text((above + mark + "\n" if mark else "") + markdown(sections), "utf-8")


def _row(figure: Figure) -> tuple[str, ...]:
    name = figure.name.lstrip()
    spread = target = verdict = ""
    if figure.spread is not None:
        spread = " to ".join(f"{value:,.{figure.digits}f}" for value in figure.spread)
    if figure.target is not None:
        target = f"{figure.bound} {figure.target:,.{figure.digits}f}"
        verdict = "reached" if figure.is_met else "**missed**"
    return (
        name if name == figure.name else f"&emsp;{name}",
        f"{figure.measured:,.{figure.digits}f} {figure.unit}".rstrip(),
        spread,
        target,
        verdict,
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells hold any text of one line."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


# ---------------------------------------------------------------------- plots


def write_plots(folder: Path, sections: Iterable[Section]) -> list[Path]:
    """One SVG for each plot. Raises ModuleNotFoundError without matplotlib."""
    from drawing import draw

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in _plots(sections):
        path = folder / f"{plot.name}.svg"
        path.write_text(draw(plot), "utf-8")
        written.append(path)
    return written


def _plots(sections: Iterable[Section]) -> list[Plot]:
    """Sections may add curves to one plot."""
    found: dict[str, Plot] = {}
    for section in sections:
        for plot in section.plots:
            found[plot.name] = found[plot.name].joined(plot) if plot.name in found else plot
    return list(found.values())


def main() -> int:
    """Join what was measured, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON that benchmarks wrote")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--plots", type=Path, help="write the plots to this folder")
    parser.add_argument("--json", type=Path, help="write the joined results to this file")
    arguments = parser.parse_args()
    sections = joined(section for path in arguments.results for section in read_json(path))
    if arguments.markdown is not None:
        write_markdown(arguments.markdown, sections)
    if arguments.json is not None:
        write_json(arguments.json, sections)
    if arguments.plots is not None:
        write_plots(arguments.plots, sections)
    if arguments.markdown is None and arguments.json is None and arguments.plots is None:
        for section in sections:
            print(section.title)
            show(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())

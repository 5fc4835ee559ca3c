"""What benchmarks measured comes out as it went in: as JSON, as tables, and drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import attrs
import pytest
from drawing import CURVES, INK, draw
from figure import Figure
from report import (
    MARK,
    Section,
    joined,
    markdown,
    read_json,
    run,
    write_json,
    write_markdown,
    write_plots,
)
from series import Axis, Plot, Series

SCRIPT = Path(__file__).parents[1] / "bench" / "report.py"

MET = Figure.of_runs("ratio", [0.5, 0.4, 0.7], target=0.6, digits=2)
MISSED = Figure(name="    of | it", measured=1234.5, unit="ms", target=1300, bound="at least")
CONTEXT = Figure(name="    alone", measured=7, digits=0)


def plot(*curves: Series, name: str = "curve") -> Plot:
    return Plot(
        name=name,
        title="A curve",
        x=Axis("length", "tokens", "log"),
        y=Axis("time", "ms"),
        series=curves,
    )


CURVE = Series.of_runs("erllama", [(512, [2.0, 1.0, 3.0]), (64, [1.0, 1.0, 1.5])])
SECTION = Section(
    name="s", title="Some", figures=(MET, MISSED, CONTEXT), plots=(plot(CURVE),), notes=("A note.",)
)


def test_points_are_medians_in_order_with_their_spread() -> None:
    """A curve of runs has each point's median between its least and its most."""
    assert (CURVE.x, CURVE.y) == ((64, 512), (1.0, 2.0))
    assert (CURVE.least, CURVE.most) == ((1.0, 1.0), (1.5, 3.0))
    with pytest.raises(ValueError, match="'a' has parts of unequal lengths"):
        Series(who="a", x=(1, 2), y=(1,))
    with pytest.raises(ValueError, match="one end of its spread"):
        Series(who="a", x=(1,), y=(1,), least=(1,))


def test_json_gives_back_what_was_measured(tmp_path: Path) -> None:
    """Sections come back equal, and each figure says whether its target was reached."""
    path = tmp_path / "results.json"
    write_json(path, [SECTION])
    assert read_json(path) == [SECTION]
    [plain] = json.loads(path.read_text())["sections"]
    assert [figure["is_met"] for figure in plain["figures"]] == [True, False, True]
    path.write_text('{"sections": [{"name": 1}]}')
    with pytest.raises(ValueError, match=r"results\.json is not what a benchmark writes"):
        read_json(path)


def test_a_table_names_target_and_verdict() -> None:
    """Each figure is a row with its spread, its target and whether that was reached."""
    lines = markdown([SECTION]).splitlines()
    assert lines[0] == "## Some"
    assert lines[4:7] == [
        "| ratio | 0.50 | 0.40 to 0.70 | at most 0.60 | reached |",
        r"| &emsp;of \| it | 1,234.500 ms |  | at least 1,300.000 | **missed** |",
        "| &emsp;alone | 7 |  |  |  |",
    ]
    assert lines[-1] == "A note."


def test_what_people_wrote_above_the_tables_stays(tmp_path: Path) -> None:
    """Tables written again replace those below the mark, and nothing else."""
    path = tmp_path / "page.md"
    write_markdown(path, [SECTION])
    assert path.read_text() == markdown([SECTION])
    path.write_text(f"# Figures\n\nMeasured on a Monday.\n\n{MARK}\n| old |\n")
    write_markdown(path, [SECTION])
    above, _, tables = path.read_text().partition(MARK)
    assert above == "# Figures\n\nMeasured on a Monday.\n\n"
    assert tables == "\n" + markdown([SECTION])


def test_pieces_of_one_section_are_joined() -> None:
    """What was measured again counts as measured last; the rest of both stays, in order."""
    again = attrs.evolve(MET, measured=0.3)
    more = Figure(name="another", measured=1)
    below = attrs.evolve(CONTEXT, measured=8)
    later = Series(who="erllama", x=(512, 2048), y=(9, 5), least=(8, 4), most=(9, 6))
    peer = Series(who="peer", x=(64,), y=(3,))
    piece = attrs.evolve(
        SECTION, figures=(again, more, below), plots=(plot(later, peer),), notes=("Two.",)
    )
    [section] = joined([SECTION, piece])
    # "alone" stands below "ratio" in one piece and below "another" in the other: two figures.
    assert list(section.figures) == [again, MISSED, CONTEXT, more, below]
    [drawn] = section.plots
    assert [one.who for one in drawn.series] == ["erllama", "peer"]
    assert list(drawn.series[0].x) == [64, 512, 2048]
    assert list(drawn.series[0].y) == [1.0, 9, 5]
    assert list(drawn.series[0].most or ()) == [1.5, 9, 6]
    assert list(section.notes) == ["A note.", "Two."]


def test_a_run_writes_as_it_goes_and_ends_with_what_was_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A section that fails loses none before it; a missed target is the exit code."""
    path = tmp_path / "results.json"
    assert run(["s"], lambda _: SECTION, path, quick=False) == 1
    assert run(["s"], lambda _: SECTION, path, quick=True) == 0
    assert "1 targets missed" in capsys.readouterr().out
    assert run(["s"], lambda _: Section(name="s", title="S"), None, quick=False) == 0

    def fail_at_t(name: str) -> Section:
        if name == "t":
            raise RuntimeError("not measured")
        return SECTION

    path.unlink()
    with pytest.raises(RuntimeError, match="not measured"):
        run(["s", "t"], fail_at_t, path, quick=False)
    assert read_json(path) == [SECTION]


def luminance(colour: str) -> float:
    """Relative, as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#1e2129", "#0d1117"])
def test_plots_can_be_read_on_light_and_dark_pages(page: str) -> None:
    """Whatever has a colour stands out from white and from the dark of common pages."""
    drawn = draw(plot(*[attrs.evolve(CURVE, who=f"{n}") for n in range(len(CURVES))]))
    colours = set(re.findall("#[0-9a-f]{6}", drawn))
    assert colours == {INK, *(colour for colour, _, _ in CURVES)}
    for colour in colours:
        lighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
        contrast = (lighter + 0.05) / (darker + 0.05)
        assert contrast >= (3.9 if colour == INK else 3), colour


def test_a_plot_is_the_same_file_each_time_and_names_everything(tmp_path: Path) -> None:
    """The SVG is named for its plot, has its words as text, and does not change by itself."""
    other = Section(name="t", title="T", plots=(plot(attrs.evolve(CURVE, who="peer")),))
    [path] = write_plots(tmp_path / "plots", [SECTION, other])
    assert path.name == "curve.svg"
    words = {"".join(node.itertext()).strip() for node in ET.parse(path).iter()}
    assert {"A curve", "length, tokens", "time, ms", "erllama", "peer", "512"} <= words
    before = path.read_bytes()
    assert write_plots(tmp_path / "plots", [SECTION, other]) == [path]
    assert path.read_bytes() == before
    assert len(before) < 60_000


def test_the_command_joins_files(tmp_path: Path) -> None:
    """Results of several runs become one table, one folder of plots and one JSON."""
    write_json(tmp_path / "a.json", [SECTION])
    write_json(tmp_path / "b.json", [Section(name="u", title="Else", figures=(MET,))])
    command = [sys.executable, str(SCRIPT), "a.json", "b.json"]
    out = ["--markdown", "out.md", "--plots", "plots", "--json", "all.json"]
    subprocess.run([*command, *out], cwd=tmp_path, check=True, timeout=60)
    assert "## Some" in (tmp_path / "out.md").read_text()
    assert "## Else" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "plots" / "curve.svg").exists()
    assert [section.name for section in read_json(tmp_path / "all.json")] == ["s", "u"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "at least 1,300.000: MISSED" in shown.stdout

"""Plots as SVG. They have no background, and colours that can be read on white and on black."""

from __future__ import annotations

import io
import itertools
from typing import Any, Final

from series import Axis, Plot, Series

INK: Final = "#797f88"
"""Of text and axes: about as far from white as from the dark of common pages."""
CURVES: Final = (
    ("#2f80ed", "o", "-"),
    ("#d9671e", "s", "--"),
    ("#1f9d61", "^", "-."),
    ("#b05ce0", "D", ":"),
    ("#ad8200", "v", (0, (3, 1, 1, 1, 1, 1))),
    ("#d6497f", "P", (0, (5, 1))),
)
"""Colour, marker and dashes: curves can be told apart without their colours."""

_STYLE: Final[Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 13,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "grid.alpha": 0.3,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: to be read out, searched, and small
    "svg.hashsalt": "erllama",  # the same plot is the same file
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_FONT: Final = "'DejaVu Sans'"
_FONTS: Final = "'DejaVu Sans', Verdana, Arial, sans-serif"


def draw(plot: Plot) -> str:
    """The plot as SVG. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(plot.title, loc="left")
        axes.grid(visible=True)
        for series, look in zip(plot.series, itertools.cycle(CURVES), strict=False):
            _curve(axes, series, look)
        _scale(axes, "x", plot.x, plot.series)
        _scale(axes, "y", plot.y, plot.series)
        if len(plot.series) > 1:
            figure.legend(loc="outside right upper", alignment="left")
        drawn = io.StringIO()
        figure.savefig(
            drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return drawn.getvalue().replace(_FONT, _FONTS)


def _curve(axes: Any, series: Series, look: tuple[str, str, Any]) -> None:
    colour, marker, dashes = look
    axes.plot(
        series.x,
        series.y,
        color=colour,
        marker=marker,
        linestyle=dashes,
        label=series.who,
        markersize=5,
        linewidth=1.8,
    )
    if series.least is not None:
        axes.fill_between(series.x, series.least, series.most, color=colour, alpha=0.2, linewidth=0)


def _scale(axes: Any, which: str, axis: Axis, series: tuple[Series, ...]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    getattr(axes, f"set_{which}label")(str(axis))
    ticks = getattr(axes, f"{which}axis")
    if axis.scale == "log":
        getattr(axes, f"set_{which}scale")("log", base=10)
        ticks.set_minor_formatter(NullFormatter())
    if which == "x":
        values = sorted({x for one in series for x in one.x})
        if 0 < len(values) <= 10:
            ticks.set_ticks(values)  # where something was measured
            ticks.set_ticks([], minor=True)
        elif axis.scale == "linear" and all(float(x).is_integer() for x in values):
            ticks.set_major_locator(MaxNLocator(integer=True))  # there is no half turn
    elif axis.scale == "linear":
        axes.set_ylim(bottom=0)  # a ratio that looks large is large
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))

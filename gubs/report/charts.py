"""Charts for pages, drawn by matplotlib as inline SVG in the page's colours, so that they follow light and dark."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, FAINT, ACCENT = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(1, 7))
_VARIABLES = {INK: "--muted", FAINT: "--line", ACCENT: "--accent"} | {c: f"--c{i}" for i, c in enumerate(SERIES, 1)}
"""Placeholder colours and the page's CSS variables that replace them."""


class Drawing:
    """A chart: draw on `axes`; `svg` is filled when the context ends."""

    def __init__(self, axes: "Axes"):
        self.axes, self.svg = axes, Markup("")


@contextmanager
def drawing(name: str, size: tuple[float, float]) -> Iterator[Drawing]:
    """A chart of the given size in inches; equal charts give equal bytes.

    Labels are not escaped: pass only our own text.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "text.parse_math": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        chart = Drawing(figure.subplots())
        yield chart
        _plain(chart.axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    chart.svg = Markup(svg[svg.index("<svg") :])


def legend_above(axes: "Axes") -> None:
    """Puts the legend above the data."""
    layout: Any = {"loc": "outside upper left", "ncols": 3}
    legend = {"frameon": False, "labelcolor": INK, "fontsize": 9.5, "handlelength": 1.2, "columnspacing": 1.2}
    axes.figure.legend(**legend, **layout)


def whole_ticks(axis: "Axis", most: int) -> None:
    """Puts ticks at whole numbers, at most `most` of them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most))


def _plain(axes: "Axes") -> None:
    """Styles the axes: pale horizontal lines behind the data, no frame, muted labels."""
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[:].set_visible(False)

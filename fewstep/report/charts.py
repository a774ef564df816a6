"""Small line charts: inline SVG whose colours are CSS variables, for a page light or dark; or one plain picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

# Stand-ins that no chart would use by itself; each becomes a CSS variable.
_INK, _RULE = "#010203", "#020304"
_SERIES = tuple(f"#03040{i}" for i in range(1, 9))
_VARIABLES = {_INK: "var(--soft)", _RULE: "var(--rule)"} | {c: f"var(--c{i + 1})" for i, c in enumerate(_SERIES)}
_ON_WHITE = ("#0072b2", "#d55e00", "#009e73", "#a8558a", "#8a6d00", "#44479f", "#1f9bcf", "#6b6f76")
SERIES = len(_SERIES)
"""the most lines a chart can tell apart"""

_RAW_POINTS = 400
_SMOOTH_POINTS = 240
_FEW = 12
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
}


@dataclass(frozen=True)
class Series:
    """One line: `values` (N,) at `steps` (N,)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]

    def finite(self, log: bool) -> tuple[Array, Array]:
        x, y = np.asarray(self.steps, float), np.asarray(self.values, float)
        kept = np.isfinite(y) & ((y > 0) if log else True)
        return x[kept], y[kept]


def chart(
    series: Sequence[Series | None],
    salt: str,
    log: bool = False,
    level: float | None = None,
    exact: bool = False,
) -> str:
    """An SVG element: each series faint as it is and, over it, smoothed; at most SERIES of them.

    A None leaves its colour to the same place in other charts. `salt` is unique on the page. `level` is a dashed line.
    `exact` leaves the smoothing out.
    """
    figure = Figure(figsize=(3.7, 2.1), layout="constrained")
    figure.patch.set_alpha(0)
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        _fill(figure.subplots(), series, _SERIES, log, level, exact)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue())


def sheet(
    titles: Sequence[str], charts: Sequence[Sequence[Series | None]], log: Sequence[bool], columns: int = 3
) -> Image.Image:
    """One picture of several titled charts, `columns` a row; `log` says for each of them whether its axis is."""
    rows = max(1, -(-len(charts) // columns))
    figure = Figure(figsize=(3.7 * columns, 2.2 * rows), layout="constrained", dpi=96)
    canvas = FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, title, series, logarithmic in zip(places, titles, charts, log, strict=False):
        _fill(axes, series, _ON_WHITE, logarithmic)
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        named = [(Line2D([], [], color=c), one.name) for one, c in zip(series, _ON_WHITE, strict=False) if one]
        if len(named) > 1:
            axes.legend(*zip(*named, strict=True), fontsize=7, frameon=False)
    for axes in places[len(charts) :]:
        axes.set_axis_off()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _fill(
    axes: Axes,
    series: Sequence[Series | None],
    colours: Sequence[str],
    log: bool = False,
    level: float | None = None,
    exact: bool = False,
) -> None:
    """Draws one chart."""
    if log:
        axes.set_yscale("log")
    shown: list[Array] = []
    for one, colour in zip(series, colours, strict=False):
        x, y = one.finite(log) if one else (np.empty(0), np.empty(0))
        if len(x):
            shown.append(_line(axes, x, y, colour, log, exact))
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        shown.append(np.array([level]))
    _dress(axes, np.concatenate(shown) if shown else np.array([0.0, 1.0]), log)


def _line(axes: Axes, x: Array, y: Array, colour: str, log: bool, exact: bool) -> Array:
    """Draws one series; returns the values that should be in view."""
    if exact or len(x) < _FEW:
        axes.plot(*_thinned(x, y), color=colour, linewidth=1.6, marker="o" if len(x) < 4 * _FEW else "", markersize=3.5)
        return y
    axes.plot(*_thinned(x, y), color=colour, linewidth=0.7, alpha=0.35)
    smooth = np.exp(_smoothed(np.log(y))) if log else _smoothed(y)
    stride = -(-len(x) // _SMOOTH_POINTS)
    places = np.unique(np.r_[0 : len(x) : stride, len(x) - 1])
    axes.plot(x[places], smooth[places], color=colour, linewidth=1.7)
    # A first spike must not flatten all that follows.
    return np.concatenate([np.quantile(y, [0.01, 0.99]), smooth[len(smooth) // 50 :]])


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """The smallest and the largest value of each stretch, so that thinning hides no spike."""
    if len(x) <= _RAW_POINTS:
        return x, y
    places = []
    for part in np.array_split(np.arange(len(x)), _RAW_POINTS // 2):
        places += sorted({part[y[part].argmin()], part[y[part].argmax()]})
    return x[places], y[places]


def _smoothed(y: Array) -> Array:
    """Centred running mean over a twentieth of the points; at the ends, over those that are there."""
    reach = max(1, len(y) // 40)
    sums, middle = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    first, last = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(y))
    return (sums[last] - sums[first]) / (last - first)


def _dress(axes: Axes, shown: Array, log: bool) -> None:
    low, high = shown.min(), shown.max()
    if log:
        low, high = np.log10(low), np.log10(high)
    margin = 0.07 * (high - low) or (0.1 * abs(high) or 0.1)
    low, high = low - margin, high + margin
    axes.set_ylim(*(10.0 ** np.array([low, high]) if log else (low, high)))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, pad=3)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    number = ticker.FuncFormatter(lambda value, place: f"{value:.4g}")
    if log:
        axes.yaxis.set_major_locator(
            ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high - low < 1.5 else (1.0,), numticks=6)
        )
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(number)


def _inline(svg: str) -> str:
    """The element alone, without the declarations an HTML page does not need, sized by its box."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.S)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height|id)="[^"]*"', _keep_id, svg)
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    svg = re.sub(r"<g/>|(?<=>)\s+(?=<)", "", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()


def _keep_id(found: re.Match[str]) -> str:
    """Ids that something refers to (clip paths, markers) stay; `width` and `height` of clip paths too."""
    name = found[0].strip().split("=")[0]
    if name == "id":
        return found[0] if re.match(r'\sid="[mp][0-9a-f]{10}"', found[0]) else ""
    return found[0] if name in ("width", "height") and "pt" not in found[0] else ""

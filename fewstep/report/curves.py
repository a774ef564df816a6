"""Which curves a page shows: what an objective logs and what was measured on the way, of one run or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from fewstep.report.charts import SERIES, Series, chart, sheet
from fewstep.report.html import Html, joined, tag
from fewstep.report.measures import Json, is_number, measure_of

_COUNTERS = ("step", "seconds", "images")


@dataclass(frozen=True)
class Plot:
    """What one chart shows: columns of the log by key, with the name each line gets; `level` is a dashed line."""

    title: str
    note: str
    lines: Mapping[str, str]
    log: bool = False
    exact: bool = False
    level: float | None = None


_KNOWN = (
    Plot("score gap", "rms of fake minus real score: the push on the generator", {"gap": "gap"}),
    Plot("critic lag", "near 0 where the critic keeps up with the generator", {"lag": "lag"}),
    Plot(
        "x0 mean and deviation",
        "over all values",
        {"x0/mean": "mean", "x0/std": "deviation", "data/mean": "mean of the data", "data/std": "its deviation"},
    ),
    Plot("x0 spread", "rms distance of images in a batch", {"x0/spread": "samples", "data/spread": "data"}),
    Plot("x0 label", "share of that spread that labels explain", {"x0/label": "samples", "data/label": "data"}),
    Plot("x0 saturation", "share of values outside [-1, 1]", {"x0/saturated": "samples", "data/saturated": "data"}),
    Plot("discriminator accuracy", "0.5 knows nothing, 1 tells all apart", {"gan/accuracy": "accuracy"}),
    Plot("GAN losses", "", {"gan/generator": "generator", "gan/critic": "critic"}),
)


def log_plots(log: Sequence[Json]) -> list[Plot]:
    """Losses first, then what tells health, then whatever else an objective logs, then the learning rates."""
    keys = list(dict.fromkeys(key for row in log for key, value in row.items() if is_number(value)))

    def ending(suffix: str) -> dict[str, str]:
        # The generator first, so that it has the same colour everywhere.
        found = sorted((key for key in keys if key.endswith(suffix)), key=lambda key: not key.startswith("generator"))
        return {key: key.removesuffix(suffix).replace("_", " ") for key in found}

    losses = [Plot(f"loss, {player}", "", {key: player}) for key, player in ending("/loss").items()]
    norms = Plot("gradient norm", "before clipping, on a log axis", ending("/grad_norm"), log=True)
    rates = Plot("learning rate", "", ending("/lr"), exact=True)
    told = {key for plot in (*losses, norms, rates, *_KNOWN) for key in plot.lines}
    told |= {*_COUNTERS, *ending("/moves")}
    others = [Plot(key.replace("_", " "), "", {key: key}) for key in keys if key not in told]
    plots = [*losses, *_KNOWN[:2], norms, *_KNOWN[2:], *others, rates]
    return [plot for plot in plots if any(key in keys for key in plot.lines)]


def eval_plots(evals: Sequence[Json], table: Json | None = None) -> list[Plot]:
    """Each measure over the steps; the dashed line is the first of several rows of the table, the teacher."""
    keys = dict.fromkeys(key for row in evals for key, value in row.items() if is_number(value))
    rows = table["rows"] if table else []
    above: Json = rows[0] if len(rows) > 1 else {}
    plots = []
    for key in keys:
        if key not in (*_COUNTERS, "samples", "passes"):
            level = above.get(key) if is_number(above.get(key)) and key != "images_per_second" else None
            note = f"dashed: {above['name']}" if level is not None else ""
            plots.append(Plot(measure_of(key).name, note, {key: key}, exact=True, level=level))
    return plots


def line(rows: Sequence[Json], key: str, name: str) -> Series | None:
    """One column of a log; None where it has no number."""
    there = [row for row in rows if is_number(row.get(key)) and is_number(row.get("step"))]
    return Series(name, [row["step"] for row in there], [row[key] for row in there]) if there else None


def of_one(plots: Sequence[Plot], rows: Sequence[Json], kind: str) -> Html:
    """The charts of one run; `kind` is unique on the page."""
    return _charts([(plot, [line(rows, key, name) for key, name in plot.lines.items()]) for plot in plots], kind)


def as_picture(plots: Sequence[Plot], rows: Sequence[Json]) -> Image.Image:
    """The charts of one run as one picture, for a place that shows no page."""
    lines = [[line(rows, key, name) for key, name in plot.lines.items()] for plot in plots]
    return sheet([plot.title for plot in plots], lines, [plot.log for plot in plots])


def of_several(plots: Sequence[Plot], runs: Mapping[str, Sequence[Json]], kind: str) -> Html:
    """The charts of several runs by name: a line for each of them in every chart."""
    drawn = []
    for plot in plots:
        for key, said in plot.lines.items():
            title = plot.title if len(plot.lines) == 1 else f"{plot.title}, {said}"
            drawn.append((replace(plot, title=title), [line(rows, key, name) for name, rows in runs.items()]))
    return _charts(drawn, kind)


def _charts(plots: Sequence[tuple[Plot, Sequence[Series | None]]], kind: str) -> Html:
    figures = [_figure(plot, lines[:SERIES], f"{kind}{i}") for i, (plot, lines) in enumerate(plots) if any(lines)]
    return tag("div", joined(figures), class_="charts") if figures else Html("")


def _figure(plot: Plot, lines: Sequence[Series | None], salt: str) -> Html:
    drawn = Html(chart(lines, salt, plot.log, plot.level, plot.exact))
    names = [tag("span", s.name, style=f"--c:var(--c{i + 1})") for i, s in enumerate(lines) if s]
    legend = joined(names, "") if len(lines) > 1 else ""
    caption = tag("figcaption", tag("b", plot.title), legend, tag("small", plot.note) if plot.note else "")
    ends = "; ".join(f"{s.name} ends at {s.values[-1]:.4g}" for s in lines if s and math.isfinite(s.values[-1]))
    picture = tag("div", drawn, role="img", aria_label=f"{plot.title} over the steps: {ends or 'no finite end'}")
    return tag("figure", caption, picture)

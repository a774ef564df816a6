"""The table and the plots of a board: quality, diversity and cost of every method, over its seeds."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]

COLUMNS = {
    "frechet": ("Frechet distance", "{:.1f}"),
    "precision": ("precision", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "rare": ("rare kept", "{:.0f}"),
    "diversity": ("same-label diversity", "{:.3f}"),
    "label_accuracy": ("label accuracy", "{:.3f}"),
    "law_distance": ("law distance", "{:.3f}"),
}
MARKERS, COLOURS = {1: "o", 4: "s"}, {1: "#D55E00", 4: "#0072B2"}


def write(folder: Path, rows: list[Row]) -> None:
    """table.md and the pictures in `folder`."""
    rows = [with_rare(row) for row in rows]
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["name"]].append(row)
    methods = sorted(by_name.values(), key=lambda own: (own[0]["steps"], mean(row["frechet"] for row in own)))
    (folder / "table.md").write_text(table(methods))
    scatter(folder / "quality_diversity.png", methods)
    side_by_side(folder / "methods.png", methods)
    cost(folder / "cost.png", [own for own in methods if "training" in own[0]])
    if walked := [own for own in methods if any("by_steps" in row for row in own)]:
        by_steps(folder / "steps.png", walked)


def with_rare(row: Row) -> Row:
    return {**row, "rare": int(str(row["rare_kept"]).split("/")[0])} if "rare_kept" in row else row


def title(row: Row) -> str:
    """The name without its number of steps, which has a column of its own."""
    return str(row["name"]).removesuffix("_four_steps")


def table(methods: list[list[Row]]) -> str:
    """Markdown: a line a method, the mean over its seeds, with the deviation where there are several."""
    heads = ["method", "steps", "seeds", *(name for name, _ in COLUMNS.values()), "training passes", "CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for own in methods:
        cells = [f"`{title(own[0])}`", str(own[0]["steps"]), str(len(own))]
        cells += [_cell([row[key] for row in own if key in row], form) for key, (_, form) in COLUMNS.items()]
        costs = [row["training"] for row in own if "training" in row]
        cells += [f"{mean(c[key] for c in costs):,.0f}" if costs else "" for key in ("passes", "seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], form: str) -> str:
    if not values:
        return ""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def scatter(file: Path, methods: list[list[Row]]) -> None:
    """Frechet distance (log) over same-label diversity, coloured by coverage; a panel a number of steps."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 7), sharey=True, layout="constrained")
    for axis, steps in zip(axes, MARKERS, strict=True):
        own = [rows for rows in methods if rows[0]["steps"] in (steps, 50)]
        x, y, colour = (
            [mean(row[key] for row in rows) for rows in own] for key in ("diversity", "frechet", "coverage")
        )
        dots = axis.scatter(x, y, c=colour, vmin=0, vmax=0.85, s=60, edgecolors="white", zorder=3)
        axis.set(xlabel="same-label diversity (truth = 1)", yscale="log", title=f"{steps} step{'s' * (steps > 1)}")
        axis.grid(alpha=0.3)
        # The names stand in a column of their own, for many points lie on one another.
        order = sorted(range(len(own)), key=y.__getitem__)
        for place, i in enumerate(order):
            height = (place + 0.5) / len(order)
            text = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
            line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.4, "relpos": (0, 0.5)}
            axis.annotate(title(own[i][0]), (x[i], y[i]), **text, arrowprops=line)
    axes[0].set_ylabel("Frechet distance to truth (lower is better)")
    figure.colorbar(dots, ax=axes, label="coverage", location="bottom", shrink=0.4, pad=0.02)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def side_by_side(file: Path, methods: list[list[Row]]) -> None:
    """A line a method: Frechet distance (log), coverage and diversity; circles one step, squares four."""
    pyplot = _pyplot()
    made = [own for own in methods if own[0]["steps"] in MARKERS]
    best: dict[str, float] = {}
    for own in made:
        distance = mean(row["frechet"] for row in own)
        best[title(own[0])] = min(distance, best.get(title(own[0]), distance))
    names = sorted(best, key=best.__getitem__, reverse=True)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 1.5 + 0.21 * len(names)), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("frechet", "coverage", "diversity"), strict=True):
        for own in made:
            values = [row[key] for row in own]
            place = (mean(values), names.index(title(own[0])))
            marker, colour = MARKERS[own[0]["steps"]], COLOURS[own[0]["steps"]]
            spread = stdev(values) if len(values) > 1 else 0
            axis.errorbar(*place, xerr=spread, marker=marker, color=colour, linestyle="", markersize=6, alpha=0.9)
        for own in methods:
            if own[0]["steps"] not in MARKERS:
                axis.axvline(mean(row[key] for row in own), color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=COLUMNS[key][0] + (" (truth = 1)" if key == "diversity" else ""))
        axis.grid(alpha=0.3)
    axes[0].set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(-0.7, len(names) - 0.3))
    marks = {
        f"{n} step{'s' * (n > 1)}": {"marker": m, "linestyle": "", "color": COLOURS[n]} for n, m in MARKERS.items()
    }
    marks["teacher, 50 steps"] = {"linestyle": "--", "color": "black"}
    lines = [pyplot.Line2D([], [], **style) for style in marks.values()]
    figure.legend(lines, marks.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def cost(file: Path, methods: list[list[Row]]) -> None:
    """What the same number of network passes took, in seconds of one core."""
    pyplot = _pyplot()
    names = [f"{title(own[0])}, {own[0]['steps']}" for own in methods]
    seconds = [mean(row["training"]["seconds"] for row in own) for own in methods]
    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.24 * max(4, len(names))), layout="constrained")
    axis.barh(names[::-1], seconds[::-1], color="#0072B2")
    axis.set_xlabel("training, seconds of one core")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def by_steps(file: Path, methods: list[list[Row]]) -> None:
    """Frechet distance (log) of students of four steps that are walked in other numbers of them."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    for i, (own, colour) in enumerate(zip(methods, _colours(pyplot, len(methods)), strict=True)):
        found = [row["by_steps"] for row in own if "by_steps" in row]
        counts = sorted({int(steps) for walk in found for steps in walk})
        means = [mean(walk[str(n)]["frechet"] for walk in found if str(n) in walk) for n in counts]
        axis.plot(counts, means, "-" if i % 2 else "--", marker="o", color=colour, label=title(own[0]))
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance to truth (lower is better)")
    axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colours(pyplot: Any, count: int) -> list[Any]:
    return [pyplot.get_cmap("nipy_spectral")(0.05 + 0.9 * i / max(1, count - 1)) for i in range(count)]

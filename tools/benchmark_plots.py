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
MARKERS = {1: "o", 4: "s"}


def write(folder: Path, rows: list[Row]) -> None:
    """table.md, quality_diversity.png and cost.png in `folder`."""
    rows = [with_rare(row) for row in rows]
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["name"]].append(row)
    methods = sorted(by_name.values(), key=lambda own: (own[0]["steps"], mean(row["frechet"] for row in own)))
    (folder / "table.md").write_text(table(methods))
    scatter(folder / "quality_diversity.png", methods)
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
    """Frechet distance (log) over coverage, and over same-label diversity; circles one step, squares four."""
    pyplot = _pyplot()
    names = sorted({title(own[0]) for own in methods})
    colours = dict(zip(names, _colours(pyplot, len(names)), strict=True))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("coverage", "diversity"), strict=True):
        for own in methods:
            x, y = mean(row[key] for row in own), mean(row["frechet"] for row in own)
            marker = MARKERS.get(own[0]["steps"], "*")
            style = {"color": colours[title(own[0])], "markersize": 9, "alpha": 0.9, "markeredgecolor": "white"}
            spread = [stdev(row[k] for row in own) if len(own) > 1 else 0 for k in (key, "frechet")]
            axis.errorbar(x, y, xerr=spread[0], yerr=spread[1], marker=marker, linestyle="", **style)
        axis.set(xlabel=f"{COLUMNS[key][0]}" + (" (truth = 1)" if key == "diversity" else ""), yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Frechet distance to truth (lower is better)")
    dots = {name: pyplot.Line2D([], [], marker="o", color=colours[name], linestyle="") for name in names}
    for steps, marker in {**{f"{n} step{'s' * (n > 1)}": m for n, m in MARKERS.items()}, "50 steps": "*"}.items():
        dots[steps] = pyplot.Line2D([], [], marker=marker, color="white", markeredgecolor="black", linestyle="")
    figure.legend(dots.values(), dots.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
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
    for own, colour in zip(methods, _colours(pyplot, len(methods)), strict=True):
        found = [row["by_steps"] for row in own if "by_steps" in row]
        counts = sorted({int(steps) for walk in found for steps in walk})
        means = [mean(walk[str(n)]["frechet"] for walk in found if str(n) in walk) for n in counts]
        axis.plot(counts, means, marker="o", color=colour, label=title(own[0]))
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
    wheel = [*pyplot.get_cmap("tab20").colors, *pyplot.get_cmap("tab20b").colors, *pyplot.get_cmap("tab20c").colors]
    return wheel[:count]

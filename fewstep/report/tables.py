"""The tables of a page: every measure beside its meaning, and what became of rare attributes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fewstep.report.html import Html, joined, tag
from fewstep.report.measures import Json, best, columns_of, measure_of, shown

_ARROWS = {"lower": "↓", "higher": "↑"}


def result(table: Json | None, own: Collection[int] | None = None, ranked: bool = True) -> Html:
    """A line for each measure, a column for each model; `own` are the students, by default the last of several.

    Of several students the best of each line is marked, where they are `ranked`.
    """
    if table is None:
        return Html("")
    rows = table["rows"]
    own = own if own is not None else ({len(rows) - 1} if len(rows) > 1 else set())
    students = sorted(own)
    lines = []
    for column in columns_of(table):
        values = [row.get(column) for row in rows]
        winners = (
            {students[i] for i in best(column, [values[k] for k in students])}
            if ranked and len(students) > 1
            else set()
        )
        cells = [_cell(shown(column, value), i in own, i in winners) for i, value in enumerate(values)]
        lines.append(tag("tr", _name(column), *cells))
    head = [tag("th", str(row["name"]), scope="col", class_="own" if i in own else None) for i, row in enumerate(rows)]
    said = f"Protocol: {table['protocol']}." if table.get("protocol") else ""
    return joined([framed(head, lines), tag("p", said, class_="soft protocol") if said else ""])


def _cell(value: str, own: bool, winner: bool) -> Html:
    return tag("td", tag("strong", value, title="the best") if winner else value, class_="own" if own else None)


def _name(column: str) -> Html:
    measure = measure_of(column)
    arrow = _ARROWS.get(measure.better)
    mark = ["\u00a0", tag("i", arrow, title=f"{measure.better} is better")] if arrow else []
    return tag("th", measure.name, *mark, tag("small", measure.meaning) if measure.meaning else "", scope="row")


def framed(head: Sequence[str], lines: Sequence[str], kind: str | None = None) -> Html:
    """A table that scrolls sideways by itself where the screen is narrow."""
    top = tag("thead", tag("tr", tag("td"), *head))
    table = tag("table", top, Html("\n"), tag("tbody", joined(lines)), class_=kind)
    return tag("div", table, class_="wide", tabindex="0", role="region", aria_label="table")


def rare(table: Json | None) -> Html:
    """The share of every rare attribute beside the true one, the lost ones first."""
    rows = [row for row in (table["rows"] if table else []) if row.get("rare")]
    if not rows:
        return Html("")
    shares = [{one["name"]: one for one in row["rare"]} for row in rows]
    last = shares[-1]
    names = sorted(last, key=lambda name: (not last[name]["lost"], -last[name]["true_share"]))
    lost = sum(last[name]["lost"] for name in names)
    head = [tag("th", name, scope="col") for name in ("truth", *(str(row["name"]) for row in rows))]
    true = {name: tag("td", f"{100 * last[name]['true_share']:.2f} %") for name in names}
    lines = [
        tag("tr", tag("th", name, scope="row"), true[name], *(_share(one.get(name)) for one in shares))
        for name in names
    ]
    said = (
        f"{rows[-1]['name']} keeps {len(names) - lost} of {len(names)}. A value or pair counts as lost when even the "
        "upper 95 % bound of its share is below a quarter of the true one."
    )
    title = tag("summary", f"All {len(names)}, the lost first")
    return joined([tag("p", said), tag("details", title, framed(head, lines, "rare"), open=0 < lost <= 12)])


def _share(one: Json | None) -> Html:
    if one is None:
        return tag("td", "-")
    filled = min(1.0, one["share"] / one["true_share"]) if one["true_share"] else 0.0
    bar = tag("span", class_="bar", style=f"--w:{100 * filled:.0f}%")
    mark = joined([tag("em", "lost"), Html(" ")], "") if one["lost"] else ""
    return tag("td", mark, f"{100 * one['share']:.2f} %", bar, class_="lost" if one["lost"] else None)

"""The page of several runs: one table over all, their pictures side by side, what differs, their curves together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import ImageChops

from fewstep.report import curves, pictures, tables
from fewstep.report.charts import SERIES
from fewstep.report.found import Found, Pairs, drawn
from fewstep.report.html import Html, joined, tag
from fewstep.report.measures import Json, shown
from fewstep.report.page import notes, progress, section, sentence, shell

Runs = Mapping[str, Found]


def versus(found: Sequence[Found]) -> str:
    """The HTML of the comparison of several runs, in the order given."""
    runs = dict(zip(names_of(found), found, strict=True))
    logs = {name: run.log for name, run in runs.items()}
    evals = {name: run.evals for name, run in runs.items()}
    title = " against ".join(runs) if len(runs) < 4 else f"{len(runs)} runs"
    body = [
        _summary(title, runs),
        section("Result", _result(runs)),
        section("From the same noise", _pictures(runs)),
        section("What differs", _differences(runs)),
        section("Measured while training", curves.of_several(curves.eval_plots(_all(evals)), evals, "eval")),
        section("Curves", joined([_left_out(runs), curves.of_several(curves.log_plots(_all(logs)), logs, "log")])),
        section("How they were made", _made(runs)),
    ]
    return shell(title, body)


def names_of(found: Sequence[Found]) -> list[str]:
    """A name for each run: of its config where no other has the same, else of its folder, else its whole path."""
    choices = (
        [run.name for run in found],
        [run.root.resolve().name for run in found],
        [str(run.root) for run in found],
    )
    names = list(choices[0])
    for better in choices[1:]:
        many = Counter(names)
        names = [other if many[name] > 1 else name for name, other in zip(names, better, strict=True)]
    return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _all(rows: Mapping[str, Sequence[Json]]) -> list[Json]:
    return [row for one in rows.values() for row in one]


def _summary(title: str, runs: Runs) -> Html:
    lines = [
        tag("li", tag("b", f"{name}:"), " ", sentence(run), " ", tag("small", ", ".join(progress(run)[1:])))
        for name, run in runs.items()
    ]
    missing = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    kicker = tag("p", f"comparison of {len(runs)} fewstep runs", class_="kicker")
    return tag("header", kicker, tag("h1", title), tag("ul", *lines, class_="runs"), notes(missing))


def _result(runs: Runs) -> Html:
    """The students of all runs beside what their tables say of teachers; equal teachers stand there once."""
    tabled = {name: run.table for name, run in runs.items() if run.table}
    others: list[Json] = []
    students: list[Json] = []
    for name, table in tabled.items():
        *above, student = table["rows"]
        students.append(student | {"name": name})
        for row in above:
            if all(_same(row) != _same(known) for known in others):
                others.append(row)
    if not students:
        return Html("")
    columns = list(dict.fromkeys(column for table in tabled.values() for column in table.get("columns", [])))
    merged = {"columns": columns, "rows": _told_apart(others) + students}
    students_at = range(len(others), len(merged["rows"]))
    said, alike = _protocols(tabled)
    return joined([tables.result(merged, students_at, ranked=alike), said])


def _same(row: Json) -> dict[str, str]:
    """A row as it reads, without what differs each time it is measured."""
    return {key: shown(key, value) for key, value in row.items() if key not in ("images_per_second", "rare")}


def _protocols(tabled: Mapping[str, Json]) -> tuple[Html, bool]:
    """The protocol of all, or those of each with a warning; and whether it is the same."""
    by: dict[str, list[str]] = {}
    for name, table in tabled.items():
        by.setdefault(str(table.get("protocol") or "not recorded"), []).append(name)
    if len(by) == 1:
        return tag("p", f"Protocol: {next(iter(by))}.", class_="soft"), True
    warning = notes(["These runs were measured by different protocols: their numbers do not compare."])
    each = [tag("p", f"{', '.join(names)}: {said}.", class_="soft") for said, names in by.items()]
    return joined([warning, *each]), False


def _told_apart(rows: Sequence[Json]) -> list[Json]:
    many = Counter(str(row["name"]) for row in rows)
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        name = str(row["name"])
        seen[name] += 1
        named.append(row | {"name": f"{name} ({seen[name]})" if many[name] > 1 else name})
    return named


def _pictures(runs: Runs) -> Html:
    """One group of pictures for each noise, where the runs answer to the same teacher; else run by run."""
    paired = {name: run.pairs for name, run in runs.items() if run.pairs}
    together = _together(paired) if len(paired) > 1 else None
    alone = {name: run for name, run in runs.items() if not (together and name in paired)}
    drawn = {name: pictures.pictures_of(run) for name, run in alone.items()}
    own = [tag("div", tag("h3", name), part) for name, part in drawn.items() if part]
    return joined([pictures.gallery(together) if together else "", *own])


def _together(paired: Mapping[str, Pairs]) -> Pairs | None:
    """The first run's teacher, then every student; None where prompts or teachers differ."""
    first, *others = paired.values()
    if any(pairs.asked != first.asked or not all(map(_alike, pairs.files[0], first.files[0])) for pairs in others):
        return None
    files = (first.files[0], *(pairs.files[-1] for pairs in paired.values()))
    return Pairs((first.names[0], *paired), first.asked, files)


def _alike(one: Path, other: Path) -> bool:
    """Whether two pictures are the same but for rounding: at most 4 of 255."""
    a, b = drawn(one), drawn(other)
    if a.size != b.size or a.mode != b.mode:
        return False
    ends = np.asarray(ImageChops.difference(a, b))
    return int(ends.max()) <= 4


def _differences(runs: Runs) -> Html:
    """The keys of the configs that are not the same everywhere; those that only some configs know are folded away."""
    flat = _keyed([run.configs for run in runs.values() if run.configs])
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "name"]
    unlike = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    everywhere = [key for key in unlike if all(key in one for one in flat)]
    rest = [key for key in unlike if key not in everywhere]
    head = [tag("th", name, scope="col") for name, run in runs.items() if run.configs]

    def table(keys: Sequence[str]) -> Html:
        rows = [tag("tr", tag("th", key, scope="row"), *(tag("td", one.get(key, "-")) for one in flat)) for key in keys]
        return tables.framed(head, rows, "keys")

    more = tag("summary", f"{_keys(len(rest))} that only some of the configs know")
    said = "" if unlike or len(flat) < len(runs) else tag("p", "Nothing in their configs.")
    return joined([said, table(everywhere) if everywhere else "", tag("details", more, table(rest)) if rest else ""])


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"


def _keyed(runs: Sequence[Sequence[Json]]) -> list[dict[str, str]]:
    """For each run its dotted keys; one that some run's stages disagree on stands under every stage."""
    staged = [[_flat(config) for config in configs] for configs in runs]
    split = {key for flat in staged for one in flat for key in one if len({other.get(key) for other in flat}) > 1}
    return [
        {
            f"stage_{i + 1}.{key}" if key in split else key: text
            for i, one in enumerate(flat)
            for key, text in one.items()
        }
        for flat in staged
    ]


def _flat(value: object, key: str = "") -> dict[str, str]:
    """Dotted keys with their values as text."""
    if not isinstance(value, dict) or (key and not value):
        return {key: value if isinstance(value, str) else json.dumps(value)}
    return {
        k: text
        for name, part in value.items()
        for k, text in _flat(part, f"{key}.{name}" if key else str(name)).items()
    }


def _left_out(runs: Runs) -> Html:
    left = list(runs)[SERIES:]
    return tag("p", f"The charts show the first {SERIES} runs, not {', '.join(left)}.") if left else Html("")


def _made(runs: Runs) -> Html:
    parts = []
    for name, run in runs.items():
        said = [str(run.origin[key]) for key in ("hardware", "commit") if run.origin.get(key)]
        command = tag("pre", str(run.origin["command"])) if run.origin.get("command") else ""
        parts.append(tag("div", tag("h3", name), tag("p", " · ".join([str(run.root), *said]), class_="soft"), command))
    return joined(parts)

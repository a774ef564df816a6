"""One self-contained page about a run, and its final table for the terminal."""

from __future__ import annotations

import base64
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fewstep.charts import SERIES, Series, chart
from fewstep.core.errors import UserError
from fewstep.train.checkpoint import write_text
from fewstep.train.rundir import RunDir

Json = dict[str, Any]

_GRIDS = 8
_LOST_SHOWN = 8
_COUNTERS = ("step", "seconds", "images")


@dataclass(frozen=True)
class Measure:
    """How a column of the table reads: its name, which way is better, its meaning, its format."""

    name: str
    better: str
    meaning: str
    digits: str = ".3f"


MEASURES = {
    "frechet": Measure("Fréchet distance", "lower", "how far the features lie from those of true images", ".2f"),
    "precision": Measure("precision", "higher", "share of samples that look true"),
    "recall": Measure("recall", "higher", "share of true images that some sample resembles"),
    "density": Measure("density", "higher", "precision that counts how many true neighbours; true images have 1"),
    "coverage": Measure("coverage", "higher", "share of true images with a sample close by"),
    "label_accuracy": Measure("label accuracy", "higher", "share of samples that show the label asked for"),
    "caption_accuracy": Measure("caption accuracy", "higher", "share of samples that show all that the caption says"),
    "one_object": Measure("one object", "higher", "caption accuracy where the caption names one object"),
    "two_objects": Measure("two objects", "higher", "caption accuracy where it names two and their relation"),
    "law_distance": Measure("law distance", "lower", "distance from the true law of the other attributes"),
    "rare_kept": Measure("rare kept", "higher", "rare attributes and pairs that are still generated"),
    "diversity": Measure("diversity", "near 1", "spread within one label; true images have 1"),
    "prompt_diversity": Measure("prompt diversity", "near 1", "spread within one prompt; true images of it have 1"),
    "passes": Measure("network passes", "lower", "for one image, both halves of guidance counted", ".0f"),
    "images_per_second": Measure("images / s", "higher", "on the hardware of this run", ".1f"),
    "samples": Measure("samples", "", "images that were measured", ".0f"),
}


def _measure(column: str) -> Measure:
    return MEASURES.get(column, Measure(column.replace("_", " "), "", "", ".4g"))


def _value(column: str, value: Any) -> str:
    """A cell: a number in the format of its column, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return format(value, _measure(column).digits) if math.isfinite(value) else "not finite"


def _columns(table: Json) -> list[str]:
    """The columns that at least one row has a value for."""
    return [c for c in table.get("columns", []) if any(row.get(c) is not None for row in table["rows"])]


def as_text(table: Json) -> str:
    """The table for the terminal, in ASCII: a line for each measure, a column for each model, then what was lost.

    `table` is what table.json holds: protocol, columns, rows with a name and a value (or None) for each column.
    """
    rows = table["rows"]
    lines = [["measure", *(str(row["name"]) for row in rows), "better"]]
    for column in _columns(table):
        lines.append([column, *(_value(column, row.get(column)) for row in rows), _measure(column).better])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [_aligned(line, widths) for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    for row in rows:
        if lost := [rare["name"] for rare in row.get("rare") or [] if rare["lost"]]:
            more = f" and {len(lost) - _LOST_SHOWN} more" if len(lost) > _LOST_SHOWN else ""
            text.append(f"{row['name']} has lost: {', '.join(lost[:_LOST_SHOWN])}{more}")
    if table.get("protocol"):
        text += textwrap.wrap(str(table["protocol"]), 100)
    return "\n".join(text).encode("ascii", "replace").decode()


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *middle, last = (cell.ljust(w) for cell, w in zip(cells, widths, strict=True))
    numbers = [cell.strip().rjust(w) for cell, w in zip(middle, widths[1:-1], strict=True)]
    return "  ".join([first, *numbers, last]).rstrip()


@dataclass(frozen=True)
class Found:
    """What lies in a run folder; everything but `root` may be missing. `broken` names files that cannot be read.

    Of a run of stages the config is the last one's, and `before` counts the steps of the earlier ones.
    """

    root: Path
    before: int
    config: Json
    config_text: str
    origin: Json
    log: list[Json]
    evals: list[Json]
    table: Json | None
    samples: list[Path]
    broken: list[str]


def read(folder: RunDir) -> Found:
    """Reads a run folder. A run of stages has no log of its own: those of its stages are put one after the other."""
    stages = [RunDir(p) for p in sorted(folder.root.glob("stage_*"), key=lambda p: (len(p.name), p.name))]
    logged = [stage for stage in stages if (stage.root / "log.jsonl").exists()]
    parts = logged if logged and not (folder.root / "log.jsonl").exists() else [folder]
    last = parts[-1].root
    broken: list[str] = []

    def parsed(path: Path) -> Json:
        try:
            value = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            broken.append(path.name)
            return {}
        return value

    table = parsed(folder.root / "table.json")
    if table and not _whole(table):
        broken.append("table.json")
        table = {}
    config_text, config = _config(last / "config.yaml", broken)
    log, evals, before = _joined(parts)
    samples = [path for part in parts for path in sorted(part.samples.glob("*.png"))]
    origin = parsed(last / "origin.json")
    return Found(folder.root, before, config, config_text, origin, log, evals, table or None, samples, broken)


def _joined(parts: Sequence[RunDir]) -> tuple[list[Json], list[Json], int]:
    """The logs and evaluations of stages, counted on from one to the next, and the steps before the last stage."""
    log: list[Json] = []
    evals: list[Json] = []
    step = images = 0
    for part in parts:
        step, images = (log[-1].get("step", 0), log[-1].get("images", 0)) if log else (0, 0)
        for rows, name in ((log, "log.jsonl"), (evals, "evals.jsonl")):
            for row in part.rows(name):
                if isinstance(row, dict):
                    on = {key: row[key] + more for key, more in (("step", step), ("images", images)) if key in row}
                    rows.append(row | on)
    return log, evals, step


def _whole(table: Json) -> bool:
    rows = table.get("rows")
    return isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows)


def _config(path: Path, broken: list[str]) -> tuple[str, Json]:
    if not path.exists():
        return "", {}
    try:
        text = path.read_text()
        value = OmegaConf.to_container(OmegaConf.create(text))
    except Exception:
        broken.append(path.name)
        return "", {}
    return text, value if isinstance(value, dict) else {}  # type: ignore[return-value]


def write_report(folder: RunDir) -> Path:
    """Writes report.html into `folder` from what lies there, the page whole or not at all; returns its path.

    Nothing is required: sections without material are left out. Raises UserError when it cannot be written.
    """
    path = folder.root / "report.html"
    text = page(read(folder))
    try:
        aside = path.with_name(".report.html.partial")
        write_text(aside, text)
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def page(found: Found) -> str:
    """The HTML of the report."""
    sections = [
        _header(found),
        _notes(found),
        _section("Result", _table(found.table)),
        _section("Teacher and student", _comparison(found.root / "comparison.png")),
        _section("Samples while training", _samples(found.samples)),
        _section("Measured while training", _charts(_eval_charts(found), "eval")),
        _section("Curves", _charts(_log_charts(found), "log")),
        _section("Rare attributes", _rare(found.table)),
        _section("How it was made", _details(found)),
    ]
    title = escape(_name(found))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(sections)}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _name(found: Found) -> str:
    return str(found.config.get("name") or found.root.resolve().name)


def _header(found: Found) -> str:
    said = " <span>·</span> ".join(escape(part) for part in _line(found))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(found))
    return f"<header>\n<h1>{escape(_name(found))}</h1>\n<p>{said}</p>\n<dl>{tiles}</dl>\n</header>\n"


def _line(found: Found) -> list[str]:
    """What was trained, from what, and how far."""
    objective, model = _part(found.config, "objective"), _part(found.config, "model")
    line = [str(objective["name"])] if objective.get("name") else []
    if model.get("teacher"):
        line.append(f"from {Path(str(model['teacher'])).name}")
    if passes := model.get("steps"):
        line.append("1 step" if passes == 1 else f"{passes} steps, {model.get('transition')}")
    done, planned = (found.log[-1].get("step") if found.log else None), found.config.get("steps")
    if isinstance(done, int) and isinstance(planned, int):
        planned += found.before
        line.append("finished" if done >= planned else f"at step {done:,} of {planned:,}")
    return line


def _facts(found: Found) -> list[tuple[str, str]]:
    last = found.log[-1] if found.log else {}
    facts = [
        (name, f"{last[key]:,}")
        for key, name in (("step", "steps"), ("images", "images seen"))
        if _number(last.get(key))
    ]
    if found.log:
        facts.insert(1, ("wall time", _duration(_seconds(found.log))))
    for key, value in last.items():
        if key.endswith("/moves"):
            facts.append((f"moves, {key.removesuffix('/moves').replace('_', ' ')}", f"{value:,}"))
    facts += [(name, str(found.origin[name])) for name in ("hardware", "commit") if found.origin.get(name)]
    return [(name, value[:12] if name == "commit" else value) for name, value in facts]


def _part(config: Json, key: str) -> Json:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _notes(found: Found) -> str:
    notes = [f"{name} is there but cannot be read; it is left out." for name in found.broken]
    if not found.log:
        notes.append("There is no log of training steps in this folder.")
    return "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)


def _seconds(log: Sequence[Json]) -> float:
    """Wall time in seconds; the clock of the log starts anew whenever a run is resumed."""
    clock = [float(row.get("seconds", 0)) for row in log]
    ends = [now for now, after in pairwise(clock) if after < now]
    return sum(ends) + (clock[-1] if clock else 0.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _table(table: Json | None) -> str:
    if table is None or not table["rows"]:
        return ""
    rows = table["rows"]
    head = "".join(f'<th scope="col"{_own(i, rows)}>{escape(str(row["name"]))}</th>' for i, row in enumerate(rows))
    body = []
    for column in _columns(table):
        measure = _measure(column)
        arrow = {"lower": "↓", "higher": "↑"}.get(measure.better, "")
        cells = "".join(
            f"<td{_own(i, rows)}>{escape(_value(column, row.get(column)))}</td>" for i, row in enumerate(rows)
        )
        better = f' <i title="{measure.better} is better">{arrow}</i>' if arrow else ""
        name = f"{escape(measure.name)}{better}<small>{escape(measure.meaning)}</small>"
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    protocol = f'<p class="soft">{escape(str(table["protocol"]))}.</p>' if table.get("protocol") else ""
    return _grid(head, body, "") + protocol


def _grid(head: str, body: Sequence[str], kind: str) -> str:
    lines = "\n".join(body)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>\n"
    )


def _own(index: int, rows: Sequence[Json]) -> str:
    """The student is the last of several rows."""
    return ' class="own"' if len(rows) > 1 and index == len(rows) - 1 else ""


def _comparison(path: Path) -> str:
    return _image(path, "the same noise and labels for both") if path.is_file() else ""


def _image(path: Path, caption: str) -> str:
    return f'<figure class="grid"><img alt="{escape(caption)}" src="{_data(path)}"></figure>'


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _thin(paths: Sequence[Path]) -> list[Path]:
    """At most eight of them, evenly spread, the first and the last among them."""
    if len(paths) <= _GRIDS:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (_GRIDS - 1))] for i in range(_GRIDS)]


def _samples(paths: Sequence[Path]) -> str:
    """The latest grid, with a slider through earlier ones where scripts run."""
    shown = _thin(paths)
    if not shown:
        return ""
    names = [_when(path) for path in shown]
    last = len(shown) - 1
    frames = "".join(
        f'<img alt="samples at {escape(name)}" src="{_data(path)}"{"" if i == last else " hidden"}>'
        for i, (path, name) in enumerate(zip(shown, names, strict=True))
    )
    slider = (
        f'<label><input type="range" min="0" max="{last}" value="{last}" aria-label="training step"></label>'
        if last
        else ""
    )
    labels = escape(json.dumps(names))
    return (
        f'<figure class="grid film" data-names="{labels}">{frames}'
        f"<figcaption>{slider}<output>{escape(names[-1])}</output></figcaption></figure>"
    )


def _when(path: Path) -> str:
    """The step a grid was made at, with its stage where it has one."""
    stage = path.parent.parent.name
    step = f"step {int(path.stem):,}" if path.stem.isdecimal() else path.stem
    return f"{stage.replace('_', ' ')}, {step}" if stage.startswith("stage_") else step


@dataclass(frozen=True)
class Plot:
    """What one chart shows: columns of the log by key, with the name each line gets."""

    title: str
    note: str
    lines: Mapping[str, str]
    log: bool = False
    exact: bool = False


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


def _log_charts(found: Found) -> list[tuple[Plot, list[Json], float | None]]:
    """Losses first, then what tells health, then whatever else an objective logs, then the learning rates."""
    keys = list(dict.fromkeys(key for row in found.log for key, value in row.items() if _number(value)))

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
    return [(plot, found.log, None) for plot in plots if any(key in keys for key in plot.lines)]


def _eval_charts(found: Found) -> list[tuple[Plot, list[Json], float | None]]:
    """Each measure over the steps; the dashed line is the first row of the table, the teacher."""
    keys = dict.fromkeys(key for row in found.evals for key, value in row.items() if _number(value))
    rows = found.table["rows"] if found.table else []
    above: Json = rows[0] if len(rows) > 1 else {}
    result = []
    for key in keys:
        if key in (*_COUNTERS, "samples", "passes"):
            continue
        level = above.get(key) if _number(above.get(key)) and key != "images_per_second" else None
        note = f"dashed: {above['name']}" if level is not None else ""
        result.append((Plot(_measure(key).name, note, {key: key}, exact=True), found.evals, level))
    return result


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _charts(plots: Sequence[tuple[Plot, list[Json], float | None]], kind: str) -> str:
    figures = []
    for number, (plot, rows, level) in enumerate(plots):
        series = []
        for key, name in list(plot.lines.items())[:SERIES]:
            there = [row for row in rows if _number(row.get(key)) and _number(row.get("step"))]
            if there:
                series.append(Series(name, [row["step"] for row in there], [row[key] for row in there]))
        if not series:
            continue
        drawn = chart(series, f"{kind}{number}", plot.log, level, plot.exact)
        legend = "".join(f'<span style="--c:var(--c{i + 1})">{escape(s.name)}</span>' for i, s in enumerate(series))
        note = f"<small>{escape(plot.note)}</small>" if plot.note else ""
        caption = f"<b>{escape(plot.title)}</b>{legend if len(series) > 1 else ''}{note}"
        figures.append(
            f'<figure role="img" aria-label="{escape(plot.title)}"><figcaption>{caption}</figcaption>{drawn}</figure>'
        )
    return f'<div class="charts">\n{chr(10).join(figures)}\n</div>' if figures else ""


def _rare(table: Json | None) -> str:
    rows = [row for row in (table["rows"] if table else []) if row.get("rare")]
    if not rows:
        return ""
    shares = [{rare["name"]: rare for rare in row["rare"]} for row in rows]
    names = sorted(shares[-1], key=lambda name: (not shares[-1][name]["lost"], -shares[-1][name]["true_share"]))
    lost = sum(shares[-1][name]["lost"] for name in names)
    head = "".join(f'<th scope="col">{escape(str(row["name"]))}</th>' for row in rows)
    body = []
    for name in names:
        cells = "".join(_share(one.get(name)) for one in shares)
        true = shares[-1][name]["true_share"]
        body.append(f'<tr><th scope="row">{escape(name)}</th><td>{100 * true:.2f} %</td>{cells}</tr>')
    said = (
        f"{escape(str(rows[-1]['name']))} keeps {len(names) - lost} of {len(names)}. A value or pair counts as lost "
        "when even the upper 95 % bound of its share is below a quarter of the true one."
    )
    whole = _grid(f'<th scope="col">truth</th>{head}', body, "rare")
    opened = " open" if 0 < lost <= 12 else ""
    return f"<p>{said}</p>\n<details{opened}><summary>All {len(names)}, the lost first</summary>{whole}</details>"


def _share(rare: Json | None) -> str:
    if rare is None:
        return "<td>-</td>"
    filled = min(1.0, rare["share"] / rare["true_share"]) if rare["true_share"] else 0.0
    lost = ' class="lost"' if rare["lost"] else ""
    mark = "<em>lost</em> " if rare["lost"] else ""
    bar = f'<span class="bar" style="--w:{100 * filled:.0f}%"></span>'
    return f"<td{lost}>{mark}{100 * rare['share']:.2f} %{bar}</td>"


def _details(found: Found) -> str:
    parts = []
    if command := found.origin.get("command"):
        parts.append(f"<pre>{escape(str(command))}</pre>")
    if found.config_text:
        parts.append(f"<details><summary>Resolved config</summary><pre>{escape(found.config_text)}</pre></details>")
    if found.origin:
        text = escape(json.dumps(found.origin, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Origin</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


_SCRIPT = """
for (const film of document.querySelectorAll(".film")) {
  const names = JSON.parse(film.dataset.names), frames = film.querySelectorAll("img");
  film.querySelector("input")?.addEventListener("input", (event) => {
    frames.forEach((frame, i) => { frame.hidden = i !== +event.target.value; });
    film.querySelector("output").textContent = names[event.target.value];
  });
}
"""

# Series colours follow Okabe and Ito, told apart with every kind of colour vision; lighter on dark ground.
_CSS = """
:root { --ground: #fbfbf9; --card: #fff; --ink: #1b1d21; --soft: #636972; --rule: #dfe1e3; --own: #eef4fa;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #a8558a; --c5: #8a6d00; --lost: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --card: #1b1e23; --ink: #e6e8eb; --soft: #9aa1ab; --rule: #343941; --own: #202b37;
    --c1: #56b4e9; --c2: #f28a3c; --c3: #35c79c; --c4: #de9cc4; --c5: #e0c04a; --lost: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; letter-spacing: -0.005em; margin: 3.2rem 0 1rem; }
p { max-width: 46rem; }
header p { color: var(--soft); margin: 0.5rem 0 1.6rem; font-size: 1.05rem; }
header p span { opacity: 0.6; padding: 0 0.15em; }
.soft, small { color: var(--soft); font-size: 0.84rem; }
.note { border-left: 3px solid var(--c2); padding: 0.1rem 0 0.1rem 0.9rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.9rem 2.4rem; margin: 0; padding: 1rem 0; 
  border-block: 1px solid var(--rule); }
dt { color: var(--soft); font-size: 0.8rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.9rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: baseline; }
tbody th { text-align: left; font-weight: 500; padding-left: 0.2rem; }
thead th { font-size: 0.88rem; font-weight: 600; vertical-align: bottom; }
th small { display: block; font-weight: 400; line-height: 1.35; }
th i { font-style: normal; color: var(--soft); }
@media (max-width: 36rem) { th small { display: none; } th, td { padding-inline: 0.4rem; } }
.own { background: var(--own); font-weight: 600; }
.rare th, .rare td { padding-block: 0.28rem; font-size: 0.88rem; }
.rare .lost, .rare em { color: var(--lost); }
.rare em { font-style: normal; font-weight: 600; }
.bar { display: inline-block; width: 3.2rem; height: 0.5rem; margin-left: 0.6rem; border-radius: 2px;
  background: linear-gradient(to right, currentColor var(--w), var(--rule) var(--w)); opacity: 0.75; }
figure { margin: 0; }
.grid img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.grid img[hidden] { display: none; }
.film figcaption { display: flex; align-items: center; gap: 1rem; margin-top: 0.7rem; color: var(--soft);
  font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.film input { width: min(20rem, 50vw); accent-color: var(--c1); display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 0.8rem 0.9rem 0.5rem; display: flex; flex-direction: column; justify-content: space-between; }
.charts figcaption { font-size: 0.9rem; line-height: 1.4; margin-bottom: 0.4rem; }
.charts figcaption small { display: block; }
.charts figcaption span { margin-left: 0.8rem; color: var(--soft); font-size: 0.84rem; white-space: nowrap; }
.charts figcaption span::before { content: ""; display: inline-block; width: 0.9rem; height: 3px; border-radius: 2px;
  background: var(--c); margin-right: 0.35rem; vertical-align: middle; }
.charts svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; }
.charts svg path { stroke-linejoin: round; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 500; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 0.9rem 1rem;
  overflow-x: auto; font: 0.82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { main { padding: 0; } .charts figure, section { break-inside: avoid; } }
"""

"""The page of one run: what it is and how good, the pictures, then tables, curves, config and origin."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

from fewstep.report import curves, pictures, tables
from fewstep.report.found import Found
from fewstep.report.html import Html, joined, tag
from fewstep.report.measures import Json, is_number, measure_of, shown

# The three numbers that matter: how true, how faithful to what was asked, how much of the variety is kept.
_THAT_MATTER = (
    ("frechet",),
    ("label_accuracy", "caption_accuracy", "precision"),
    ("coverage", "recall", "diversity", "prompt_diversity"),
)


def page(found: Found) -> str:
    """The HTML of the report of one run."""
    body = [
        _summary(found),
        section("Result", tables.result(found.table)),
        section("Samples while training", pictures.film(found.samples)),
        section(
            "Measured while training", curves.of_one(curves.eval_plots(found.evals, found.table), found.evals, "eval")
        ),
        section("Curves", curves.of_one(curves.log_plots(found.log), found.log, "log")),
        section("Rare attributes", tables.rare(found.table)),
        section("How it was made", _made(found)),
    ]
    return shell(found.name, body)


@cache
def _part(name: str) -> str:
    return resources.files("fewstep.report").joinpath(name).read_text("utf-8")


def shell(title: str, body: Sequence[str]) -> str:
    """A whole document that needs nothing but itself; a browser runs no script in it but the one written here."""
    style, script = _part("page.css"), _part("page.js")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    head = [
        tag("meta", charset="utf-8"),
        # Not `tag`: its names have no room for http-equiv.
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    parts = [tag("main", joined(body)), pictures.DIALOG, tag("script", Html(script))]
    whole = tag("html", tag("head", joined(head)), Html("\n"), tag("body", joined(parts)), lang="en")
    return f"<!doctype html>\n{whole}\n"


def section(title: str, body: str) -> Html:
    """A titled part of the page; nothing where there is nothing to show."""
    return tag("section", tag("h2", title), body) if body else Html("")


def notes(lines: Sequence[str]) -> Html:
    return joined([tag("p", line, class_="note") for line in lines])


def _summary(found: Found) -> Html:
    return tag(
        "header",
        tag("p", " · ".join(progress(found)), class_="kicker"),
        tag("h1", found.name),
        tag("p", sentence(found), class_="lead"),
        _numbers(found),
        notes(found.notes),
        pictures.pictures_of(found),
    )


def progress(found: Found) -> list[str]:
    """What it is and how far it came."""
    said = ["fewstep run"]
    done, planned = (found.log[-1].get("step") if found.log else None), found.config.get("steps")
    if isinstance(done, int) and isinstance(planned, int):
        planned += found.before
        said.append(f"finished after {done:,} steps" if done >= planned else f"at step {done:,} of {planned:,}")
    return said


def sentence(found: Found) -> str:
    """What was trained, from which teacher, and how many passes it takes."""
    names = [str(c["objective"]["name"]) for c in found.configs if _named(c)]
    by = f" by {' then '.join(dict.fromkeys(names))}" if names else ""
    steps = found.part("model").get("steps")
    if found.teacher is None:
        return f"A network trained{by}." if found.config else ""
    count = f"{_plural(steps, 'step')}" if isinstance(steps, int) else "few steps"
    return f"A student of {count}, distilled from {found.teacher}{by}.{_passes(found.table)}"


def _named(config: Json) -> bool:
    return isinstance(config.get("objective"), dict) and bool(config["objective"].get("name"))


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 'es' if word == 'pass' else 's'}"


def _passes(table: Json | None) -> str:
    counts = [row["passes"] for row in (table or {"rows": []})["rows"] if isinstance(row.get("passes"), int)]
    if len(counts) < 2:
        return ""
    return f" An image takes {_plural(counts[-1], 'pass')} through the network; its teacher takes {counts[0]:,}."


def _numbers(found: Found) -> Html:
    """Three numbers of the student, each beside those of the other rows; what was trained so far without a table."""
    rows = found.table["rows"] if found.table else []
    tiles = []
    for keys in _THAT_MATTER if rows else ():
        if key := next((key for key in keys if rows[-1].get(key) is not None), None):
            others = [f"{row['name']}: {shown(key, row[key])}" for row in rows[:-1] if row.get(key) is not None]
            better = measure_of(key).better
            title = f"{measure_of(key).name}{f', {better} is better' if better in ('lower', 'higher') else ''}"
            tiles.append(_tile(title, shown(key, rows[-1][key]), others or [measure_of(key).meaning]))
    return tag("dl", *(tiles or [_tile(name, value, []) for name, value in _facts(found)[:3]]), class_="numbers")


def _tile(name: str, value: str, below: Sequence[str]) -> Html:
    return tag("div", tag("dt", name), tag("dd", value), *(tag("dd", line, class_="below") for line in below))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _facts(found: Found) -> list[tuple[str, str]]:
    last = found.log[-1] if found.log else {}
    named = (("step", "steps"), ("images", "images seen"))
    facts = [(name, f"{last[key]:,}") for key, name in named if is_number(last.get(key))]
    if found.log:
        facts.insert(1, ("wall time", duration(found.seconds)))
    for key, value in last.items():
        if key.endswith("/moves") and is_number(value):
            facts.append((f"moves, {key.removesuffix('/moves').replace('_', ' ')}", f"{value:,}"))
    return facts + [(name, str(found.origin[name])) for name in ("hardware", "commit") if found.origin.get(name)]


def _made(found: Found) -> Html:
    facts = [
        tag("div", tag("dt", name), tag("dd", value[:12] if name == "commit" else value))
        for name, value in _facts(found)
    ]
    origin = json.dumps(found.origin, indent=2, ensure_ascii=False) if found.origin else ""
    return joined(
        [
            tag("dl", *facts, class_="facts") if facts else "",
            tag("pre", str(found.origin["command"])) if found.origin.get("command") else "",
            _folded("Resolved config", found.config_text),
            _folded("Origin", origin),
        ]
    )


def _folded(title: str, text: str) -> Html:
    return tag("details", tag("summary", title), tag("pre", text)) if text else Html("")

"""Pictures inside the page: pairs from the same noise, the film of a training, each to be enlarged by a touch."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fewstep import reading
from fewstep.report.found import Found, Pairs, drawn
from fewstep.report.html import Html, joined, tag

_TILE, _GRID = 256, 1200
_CRISP = 96
_AT_ONCE = 12


def embedded(path: Path, widest: int) -> tuple[str, bool]:
    """A data URI of a picture, made smaller where it is wider than `widest`; and whether its pixels are few."""
    picture = drawn(path)
    crisp = picture.width <= _CRISP
    if picture.width <= widest:
        return "data:image/png;base64," + base64.b64encode(reading.content(path, reading.PICTURE)).decode(), crisp
    height = max(1, round(picture.height * widest / picture.width))
    small = picture.convert("RGB").resize((widest, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), crisp


def image(path: Path, alt: str, widest: int, hidden: bool = False) -> Html:
    source, crisp = embedded(path, widest)
    return tag("img", alt=alt, src=source, class_="crisp" if crisp else None, hidden=hidden)


def whole(path: Path, alt: str) -> Html:
    """One large picture that can be enlarged."""
    return tag("figure", _enlarges(image(path, alt, _GRID), "whole"), class_="grid")


def _enlarges(content: str, kind: str) -> Html:
    return tag("button", content, type="button", class_=f"enlarge {kind}", title="enlarge")


def gallery(pairs: Pairs) -> Html:
    """The pictures of all models for one noise stand side by side and are enlarged together; the first few at once."""
    strips = [_strip(pairs, i) for i in range(len(pairs.asked))]
    first, rest = strips[:_AT_ONCE], strips[_AT_ONCE:]
    names = joined([tag("b", name) for name in pairs.names], " · ")
    note = tag("p", names, ": each group from the same noise. Touch one to enlarge it.", class_="soft")
    more = tag("details", tag("summary", f"{len(rest)} more"), tag("div", *rest, class_="pairs")) if rest else ""
    return tag(
        "div", note, tag("div", *first, class_="pairs"), more, data_gallery=True, style=f"--n:{len(pairs.names)}"
    )


def _strip(pairs: Pairs, i: int) -> Html:
    pictures = [image(files[i], name, _TILE) for name, files in zip(pairs.names, pairs.files, strict=True)]
    caption = tag("span", pairs.asked[i]) if pairs.asked[i] else ""
    return _enlarges(joined([tag("span", *pictures, class_="strip"), caption]), "pair")


def pictures_of(found: Found) -> Html:
    """Teacher and student from the same noise: as pairs, or as the one picture of an older run."""
    if found.pairs:
        return gallery(found.pairs)
    return whole(found.comparison, "teacher and student from the same noise") if found.comparison else Html("")


def film(samples: Sequence[Path]) -> Html:
    """The latest grid, with a slider through earlier ones where scripts run."""
    if not samples:
        return Html("")
    names, last = [_when(path) for path in samples], len(samples) - 1
    frames = [
        image(path, f"samples at {name}", _GRID, hidden=i != last)
        for i, (path, name) in enumerate(zip(samples, names, strict=True))
    ]
    slider = tag("input", type="range", min="0", max=str(last), value=str(last), aria_label="training step")
    caption = tag("figcaption", slider if last else "", tag("output", names[-1]))
    return tag(
        "figure", _enlarges(joined(frames, ""), "whole"), caption, class_="grid film", data_names=json.dumps(names)
    )


def _when(path: Path) -> str:
    """The step a grid was made at, with its stage where it has one."""
    stage = path.parent.parent.name
    step = f"step {int(path.stem):,}" if path.stem.isdecimal() else path.stem
    return f"{stage.replace('_', ' ')}, {step}" if stage.startswith("stage_") else step


DIALOG = tag(
    "dialog",
    tag("div", class_="stage"),
    tag("p"),
    tag(
        "div",
        tag("button", "before", type="button", data_move="-1"),
        tag("button", "close", type="button", data_move="0"),
        tag("button", "next", type="button", data_move="1"),
        class_="moves",
    ),
    aria_label="enlarged pictures",
)
"""what enlarged pictures are shown in; one on each page"""

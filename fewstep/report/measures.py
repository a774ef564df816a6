"""How the numbers of a table read: their names, which way is better, what they mean; the table for the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_LOST_SHOWN = 8
_LARGEST = 10**300


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


def measure_of(column: str) -> Measure:
    """The measure of a column; one that nobody has described goes by its name."""
    return MEASURES.get(column, Measure(column.replace("_", " "), "", "", ".4g"))


def is_number(value: Any) -> bool:
    """Whether it can be drawn, also as a NaN; an integer can be larger than what a float holds."""
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def shown(column: str, value: Any) -> str:
    """A cell: a number in the format of its column, a dash for what was not measured."""
    if value is None:
        return "-"
    if not is_number(value):
        return str(value)
    return format(value, measure_of(column).digits) if math.isfinite(value) else "not finite"


def columns_of(table: Json) -> list[str]:
    """The columns that at least one row has a value for."""
    return [c for c in table.get("columns", []) if any(row.get(c) is not None for row in table["rows"])]


def best(column: str, values: Sequence[Any]) -> set[int]:
    """Which of several numbers are the best; nothing where a measure has no better side or all are equal."""
    distance = {"lower": lambda v: v, "higher": lambda v: -v, "near 1": lambda v: abs(v - 1)}
    side = distance.get(measure_of(column).better)
    told = {i: side(v) for i, v in enumerate(values) if side and is_number(v) and math.isfinite(v)}
    least = min(told.values(), default=0)
    return {i for i, v in told.items() if v == least} if len(set(told.values())) > 1 else set()


def as_text(table: Json) -> str:
    """The table for the terminal, in ASCII: a line for each measure, a column for each model, then what was lost.

    `table` is what table.json holds: protocol, columns, rows with a name and a value (or None) for each column.
    """
    rows = table["rows"]
    lines = [["measure", *(str(row["name"]) for row in rows), "better"]]
    for column in columns_of(table):
        lines.append([column, *(shown(column, row.get(column)) for row in rows), measure_of(column).better])
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

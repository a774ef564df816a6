"""The statistics that tell a healthy run from an ill one, and their limits: the doctor and the alarms read both here.

The limits were chosen on runs of the built-in flow teacher at 16x16 with 16 to 64 samples a batch, 120 to 6,000 steps:
healthy ones of every objective, and runs made ill on purpose. Each statistic is a ratio or a share within one run, so
that it carries over to other data; what was seen on either side stands beside its limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

MOVES = 20
"""generator moves that a statistic is averaged over, at the least"""
LAG = 1.0
SPREAD = 0.35
SATURATED = 0.05
LABEL = 0.25
ACCURACY = 0.5
WINNING = 0.95
GUIDANCE = 3.0


@dataclass(frozen=True)
class Sign:
    """A statistic, in words with its numbers, and whether it is beyond its limit."""

    ill: bool
    words: str

    def __str__(self) -> str:
        return self.words


def values(rows: Iterable[Row], key: str) -> list[float]:
    """The finite numbers that are logged under `key`."""
    return [float(row[key]) for row in rows if _number(row.get(key)) and math.isfinite(row[key])]


def mean(rows: Iterable[Row], key: str) -> float | None:
    """The mean of what is logged under `key`; None where nothing is."""
    found = values(rows, key)
    return sum(found) / len(found) if found else None


def not_finite(row: Row) -> list[str]:
    """The keys of `row` whose values are nan or infinite."""
    return [key for key, value in row.items() if _number(value) and not math.isfinite(value)]


def moved(rows: Iterable[Row]) -> list[Row]:
    """The rows of steps at which the generator moved and was looked at."""
    return [row for row in rows if "x0/std" in row]


def saturation(rows: Sequence[Row], start: Sequence[Row]) -> Sign | None:
    """Share of values beyond 1 in size, beside that of the data, or of the first samples where no data is logged."""
    share, data, first = mean(rows, "x0/saturated"), mean(rows, "data/saturated"), mean(start, "x0/saturated")
    if share is None or first is None:
        return None
    limit = SATURATED + (1.5 * data if data is not None else 5 * first)
    beside = f"{data:.1%} of the data's" if data is not None else f"{first:.1%} at the start"
    return Sign(share > limit, f"{share:.1%} of the samples' values are beyond 1 in size ({beside}, limit {limit:.1%})")


def spread(rows: Sequence[Row], start: Sequence[Row]) -> Sign | None:
    """How far the samples of a batch lie apart, as a share of how far images do, or the first samples did."""
    own, data, first = mean(rows, "x0/spread"), mean(rows, "data/spread"), mean(start, "x0/spread")
    beside = data if data is not None else first
    if own is None or not beside:
        return None
    limit, other = (SPREAD, "images of the data do") if data is not None else (0.5, "at the start")
    words = f"samples of a batch lie apart {own / beside:.2f} times as far as {other} (limit {limit})"
    return Sign(own / beside < limit, words)


def lag(rows: Sequence[Row]) -> Sign | None:
    """The worst sum lag / sum gap^2 over MOVES moves in a row.

    A critic F that has gone the share a of the way from the teacher R to the score F* of the generator, F = R +
    a (F* - R), has E[lag] = a (1 - a) |F* - R|^2 and gap^2 = a^2 |F* - R|^2, so the ratio is (1 - a) / a: 0 for one
    that knows the generator, below 0 for one that overshoots.
    """
    both = [(row["lag"], row["gap"]) for row in rows if values([row], "lag") and values([row], "gap")]
    blocks = [both[i : i + MOVES] for i in range(0, len(both) - MOVES + 1, MOVES)]
    ratios = [sum(b for b, _ in block) / g for block in blocks if (g := sum(gap * gap for _, gap in block))]
    if not ratios:
        return None
    worst = max(ratios)
    first = 1 + MOVES * ratios.index(worst)
    words = f"critic lag over squared score gap is at most {worst:.2f}, in moves {first} to {first + MOVES - 1}"
    return Sign(worst > LAG, f"{words} (limit {LAG:g})")


def label(rows: Sequence[Row]) -> Sign | None:
    """How much of the samples' spread their label explains, beside the data's."""
    own, data = mean(rows, "x0/label"), mean(rows, "data/label")
    if own is None or data is None or data < 0.02:
        return None
    words = (
        f"the label explains {own:.1%} of the samples' spread and {data:.1%} of the data's (limit a quarter of that)"
    )
    return Sign(own < LABEL * data, words)


def accuracy(row: Row) -> Sign | None:
    """The share of measured samples that show what was asked for."""
    for key in ("label_accuracy", "caption_accuracy"):
        if values([row], key):
            return Sign(row[key] < ACCURACY, f"{row[key]:.1%} of the measured samples show what was asked for")
    return None


def winning(rows: Sequence[Row], recent: Sequence[Row]) -> Sign | None:
    """How often the discriminator is right, and what that leaves for the generator's loss."""
    if not recent:
        return None
    right, loss = mean(rows[len(rows) // 2 :], "gan/accuracy"), mean(recent, "gan/generator")
    if right is None or loss is None:
        return None
    words = f"the discriminator is right {right:.1%} of the time (limit {WINNING:.0%}; generator's part {loss:.2f})"
    return Sign(right > WINNING, words)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

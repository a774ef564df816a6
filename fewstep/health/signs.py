"""The statistics that tell a healthy run from an ill one, and their limits: the doctor and the alarms read both here.

The limits were chosen on runs of the built-in flow teacher at 16x16, 16 to 64 samples a batch, 100 to 6,600 steps:
some forty healthy stages of every objective, and runs made ill on purpose (tests/test_doctor.py plays both again). Each
statistic is a ratio or a share within one run, so that it carries over to other data; what was seen on either side
stands beside its limit. No run has collapsed or lost to its discriminator yet: SPREAD, SHRUNK and WON lie far from what
healthy ones show, and that is all that is known of them.
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
"""largest lag / gap^2: -0.8 to 0.1 healthy; 2.1 in the first 20 moves of a critic at a hundredth of its rate"""
PULL = 2.0
"""largest gap / deviation of a guided run: 3.9 at guidance 30, and 14 at its first move, so 1 at guidance 3"""
ASTRAY = 1.0
"""the same without guidance: 0.1 to 0.5 healthy; 1.3 with a critic at ten times its rate"""
SATURATED = 0.05
"""share of values beyond 1 that the data does not have: 0 to 0.004 healthy; 0.33 at a hundred times the rate"""
SPREAD = 0.35
"""least distance within a batch, in those of the data: 0.7 to 1 healthy; counts only below 0.7 of the start"""
SHRUNK = 0.5
"""the same in those of the start, where no data is logged: 1 to 1.4 healthy"""
LABEL = 0.25
"""least share of the spread that labels explain, in those of the data: 1 to 4 healthy; 0 from a teacher without"""
ACCURACY = 0.5
"""least share of measured samples that show what was asked for: 0.98 to 1 healthy; 1 / 12 by chance"""
WON = 4.0
"""largest softplus(-D) of the generator: 0.7 to 1.3 healthy, 1.8 in ill runs; at 4 the odds are 50 to 1 against it"""
SWALLOWED = 0.9
"""largest part of the critic's loss that is the discriminator's: 0.1 to 0.6 healthy; 0.99 at a weight of 10"""


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
    limit = min(0.8, SATURATED + (1.5 * data if data is not None else 5 * first))
    beside = f"{data:.1%} of the data's" if data is not None else f"{first:.1%} at the start"
    return Sign(share > limit, f"{share:.1%} of the samples' values are beyond 1 in size ({beside}, limit {limit:.1%})")


def spread(rows: Sequence[Row], start: Sequence[Row]) -> Sign | None:
    """How far the samples of a batch lie apart, beside how far the first samples did.

    Where data is logged its images count too. A student that starts with averages is not collapsed while it has them.
    """
    own, first, data = mean(rows, "x0/spread"), mean(start, "x0/spread"), mean(rows, "data/spread")
    if own is None or not first:
        return None
    limit = SHRUNK * first if data is None else min(0.7 * first, SPREAD * data)
    beside = f"{first:.3f} at the start" + ("" if data is None else f", {data:.3f} in the data")
    return Sign(own < limit, f"samples of a batch lie {own:.3f} apart ({beside}, limit {limit:.3f})")


def pull(rows: Sequence[Row], limit: float = PULL) -> Sign | None:
    """The score gap as a share of the samples' deviation: how far the scores would carry a sample in one go."""
    gap, std = mean(rows, "gap"), mean(rows, "x0/std")
    if gap is None or not std:
        return None
    words = f"the score gap is {gap / std:.2f} times the samples' deviation (limit {limit:g})"
    return Sign(gap / std > limit, words)


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
    words = f"labels explain {own:.1%} of the samples' spread and {data:.1%} of the data's (limit a quarter of that)"
    return Sign(own < LABEL * data, words)


def accuracy(row: Row) -> Sign | None:
    """The share of measured samples that show what was asked for."""
    for key in ("label_accuracy", "caption_accuracy"):
        if values([row], key):
            return Sign(row[key] < ACCURACY, f"{row[key]:.1%} of the measured samples show what was asked for")
    return None


def won(rows: Sequence[Row]) -> Sign | None:
    """What a discriminator leaves for the generator: softplus(-D)."""
    loss = mean(rows, "gan/generator")
    words = f"the generator's part of the GAN is {loss or 0:.2f} (limit {WON:g})"
    return None if loss is None else Sign(loss > WON, words)


def swallowed(rows: Sequence[Row], weight: float) -> Sign | None:
    """The discriminator's part of the loss that it shares with the critic's denoising."""
    part, whole = mean(rows, "gan/critic"), mean(rows, "fake_score/loss")
    if part is None or not whole:
        return None
    share = weight * part / whole
    words = f"{share:.0%} of the critic's loss is the discriminator's (limit {SWALLOWED:.0%})"
    return Sign(share > SWALLOWED, words)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

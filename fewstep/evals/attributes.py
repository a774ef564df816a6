"""What attributes read from generated images say: right labels, right law, and which rare values are kept.

`attributes` maps names to value names in the order of the columns read; the first two make up the label
(first * values of second + second) and `law` gives the exact joint share of the values of all the others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import betaincinv
from torch import Tensor

Attributes = Mapping[str, Sequence[str]]
Law = Mapping[tuple[str, ...], float]

_LABEL = 2
_RARE = 0.05
_RARE_PAIR = 0.002
_LOST = 0.25
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class RareRow:
    """One rare value or pair: its share in truth and among the generated, and whether it is lost."""

    name: str
    true_share: float
    share: float
    upper: float
    lost: bool


def label_accuracy(read: Tensor, labels: Tensor, attributes: Attributes) -> float:
    """Share of `read` (N,A) whose first two attributes are both those of the requested `labels` (N,)."""
    second = len(list(attributes.values())[1])
    return (read[:, 0] * second + read[:, 1] == labels).double().mean().item()


def law_distance(read: Tensor, attributes: Attributes, law: Law) -> float:
    """Total variation, half the sum of |generated - exact| shares over all cells, in [0,1].

    It does not vanish for a finite sample of truth: compare with the same number of true samples.
    """
    cells = Counter(_cells(read, attributes, law))
    shares = {cell: count / len(read) for cell, count in cells.items()}
    return 0.5 * sum(abs(shares.get(cell, 0.0) - law.get(cell, 0.0)) for cell in shares.keys() | law.keys())


def upper_bound(count: int, total: int) -> float:
    """One-sided 95 % upper bound of a binomial share (Clopper & Pearson 1934)."""
    return 1.0 if count == total else float(betaincinv(count + 1, total - count, _CONFIDENCE))


def rare_kept(read: Tensor, attributes: Attributes, law: Law) -> list[RareRow]:
    """A row for each value below 5 % and each pair of values of two attributes between 0.2 % and 5 %.

    Pairs in which one value implies the other say nothing new and are left out. A row is lost when even the
    upper bound of its generated share is below a quarter of its true share.
    """
    names = list(attributes)[_LABEL:]
    cells = _cells(read, attributes, law)
    single = {columns: _marginal(law, columns) for columns in itertools.combinations(range(len(names)), 1)}
    rows = []
    for columns, shares in single.items():
        rare = {values: share for values, share in shares.items() if 0 < share < _RARE}
        rows += [_row(names, columns, values, share, cells) for values, share in rare.items()]
    for columns in itertools.combinations(range(len(names)), 2):
        for values, share in _marginal(law, columns).items():
            parts = [single[column,][value,] for column, value in zip(columns, values, strict=True)]
            if _RARE_PAIR <= share < _RARE and share < min(parts) - 1e-9:
                rows.append(_row(names, columns, values, share, cells))
    return rows


def _cells(read: Tensor, attributes: Attributes, law: Law) -> list[tuple[str, ...]]:
    """The cell of the law that each row of `read` (N,A) falls in; ValueError when law and names differ."""
    values = list(attributes.values())[_LABEL:]
    if any(len(cell) != len(values) for cell in law):
        raise ValueError(f"The law must name one value for each of {list(attributes)[_LABEL:]}.")
    rows = read[:, _LABEL:].tolist()
    return [tuple(names[i] for names, i in zip(values, row, strict=True)) for row in rows]


def _marginal(law: Law, columns: Sequence[int]) -> dict[tuple[str, ...], float]:
    shares: dict[tuple[str, ...], float] = {}
    for cell, share in law.items():
        values = tuple(cell[column] for column in columns)
        shares[values] = shares.get(values, 0.0) + share
    return shares


def _row(
    names: Sequence[str],
    columns: Sequence[int],
    values: tuple[str, ...],
    share: float,
    cells: Sequence[tuple[str, ...]],
) -> RareRow:
    count = sum(tuple(cell[column] for column in columns) == values for cell in cells)
    upper = upper_bound(count, len(cells))
    name = " & ".join(f"{names[column]}={value}" for column, value in zip(columns, values, strict=True))
    return RareRow(name, share, count / len(cells), upper, upper < _LOST * share)

"""Captions of scenes with one thing altered: the wrong captions that are hardest to tell from the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.data.captioned import ATTRIBUTES, exchanged

# What can be altered: one word, or which of two objects is named first.
CHANGES = ("kind", "colour", "size", "second kind", "second colour", "second size", "relation", "order")
_COLUMN = {name: column for column, name in enumerate(ATTRIBUTES)}


def altered(said: Tensor, change: str, draw: Draw) -> Tensor:
    """What captions say, `said` (N,K), with one of CHANGES made, each other value equally likely.

    A row that says nothing about it stays as it is. An altered caption can still be true of its scene, as `order` is of
    two objects that are alike, so ask `holds`.
    """
    if change == "order":
        return torch.where(said[:, _COLUMN["count"], None] == 1, exchanged(said), said)
    column, values = _COLUMN[change], ATTRIBUTES[change]
    lowest = int(values[0] == "none")
    count, old = len(values) - lowest, said[:, column] - lowest
    other = (old + 1 + draw.integers(f"altered.{change}", count - 1)) % count
    rows = said.clone()
    rows[:, column] = torch.where(old >= 0, other + lowest, said[:, column])
    return rows


def holds(seen: Tensor, asked: Tensor) -> Tensor:
    """(...) bool: whether scenes `seen` (...,K) show all that `asked` (...,K) says, both canonical rows."""
    return ((seen == asked) | (asked < 0)).all(-1)

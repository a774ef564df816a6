"""Distances between images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Distance = Literal["l2", "l1", "huber"]


def distance(a: Tensor, b: Tensor, kind: Distance, c: float = 1e-3) -> Tensor:
    """Mean over all elements of (a - b)^2, |a - b|, or the pseudo-Huber sqrt((a - b)^2 + c^2) - c (LCM)."""
    difference = a.float() - b.float()
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    return ((difference.square() + c * c).sqrt() - c).mean()

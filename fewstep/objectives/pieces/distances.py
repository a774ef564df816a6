"""Distances between images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fewstep.objectives.base import Features

Distance = Literal["l2", "l1", "huber"]
Robust = Literal["l2", "l1", "huber", "sample_huber"]
"""The last is the pseudo-Huber of a whole sample's difference (iCT)."""
Seen = Literal["l2", "l1", "huber", "reader", "lpips"]
"""The last two compare what a frozen network sees."""


def distance(a: Tensor, b: Tensor, kind: Distance, c: float = 1e-3) -> Tensor:
    """Mean over all elements of (a - b)^2, |a - b|, or the pseudo-Huber sqrt((a - b)^2 + c^2) - c (LCM)."""
    difference = a.float() - b.float()
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    return ((difference.square() + c * c).sqrt() - c).mean()


def each(a: Tensor, b: Tensor, kind: Robust, c: float = 1e-3) -> Tensor:
    """The distance (B,) of each sample; sample_huber is sqrt(|a - b|^2 + c^2) - c with c = .00054 sqrt(values)."""
    difference = (a.float() - b.float()).flatten(1)
    if kind == "l2":
        return difference.square().mean(1)
    if kind == "l1":
        return difference.abs().mean(1)
    if kind == "huber":
        return ((difference.square() + c * c).sqrt() - c).mean(1)
    c = 5.4e-4 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c * c).sqrt() - c


def perceived_each(a: Tensor, b: Tensor, features: Features) -> Tensor:
    """The same as `perceived` for each sample, (B,)."""
    pairs = zip(features(a), features(b.detach()), strict=True)
    return sum(((one - other).square().sum(1).reshape(len(a), -1).mean(1) for one, other in pairs), a.new_zeros(len(a)))


def perceived(a: Tensor, b: Tensor, features: Features) -> Tensor:
    """Sum over feature maps of |f(a) - f(b)|^2: over channels a sum, over places and samples the mean."""
    pairs = zip(features(a), features(b.detach()), strict=True)
    return sum(((one - other).square().sum(1).mean() for one, other in pairs), a.new_zeros(()))

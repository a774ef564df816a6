"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1000


@dataclass(frozen=True)
class Neighbours:
    """`precision`, `recall` and `coverage` in [0,1]; `density` is near 1 for equal laws and may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, generated: Tensor, k: int = 5) -> Neighbours:
    """Scores of generated features (M,D) against real features (N,D), both sets larger than `k`.

    A sample's ball reaches to its k-th neighbour in its own set, itself not counted, edge included.
    Raises ValueError when a set is too small.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"Both sets need more than {k} samples, not {len(real)} and {len(generated)}.")
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    in_real_balls = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    recalled, covered = [], []
    for rows, distance in _distances(real, generated):
        inside = distance <= real_radius[rows, None]
        in_real_balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance <= generated_radius).any(1))
    return Neighbours(
        precision=_share(in_real_balls > 0),
        recall=_share(torch.cat(recalled)),
        density=in_real_balls.double().mean().item() / k,
        coverage=_share(torch.cat(covered)),
    )


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of `a` with their distances (rows, M) to `b`."""
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        # the product form of the distance is faster, but its rounding moves points across the edge of a ball
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance (N,) of each point to its k-th neighbour; the nearest of k+1 is the point itself."""
    return torch.cat([distance.kthvalue(k + 1, 1).values for _, distance in _distances(points, points)])

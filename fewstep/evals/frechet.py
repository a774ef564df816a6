"""Distances between two sets of features: Fréchet (Heusel et al. 2017) and kernel (Bińkowski et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1000


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D,D), both float64, of `count` features."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """The statistics of features (N,D), N >= 2; ValueError otherwise."""
        mean, factor = _centred(features)
        return cls(mean, factor.T @ factor, len(features))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and a factor (N,D) whose Gram matrix over rows is the unbiased covariance."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Features must be (N,D) with N >= 2, not {tuple(features.shape)}.")
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians, |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Dowson & Landau (1982), eq. 4. The trace of the root is the sum of the roots of the eigenvalues of the
    symmetric matrix S1^(1/2) S2 S1^(1/2), which are real and, but for rounding, not negative.
    """
    if not _is_finite(a.covariance, b.covariance):
        return float("nan")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    trace = a.covariance.trace() + b.covariance.trace()
    return _distance(a.mean, b.mean, trace, cross)


def frechet_distance_of_features(a: Tensor, b: Tensor) -> float:
    """The same from features (N,D) and (M,D), without a (D,D) matrix when a set is smaller than D.

    With centred factors F1, F2 the trace of the root of the product is the nuclear norm of F1 F2^T (N,M).
    """
    if min(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(Statistics.of(a), Statistics.of(b))
    if not _is_finite(a, b):
        return float("nan")
    (mean_a, factor_a), (mean_b, factor_b) = _centred(a), _centred(b)
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    return _distance(mean_a, mean_b, factor_a.square().sum() + factor_b.square().sum(), cross)


def _is_finite(*parts: Tensor) -> bool:
    """Of what is not, the decompositions raise errors of their own."""
    return all(bool(part.isfinite().all()) for part in parts)


def _distance(mean_a: Tensor, mean_b: Tensor, trace: Tensor, cross: Tensor) -> float:
    return ((mean_a - mean_b).square().sum() + trace - 2 * cross).clamp(min=0).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (N,D) and (M,D) with k(x,y) = (x.y/D + 1)^3; may be below zero.

    Bińkowski et al. (2018), eq. 4 and section 4, over all samples in place of subsets.
    """
    a, b = a.double(), b.double()
    within_a = (_kernel_sum(a, a) - _kernel(a.square().sum(1), a.shape[1]).sum()) / (len(a) * (len(a) - 1))
    within_b = (_kernel_sum(b, b) - _kernel(b.square().sum(1), b.shape[1]).sum()) / (len(b) * (len(b) - 1))
    return (within_a + within_b - 2 * _kernel_sum(a, b) / (len(a) * len(b))).item()


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([_kernel(rows @ b.T, a.shape[1]).sum() for rows in a.split(_ROWS)]).sum()

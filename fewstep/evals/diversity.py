"""How much samples of one label differ from each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_label_diversity(features: Tensor, labels: Tensor, truth: tuple[Tensor, Tensor] | None = None) -> float:
    """Mean distance of two samples of one label, every label of equal weight.

    `features` (N,D), `labels` (N,) int64. `truth` holds the features and labels of true samples; given it,
    the result is the mean over labels of the ratio to truth, so 1 is as diverse as truth and 0 is collapse.
    Labels with fewer than two samples are left out; ValueError when none remains or truth lacks one.
    """
    own = spread(features, labels)
    if not own:
        raise ValueError("No label has two samples, so there is no same-label diversity.")
    if truth is None:
        return sum(own.values()) / len(own)
    true = spread(*truth)
    if not own.keys() <= true.keys():
        raise ValueError(f"Truth lacks two samples of labels {sorted(own.keys() - true.keys())}.")
    return sum(own[label] / true[label] for label in own) / len(own)


def spread(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean pairwise distance of `features` (N,D) within each of `labels` (N,) that has at least two samples."""
    groups = {int(label): features[labels == label].double() for label in torch.unique(labels)}
    return {label: F.pdist(group).mean().item() for label, group in groups.items() if len(group) > 1}

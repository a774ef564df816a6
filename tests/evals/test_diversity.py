from __future__ import annotations

import pytest
import torch

from fewstep.evals.diversity import same_label_diversity

FEATURES = torch.tensor([[0.0], [4.0], [0.0], [1.0], [3.0], [9.0]])
LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


def test_mean_over_labels_of_the_mean_pairwise_distance() -> None:
    # label 0: 4; label 1: the mean of 1, 3 and 2; label 2 has one sample
    assert same_label_diversity(FEATURES, LABELS) == pytest.approx(3)


def test_ratio_to_truth() -> None:
    truth = torch.tensor([[0.0], [8.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
    assert same_label_diversity(FEATURES, LABELS, truth) == pytest.approx((4 / 8 + 2 / 2) / 2)
    assert same_label_diversity(*truth, truth) == 1


def test_gaussians_of_half_the_spread_are_half_as_diverse() -> None:
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3000) % 3
    offsets = 50.0 * labels[:, None]
    truth = points + offsets, labels
    assert same_label_diversity(0.5 * points - offsets, labels, truth) == pytest.approx(0.5, rel=1e-4)
    # the mean distance of two standard normal points in four dimensions is 2 Gamma(5/2) / Gamma(2)
    assert same_label_diversity(*truth) == pytest.approx(2 * 1.3293404, rel=0.02)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        same_label_diversity(torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\[1\]"):
        same_label_diversity(FEATURES, LABELS, (FEATURES[:2], LABELS[:2]))

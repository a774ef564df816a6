from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fewstep.evals.frechet import (
    Statistics,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
)


def gaussian(mean: list[float], covariance: list[list[float]]) -> Statistics:
    return Statistics(torch.tensor(mean).double(), torch.tensor(covariance).double(), 100)


def random_covariance(width: int, seed: int) -> Tensor:
    factor = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.T


def test_statistics_of_three_points() -> None:
    statistics = Statistics.of(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]]))
    assert statistics.mean.tolist() == [2.0, 1.0]
    assert statistics.covariance.flatten().tolist() == pytest.approx([4, 3, 3, 3], abs=1e-12)
    assert statistics.count == 3 and statistics.covariance.dtype == torch.float64
    with pytest.raises(ValueError, match="N >= 2"):
        Statistics.of(torch.zeros(1, 2))


def test_commuting_gaussians() -> None:
    a = gaussian([0, 0], [[4, 0], [0, 9]])
    b = gaussian([3, 4], [[1, 0], [0, 25]])
    # 3^2 + 4^2 + (2 - 1)^2 + (3 - 5)^2
    assert frechet_distance(a, b) == pytest.approx(30, abs=1e-10)


def test_gaussians_that_do_not_commute() -> None:
    a, b = gaussian([0, 0], [[2, 1], [1, 2]]), gaussian([1, 0], [[3, 0], [0, 1]])
    # for two by two matrices tr (S1 S2)^(1/2) is the root of tr(S1 S2) + 2 det(S1 S2)^(1/2): here 8 and 9
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 4 - 2 * math.sqrt(8 + 2 * 3), abs=1e-10)


def test_against_the_matrix_root_of_scipy() -> None:
    one, two = random_covariance(12, 0), random_covariance(12, 1)
    a = Statistics(torch.zeros(12).double(), one, 100)
    b = Statistics(torch.zeros(12).double(), two, 100)
    root = np.real(np.trace(scipy.linalg.sqrtm((one @ two).numpy())))
    expected = float(one.trace() + two.trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero() -> None:
    singular = Statistics.of(torch.randn(50, 8, generator=torch.Generator().manual_seed(2)) * torch.arange(8))
    assert frechet_distance(singular, singular) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [(10, 12), (10, 200)])
def test_fewer_samples_than_features_agree_with_the_full_route(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(counts[0], 40, generator=generator).double()
    b = 2 * torch.randn(counts[1], 40, generator=generator).double() + 1
    full = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert frechet_distance_of_features(a, b) == pytest.approx(full, rel=1e-6)


def test_two_pairs_of_points_in_many_dimensions() -> None:
    a, b = torch.zeros(2, 30), torch.zeros(2, 30)
    a[1, 0], b[1, 0], b[:, 7] = 2, 6, 5
    # means differ by 2 and 5; standard deviations 2^(1/2) and 3 * 2^(1/2) along one axis
    assert frechet_distance_of_features(a, b) == pytest.approx(4 + 25 + 8, abs=1e-10)


def test_kernel_distance_by_hand() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    # within: 1^3 and 3^3; across: the mean of 1, 1, 8 and 27
    assert kernel_distance(a, b) == pytest.approx(1 + 27 - 2 * 37 / 4, abs=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    points = torch.randn(40, 200, 4, generator=torch.Generator().manual_seed(4))
    values = torch.tensor([kernel_distance(half[:100], half[100:]) for half in points])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * values.std() / 40**0.5


def test_clean_fid_finds_the_same_in_the_same_features() -> None:
    """Its Frechet distance to 1e-4 relative; its KID, one subset of everything, to 1e-6 relative."""
    from cleanfid import fid

    a, b = torch.randn(400, 32), 1.2 * torch.randn(400, 32) + 0.3
    one, two = Statistics.of(a), Statistics.of(b)
    theirs = fid.frechet_distance(*(x.numpy() for x in (one.mean, one.covariance, two.mean, two.covariance)))
    assert frechet_distance(one, two) == pytest.approx(theirs, rel=1e-4)
    kernel = fid.kernel_distance(a.double().numpy(), b.double().numpy(), num_subsets=1, max_subset_size=400)
    assert kernel_distance(a, b) == pytest.approx(kernel, rel=1e-6)


@pytest.mark.parametrize("count", [100, 5])
def test_features_that_are_no_numbers_have_no_distance(count: int) -> None:
    spoiled = torch.randn(count, 8)
    spoiled[1, 2] = math.nan
    assert math.isnan(frechet_distance_of_features(spoiled, torch.randn(count, 8)))
    assert math.isnan(frechet_distance_of_features(torch.randn(count, 8), spoiled))

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evals.neighbours import Neighbours, neighbours


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_points_on_a_line_by_hand() -> None:
    real, generated = column(0, 1, 2, 10), column(0.5, 20, 21)
    # real radii 1, 1, 1, 8: the balls of 0 and 1 hold 0.5, and none holds 20 or 21
    # generated radii 19.5, 1, 1: the ball of 0.5 holds every real point
    scores = neighbours(real, generated, k=1)
    assert scores.precision == pytest.approx(1 / 3)
    assert scores.recall == 1
    assert scores.density == pytest.approx(2 / 3)
    assert scores.coverage == 0.5


def test_equal_sets_and_sets_far_apart() -> None:
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    same = neighbours(points, points)
    # every ball holds its own centre and exactly five more
    assert same == Neighbours(1, 1, pytest.approx(6 / 5), 1)
    assert neighbours(points, points + 1000) == Neighbours(0, 0, 0, 0)


def test_a_lost_mode_costs_recall_and_coverage_but_not_precision() -> None:
    mode = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    real = torch.cat([mode, mode + 100])
    assert neighbours(real, mode) == Neighbours(1, 0.5, pytest.approx(6 / 5), 0.5)
    assert neighbours(mode, real) == Neighbours(0.5, 1, pytest.approx(3 / 5), 1)


def test_an_outlier_moves_precision_but_not_density() -> None:
    # 20 real points on a grid of step 1, and one at 1000 whose ball reaches from 14 to 1986
    real = torch.cat([torch.arange(20.0), torch.tensor([1000.0])])[:, None]
    generated = column(*range(100, 200))
    scores = neighbours(real, generated, k=5)
    assert scores.precision == 1
    assert scores.density == pytest.approx(1 / 5)
    assert scores.coverage == pytest.approx(1 / 21)


def test_more_rows_than_one_chunk() -> None:
    points = torch.randn(2300, 2, generator=torch.Generator().manual_seed(2))
    assert neighbours(points, points) == Neighbours(1, 1, pytest.approx(6 / 5), 1)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        neighbours(torch.zeros(5, 2), torch.zeros(9, 2))


def test_scores_are_those_of_plain_loops() -> None:
    """Kynkaanniemi et al. (2019) and Naeem et al. (2020) written out in numpy, sample by sample."""
    generator = np.random.default_rng(4)
    real, made, k = generator.normal(size=(60, 3)), generator.normal(0.4, 1.1, size=(50, 3)), 5

    def radii(points: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(points - one, axis=1))[k] for one in points]

    balls, own = radii(real), radii(made)
    inside = [[np.linalg.norm(m - r) <= ball for r, ball in zip(real, balls, strict=True)] for m in made]
    within = [[np.linalg.norm(m - r) <= ball for m, ball in zip(made, own, strict=True)] for r in real]
    found = neighbours(torch.from_numpy(real), torch.from_numpy(made), k)
    assert found.precision == pytest.approx(np.mean([any(row) for row in inside]))
    assert found.recall == pytest.approx(np.mean([any(row) for row in within]))
    assert found.density == pytest.approx(np.sum(inside) / (k * len(made)))
    assert found.coverage == pytest.approx(np.mean([any(column) for column in zip(*inside, strict=True)]))
    assert 0 < found.recall < 1 and 0 < found.coverage < 1

"""Damage done on purpose is seen by the metrics that should see it, and not by those that should not."""

from __future__ import annotations

import pytest
import torch

from tools import sensitivity
from tools.sensitivity import SEEN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, float]]]:
    return sensitivity.seen(samples=1000, draws=4)


@pytest.mark.parametrize(
    ("damage", "strength", "metrics"),
    [
        ("blur (pixels)", "0.6", ("frechet", "kernel", "precision", "density")),
        ("dropped modes (share)", "0.2", ("frechet", "recall", "coverage", "law_distance", "rare_lost")),
        ("shifted colour", "0.3", ("frechet", "kernel", "precision", "density")),
        ("duplicates (share)", "0.8", ("frechet", "recall", "coverage", "law_distance")),
    ],
)
def test_strong_damage_is_seen(damage: str, strength: str, metrics: tuple[str, ...], found) -> None:
    assert {name: found[damage][strength][name] > SEEN for name in metrics} == dict.fromkeys(metrics, True)


def test_fidelity_does_not_see_lost_modes_and_the_law_does_not_see_blur(found) -> None:
    assert found["dropped modes (share)"]["0.2"]["precision"] < SEEN
    assert found["blur (pixels)"]["0.4"]["law_distance"] < SEEN


def test_the_first_to_see_is_named_with_the_strength() -> None:
    low, high = {"frechet": 1.0, "recall": 5.0}, {"frechet": 9.0, "recall": 8.0}
    assert sensitivity.first_seen({"x": {"0.1": low, "0.2": high}, "y": {"0.1": {"frechet": 0.0}}}) == {
        "x": "recall at 0.1",
        "y": "none",
    }


def test_damage_of_strength_zero_is_none() -> None:
    images, _, rows = sensitivity.drawn(1, 48)
    for damage in (sensitivity.dropped_modes, sensitivity.shifted_colour, sensitivity.duplicates):
        assert torch.equal(damage(images, rows, 0.0), images)
    assert (sensitivity.blur(images, rows, 0.01) - images).abs().max() < 1e-6

"""Modes of a 2-D mixture with a component of 5 %: counted rightly, and kept by the divergences that must keep them."""

from __future__ import annotations

import sys

import pytest
import torch

sys.path.insert(0, "tools")
import mixture

from fewstep.core.draw import Draw


def test_shares_of_true_samples_are_the_weights() -> None:
    """To four deviations of sampling; what lies far from every component belongs to none."""
    true = mixture.drawn(Draw(0, 0, torch.arange(20_000)))
    for share, weight in zip(mixture.shares(true), mixture.WEIGHTS.tolist(), strict=True):
        assert share == pytest.approx(weight, abs=4 * (weight * (1 - weight) / 20_000) ** 0.5 + 0.001)
    assert mixture.shares(torch.full((10, 2), 9.0)) == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward kl", "jeffreys"])
def test_divergences_that_cover_keep_the_rare_mode(divergence: str) -> None:
    """From a rough map of the teacher's, 1000 steps: at least 1 % of 5 %."""
    before = mixture.made(mixture.started("rough", 0)[0])
    after = mixture.run(f"f_distill, {divergence}", "rough", 0, 1000)
    assert before.kept and after.kept
    assert all(
        share > 0.8 * weight - 0.01 for share, weight in zip(after.shares, mixture.WEIGHTS.tolist(), strict=True)
    )

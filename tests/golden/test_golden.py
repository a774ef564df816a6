"""Ten steps of every objective against recorded losses: a refactor must not change what is computed.

The tolerance is 1e-4 relative. On one machine the curves are equal to the last digit; another processor or number of
threads sums in another order, about 1e-7 a step, which ten steps of training carry to some 1e-5 at worst. A formula,
a draw or a default that changes moves a curve by 1e-3 or more. After a change that is meant, record them again with

    python -m tests.golden.make
"""

from __future__ import annotations

import json

import pytest
from make import CASES, FILE, STEPS, curves

RECORDED = json.loads(FILE.read_text()) if FILE.exists() else {}


def test_every_objective_has_a_recorded_curve() -> None:
    assert set(RECORDED) == set(CASES)
    for case, recorded in RECORDED.items():
        players = {name.split("/")[0] for name in recorded}
        assert "generator" in players and all(f"{player}/loss" in recorded for player in players), case
        assert max(len(values) for values in recorded.values()) == STEPS


@pytest.mark.parametrize("case", CASES)
def test_losses_are_as_recorded(case: str) -> None:
    found = curves(case)
    assert found.keys() == RECORDED[case].keys()
    for name, values in found.items():
        assert values == pytest.approx(RECORDED[case][name], rel=1e-4), name

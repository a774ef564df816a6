"""Killed while it makes pairs, writes a checkpoint or evaluates, a run that is resumed ends as if left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.harness import Server
from tests.faults.kills import SCENES, Whole, killed, moments, whole


@pytest.fixture(scope="module")
def gan(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Pairs, regression, and DMD2 with a GAN, left alone."""
    scene = SCENES["pairs_then_gan"]
    without_table = replace(scene, more=(*scene.more, "evals.samples=0"))
    return whole(server, without_table, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("phase", ["pairs", "checkpoint", "evaluation"])
def test_killed_and_resumed_a_run_is_the_same_to_the_bit(
    phase: str, server: Server, gan: Whole, tmp_path: Path
) -> None:
    (moment,) = moments(gan, seed=len(phase), count=1, phases=(phase,))
    outcome = killed(server, gan, moment, tmp_path)
    assert outcome.faults == [] and outcome.resumed

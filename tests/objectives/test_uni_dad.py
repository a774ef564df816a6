from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Featured,
    Law,
    Renamed,
    adam,
    at,
    gaussian_triad,
    keep_critic_exact,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    told_batch,
    whitened,
)

from fewstep import build, config
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.score_gap import abs_mean
from fewstep.objectives.uni_dad import Config, Objective

TARGET: Law = (2.0, 0.7)


def toward(share: float, target: Law = TARGET, critic: Law = (0.2, 0.9), **changes) -> Objective:
    base = gaussian_triad(Flow(), "flow_prediction", critic=critic)
    second = Guided(GaussianModel(*target, Flow(), "flow_prediction"))
    triad = Triad(base.generator, base.real_score, base.fake_score, second)
    config = {"gan_weight": 0.0, "ratio": 1, "target_teacher": "given", "target_share": share, "gan_taps": ["trunk"]}
    return Objective(Config(**{**config, **changes}), triad, one_step())


def gradient(objective: dmd2.Objective, batch) -> list[float]:
    turn = play(objective, batch)["generator"]
    return [turn["generator.mean"], turn["generator.std"]]


@pytest.mark.parametrize("gan", [{}, {"gan_weight": 0.5, "gan_critic_weight": 0.7}])
def test_without_a_share_of_the_target_it_is_dmd2(gan: dict) -> None:
    """Losses and every gradient of both players, with a discriminator and without."""
    ours = toward(0.0, **gan)
    critic = Featured(0.2, 0.9, Flow(), "flow_prediction")
    ours.triad = replace(ours.triad, fake_score=critic)
    base = dmd2.Objective(dmd2.Config(**{"gan_weight": 0.0, "ratio": 1, **gan}), ours.triad, one_step())
    if gan:
        ours.taps = base.taps
        base.attach(torch.zeros(2, 32), Condition())
        ours.heads = base.heads
    for step in range(3):
        one, other = (play(o, real_batch(step, draw=Renamed), step) for o in (ours, base))
        for player in ("generator", "fake_score"):
            assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
            assert one[player].gradients.keys() == other[player].gradients.keys()
            for name, expected in other[player].gradients.items():
                assert torch.allclose(one[player].gradients[name], expected, rtol=1e-5, atol=1e-8)
        assert abs(other["generator"]["generator.mean"]) > 1e-3


def test_with_one_teacher_twice_the_share_does_not_matter() -> None:
    batch = told_batch(*whitened(2))
    found = [gradient(toward(share, TEACHER), batch) for share in (0.0, 0.3, 1.0)]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    assert gradient(toward(0.3), batch) != pytest.approx(found[0], rel=1e-2)


def test_each_teacher_has_its_own_normaliser() -> None:
    noise, eps = whitened(2)
    objective, batch = toward(0.25, times=at(0.6)), told_batch(noise, eps)
    sample = objective.sample(batch, 0, False)
    got = objective.gradient(batch, sample, objective.look(batch, sample))
    x, rows, triad = STUDENT[0] + STUDENT[1] * noise, torch.full((64,), 0.6), objective.triad
    with torch.no_grad():
        nets = (triad.fake_score, triad.real_score, triad.target_score)
        fake, source, target = (net(0.4 * x + 0.6 * eps, rows, batch.cond).x0 for net in nets)
    expected = 0.75 * (fake - source) / abs_mean(x, source) + 0.25 * (fake - target) / abs_mean(x, target)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_learns_a_compromise_and_no_mixture() -> None:
    """N(1, .7^2) and N(2, .7^2) in equal shares, exact critic: N(1.4996, .711^2), simulated, within 2 %.

    A mixture of the two has the deviation .86.
    """
    objective = toward(0.5, critic=STUDENT)
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 800), adam(1e-9)), 800, size=64)
    assert law_of(objective) == pytest.approx((1.4996, 0.711), rel=0.02)


@pytest.mark.slow
def test_learns_the_compromise_with_a_learned_critic() -> None:
    objective = toward(0.5, critic=STUDENT, ratio=5)
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    assert law_of(objective) == pytest.approx((1.4996, 0.711), rel=0.04)


@pytest.mark.parametrize(
    "wrong", [{}, {"target_teacher": "a", "target_share": 1.1}, {"target_teacher": "a", "ratio": 0}]
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_a_run_loads_its_target_teacher_and_keeps_it_frozen(tmp_path: Path) -> None:
    """From a pipeline folder; the source's weights stay what they are, and a folder without a model is refused."""
    told = ["device=cpu", "model.guidance=1.5"]
    (given,) = config.load("configs/scenes/uni_dad.yaml", told)
    run = build.build(given)
    source, target = run.triad.real_score, run.triad.target_score
    assert source.scale == target.scale == 1.5 and set(run.players) == {"generator", "fake_score"}  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    run.teacher.net.conv_out.bias.data += 1
    assert not torch.equal(source.inner.net.conv_out.bias, target.inner.net.conv_out.bias)  # type: ignore[union-attr]
    run.teacher.net.conv_out.bias.data += 1
    run.teacher.net.save_pretrained(tmp_path / "other")
    (given,) = config.load("configs/scenes/uni_dad.yaml", [*told, f"objective.target_teacher={tmp_path / 'other'}"])
    other = build.build(given).triad
    moved = other.target_score.inner.net.conv_out.bias - other.real_score.inner.net.conv_out.bias  # type: ignore[union-attr]
    assert torch.allclose(moved, torch.full_like(moved, 2.0), atol=1e-5)
    (given,) = config.load("configs/scenes/uni_dad.yaml", [*told, f"objective.target_teacher={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="none"):
        build.build(given)

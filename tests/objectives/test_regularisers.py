"""What can be added to another objective in a `sum`: distance to pairs, moments of samples, a reward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Law,
    Renamed,
    adam,
    gaussian_triad,
    keep_critic_exact,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    told_batch,
    walk,
    whitened,
)

from fewstep import build, config
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.objectives import dmd, moment, paired, reward
from fewstep.objectives import sum as summed
from fewstep.objectives.base import Objective, Triad

LATE = Times(low=0.3, high=0.3000001)
GAP = {"name": "dmd", "weight": "snr", "regression": 0.0, "times": LATE, "critic_times": LATE}


def beside(*terms: dict, triad: Triad | None = None) -> summed.Objective:
    triad = triad or gaussian_triad(Flow(), "flow_prediction")
    return summed.Objective(summed.Config(terms=[GAP, *terms]), triad, one_step())


def with_pairs(step: int) -> Batch:
    batch = real_batch(step, draw=Renamed)
    return replace(batch, pair=Pair(batch.draw.normal("z", (32,)), batch.draw.normal("y", (32,)), Condition()))


@pytest.mark.parametrize("distance", ["l2", "l1", "huber"])
def test_pairs_beside_a_gap_are_dmd_with_its_regression(distance: str) -> None:
    """Losses and gradients of both players, with the weight of the regression as the term's scale."""
    triad = gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
    ours = beside({"name": "paired", "distance": distance, "scale": 0.7}, triad=triad)
    whole = {**GAP, "regression": 0.7, "distance": distance}
    theirs = dmd.Objective(dmd.Config(**whole), triad, one_step())  # type: ignore[arg-type]
    for step in range(2):
        one, other = play(ours, with_pairs(step), step), play(theirs, with_pairs(step), step)
        for player in ("generator", "fake_score"):
            assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
            for name, gradient in other[player].gradients.items():
                assert torch.allclose(one[player].gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_pairs_and_fresh_noise_do_not_go_together() -> None:
    with pytest.raises(UserError, match="transition=ode, or leave it out"):
        paired.Objective(paired.Config(), gaussian_triad(Flow(), "flow_prediction"), walk((1.0, 0.5)))


def moments(law: Law, of: Law) -> tuple[float, float, float]:
    """Loss and gradient of the moment term for a student of exactly `law`, held to those of `of`."""
    noise, eps = whitened(2, rows=1, dims=4096)
    triad = gaussian_triad(Flow(), "flow_prediction", student=law)
    turn = play(
        moment.Objective(moment.Config(mean=of[0], variance=of[1] ** 2), triad, one_step()), told_batch(noise, eps)
    )
    return turn["generator"].loss, turn["generator"]["generator.mean"], turn["generator"]["generator.std"]


def test_the_moment_term_is_the_divergence_of_two_gaussians() -> None:
    """And its slopes (m - m') / s'^2 and s / s'^2 - 1 / s; nothing where the moments are right."""
    (m, s), (mean, std) = STUDENT, TEACHER
    divergence = math.log(std / s) + (s**2 + (m - mean) ** 2) / (2 * std**2) - 0.5
    expected = (divergence, (m - mean) / std**2, s / std**2 - 1 / s)
    assert moments(STUDENT, TEACHER) == pytest.approx(expected, rel=1e-5)
    assert moments(TEACHER, TEACHER) == pytest.approx((0, 0, 0), abs=1e-5)


def test_the_moments_are_those_of_each_sample() -> None:
    """Two samples that are right together and wrong alone are not let through."""
    noise, _ = whitened(2, rows=1, dims=4096)
    x0 = torch.cat([noise - 1, noise + 1])
    objective = moment.Objective(moment.Config(variance=2), gaussian_triad(Flow(), "flow_prediction"), one_step())
    sample = replace(objective.sample(told_batch(x0, x0), 0, False), x0=x0)
    assert x0.var(correction=0).item() == pytest.approx(2, rel=1e-5)
    loss, _ = objective.generator_loss(told_batch(x0, x0), sample, 0)
    assert loss.item() == pytest.approx(0.5 * (1 / 2 + 1 / 2 - 1 - math.log(1 / 2)), rel=1e-5)


def trained(objective: Objective, steps: int = 300) -> Law:
    learn(objective, players_for(objective, adam(3e-2, steps), adam(1e-9)), steps, size=64)
    return law_of(objective)


def test_the_moment_term_alone_ends_at_its_moments() -> None:
    config = moment.Config(mean=0.075, variance=0.81)
    objective = moment.Objective(config, gaussian_triad(Flow(), "flow_prediction"), one_step())
    learn(objective, players_for(objective, adam(2e-2, 500)), 500, size=64)
    assert law_of(objective) == pytest.approx((0.075, 0.9), rel=0.02)


def rewarding(beta: float, slope: float = 1.0) -> summed.Objective:
    objective = beside({"name": "reward", "reward": "mine:own", "scale": beta})
    objective.terms[1].reward = lambda x, cond: slope * x.flatten(1).mean(1)
    return objective


def test_the_reward_term_adds_its_slope_alone() -> None:
    """Beside the gap: - beta c in the mean, and of the samples' noise, whose mean is 0, nothing in the deviation."""
    noise, eps = whitened(2)
    plain, tilted = (play(rewarding(beta, 2.0), told_batch(noise, eps)) for beta in (0.0, 0.3))
    for name, expected in (("generator.mean", -0.6), ("generator.std", 0.0)):
        assert tilted["generator"][name] - plain["generator"][name] == pytest.approx(expected, abs=1e-5)
    assert tilted["fake_score"].loss == plain["fake_score"].loss
    assert tilted["generator"].logs["reward"] == pytest.approx(2 * STUDENT[0], rel=1e-5)


def test_a_reward_that_counts_nothing_leaves_the_gap_alone() -> None:
    """RTDMD's second stage at beta = 0: the score gap's loss and gradient, and the same critic's turn."""
    batch = told_batch(*whitened(2))
    alone, tilted = play(beside(), batch), play(rewarding(0.0), batch)
    for player in ("generator", "fake_score"):
        assert tilted[player].loss == alone[player].loss
        assert tilted[player].gradients == alone[player].gradients != {}


def test_with_a_linear_reward_the_teacher_is_tilted() -> None:
    """At one time t the divergence beta c away from its least lies at m + beta c (s^2 + sigma^2 / alpha^2), the same s.

    At t = 0 this is the law p exp(beta c x), whose mean is m + beta c s^2. Exact critic, 300 moves: within 2 %.
    """
    objective = rewarding(0.3)
    keep_critic_exact(objective, fresh=False)
    shifted = TEACHER[0] + 0.3 * (TEACHER[1] ** 2 + (0.3 / 0.7) ** 2)
    assert trained(objective) == pytest.approx((shifted, TEACHER[1]), rel=0.02)


def test_a_reward_without_a_gradient_is_refused() -> None:
    objective = rewarding(0.3).terms[1]
    objective.attach(torch.zeros(2, 32), Condition())
    objective.reward = lambda x, cond: x.detach().flatten(1).mean(1)
    with pytest.raises(UserError, match="gives no gradient"):
        objective.attach(torch.zeros(2, 32), Condition())


@pytest.mark.slow
def test_a_run_is_built_of_all_three() -> None:
    """Pairs are read, the reward is opened, and only the gap brings a teacher and a critic."""
    run = build.build(config.load("configs/scenes/dmd2_regularised.yaml", ["batch=4"])[0])
    assert set(run.objective.reads) == {"x0", "pair"} and set(run.players) == {"generator", "fake_score"}
    assert [term.config.name for term in run.objective.terms] == ["dmd2", "paired", "moment", "reward"]
    with torch.no_grad():
        images = run.source.images(torch.arange(4)).to(run.device)
        assert run.objective.terms[3].reward(images, run.conditions.of(torch.arange(4))).shape == (4,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: moment.Config(variance=0),
        lambda: reward.Config(),
        lambda: paired.Config(window=0),
        lambda: paired.Config(distance="lpips"),
    ],
)
def test_contradictions_are_refused(make) -> None:
    with pytest.raises(UserError, match=r"objective\."):
        make()


def test_no_term_needs_a_teacher_or_a_critic() -> None:
    for module in (moment, paired, reward):
        assert module.Objective.needs(None) == ("generator",)

"""AC-DMD: DMD at one step, phased DMD's critic, the step back to s in closed form, and an unbiased estimate of bias."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Renamed,
    Student,
    Told,
    adam,
    at,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    learn,
    one_step,
    play,
    players_for,
    walk,
    whitened,
)
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import dmd, phased_dmd
from fewstep.objectives.ac_dmd import Config, Objective
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.score_gap import abs_mean
from fewstep.rollout import cps, ode

PLAIN = {"ratio": 1, "consistency": 0.0}
ETA = 0.9


def two_steps(transition=ode, **changes) -> Objective:
    """A student of two steps at 1 and .5 whose critic knows something else."""
    base = gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
    student = Student(Flow(), [STUDENT, (0.3, 0.8)], (1.0, 0.5))
    triad = Triad(student, base.real_score, base.fake_score)
    return Objective(Config(**{**PLAIN, **changes}), triad, walk((1.0, 0.5), transition))


def batch_of(step: int = 0) -> Batch:
    draw = Renamed(0, step, torch.arange(16))
    return Batch(draw.normal("noise", (32,)), Condition(), draw)


def test_one_step_is_dmd() -> None:
    """Nothing lies between 0 and t but the answers themselves, so both losses and every gradient are DMD's."""
    triad = gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
    times = Times(low=0.02, high=0.98)
    first = Objective(Config(times=times, **PLAIN), triad, one_step())  # type: ignore[arg-type]
    second = dmd.Objective(dmd.Config(ratio=1, regression=0, times=times, critic_times=times), triad, one_step())
    for step in range(3):
        one, other = play(first, batch_of(step), step), play(second, batch_of(step), step)
        for player in ("generator", "fake_score"):
            assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
            for name, gradient in other[player].gradients.items():
                assert torch.allclose(one[player].gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_without_consistency_the_critic_is_that_of_a_phase() -> None:
    """The bridge target on the same interval, phase by phase."""
    ours = two_steps()
    times = ours.config.times
    theirs = phased_dmd.Objective(phased_dmd.Config(ratio=1, critic_times=times), ours.triad, ours.rollout)
    for step in range(4):
        batch = batch_of(step)
        sample = theirs.sample(batch, step, grad=False)
        own, _ = ours.critic_loss(batch, sample, step)
        other, _ = theirs.critic_loss(batch, sample, step)
        assert own.item() == pytest.approx(other.item(), rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, ETA, 1.0])
def test_the_gradient_is_the_gap_after_one_step_back_to_s(eta: float) -> None:
    """x_s^F - x_s^R = (alpha_s - cos(pi eta / 2) sigma_s alpha_t / sigma_t) (F - R); at eta = 1 alpha_s alone."""
    x, eps = whitened(2, rows=16)
    objective = two_steps(cps(eta), times=at((0.7 - 0.5) / 0.5))
    batch = Batch(x, Condition(), Told(eps, exit=0))  # type: ignore[arg-type]
    sample = objective.sample(batch, 0, grad=True)
    leaf = sample.x.detach().requires_grad_()
    loss, _ = objective.generator_loss(batch, replace(sample, x=leaf), 0)
    (slope,) = torch.autograd.grad(loss, leaf)
    t = torch.full((16,), 0.7)
    a = 0.3 / 0.5
    x_t = a * leaf.detach() + math.sqrt(0.7**2 - (a * 0.5) ** 2) * eps
    real, fake = objective.triad.real_score(x_t, t, Condition()), objective.triad.fake_score(x_t, t, Condition())
    kept = math.cos(math.pi * eta / 2)
    step = 0.5 - kept * 0.5 * 0.3 / 0.7
    back = 0.5 * real.x0 + 0.5 * (kept * real.eps + math.sin(math.pi * eta / 2) * eps)
    expected = step * (fake.x0 - real.x0) / abs_mean(leaf.detach(), back)
    assert torch.allclose(slope * slope.numel(), expected, rtol=1e-4, atol=1e-6)


class Numbered:
    """Draws that are exactly white and uncorrelated, one for each purpose."""

    def __init__(self, **normals: Tensor) -> None:
        self.normals = normals

    def normal(self, purpose: str, shape: object) -> Tensor:
        return self.normals[purpose.split(".")[-1]]

    def uniform(self, purpose: str, shape: object = ()) -> Tensor:
        return torch.full((len(next(iter(self.normals.values()))),), 0.5)


@pytest.mark.parametrize("eta", [ETA, 1.0])
def test_two_samples_estimate_the_squared_bias(eta: float) -> None:
    """A Gaussian critic is affine, so its mean after noisy steps is what it says after the step without the noise."""
    objective = two_steps(cps(eta), consistency=0.01)
    x, first, second = whitened(3)
    batch = Batch(x, Condition(), Numbered(later_1=first, later_2=second))  # type: ignore[arg-type]
    critic, t = objective.triad.fake_score, torch.full((64,), 0.8)
    here = critic(x, t, Condition())
    later = (t - 0.1).clamp(min=0.01)
    mean, _ = cps(eta)(here, later)
    expected = (critic(mean, later, Condition()).x0 - here.x0).square().mean()
    assert expected > 1e-3
    assert objective.bias(batch, here).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_estimate_may_be_negative_and_moves_the_critic_alone() -> None:
    objective = two_steps(cps(ETA), consistency=10.0)
    found = [play(objective, batch_of(step), step)["fake_score"] for step in range(12)]
    assert all(set(turn.gradients) == {"fake_score.mean", "fake_score.log_std"} for turn in found)
    plain = [play(two_steps(cps(ETA)), batch_of(step), step)["fake_score"] for step in range(12)]
    for turn, other in zip(found, plain, strict=True):
        assert turn.loss == pytest.approx(other.loss + 10 * turn.logs["bias"], rel=1e-5)


def test_learns_the_teacher_with_an_exact_critic() -> None:
    """From (-.5, 1.3) to N(1, .7^2), one step: within 2 %."""
    triad = gaussian_triad(Flow(), "flow_prediction")
    objective = Objective(Config(times=Times(low=0.02, high=0.98), **PLAIN), triad, one_step())  # type: ignore[arg-type]
    keep_critic_exact(objective, fresh=False)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    student = objective.triad.generator
    assert (student.mean.item(), student.std.item()) == pytest.approx(TEACHER, rel=0.02)  # type: ignore[operator]


def test_learns_the_teacher_step_by_step() -> None:
    """Two steps on the ODE with an exact critic: the clean law behind what both hand on is the teacher's within 2 %."""
    objective = two_steps()
    keep_critic_exact(objective, fresh=False)
    learn(objective, players_for(objective, adam(2e-2, 1400), adam(1e-9)), 1400, size=64)
    student = objective.triad.generator
    for index, stop in enumerate((0.5, 0.0)):
        law = exact_law(student, objective.rollout, index, stop, fresh=False)  # type: ignore[arg-type]
        assert law == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic() -> None:
    """One step with the consistency of the paper, five critic moves at 2e-2 for each of the student's: within 4 %."""
    base = gaussian_triad(Flow(), "flow_prediction")
    critic = GaussianModel(*TEACHER, Flow(), "flow_prediction", learned=True)
    triad = Triad(base.generator, Guided(GaussianModel(*TEACHER, Flow(), "flow_prediction")), critic)
    objective = Objective(Config(ratio=5, times=Times(low=0.02, high=0.98)), triad, walk((1.0,), cps(ETA)))
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    assert (base.generator.mean.item(), base.generator.std.item()) == pytest.approx(TEACHER, rel=0.04)  # type: ignore[operator]


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"consistency": -1.0}, {"reach": 0.0}, {"times": Times()}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_consistency_needs_noise() -> None:
    with pytest.raises(UserError, match="has no noise: set"):
        two_steps(ode, consistency=0.01)

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import (
    CASE_NAMES,
    CASES,
    FIXTURE_A,
    FIXTURE_VP,
    STUDENT,
    TEACHER,
    Student,
    adam,
    at,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    kl_gradient,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    told_batch,
    walk,
    whitened,
)
from torch import Tensor

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.dmd import Config, Objective
from fewstep.objectives.pieces.score_gap import direction, surrogate
from fewstep.rollout import ode


def exact(schedule: NoiseSchedule, kind: Kind, t: float, **changes: object) -> Objective:
    """DMD without pairs and with the exact KL weight, at the one time t."""
    config = Config(**{"weight": "snr", "times": at(t), "critic_times": at(t), "regression": 0.0, **changes})  # type: ignore[arg-type]
    return Objective(config, gaussian_triad(schedule, kind), one_step())


def test_the_closed_form_is_fixture_a() -> None:
    assert kl_gradient(FIXTURE_VP, 0.75) == pytest.approx(FIXTURE_A, abs=1e-6)


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_generator_gradient_is_that_of_the_kl(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    noise, eps = whitened(2)
    turn = play(exact(schedule, kind, t), told_batch(noise, eps))["generator"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(kl_gradient(schedule, t), abs=1e-5)
    assert turn.touched() == {"generator"}


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_a_critic_that_knows_the_student_has_no_gradient_left(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    """And its loss is the posterior variance (p sigma - q alpha)^2 s^2 / V of the target p x0 + q eps."""
    noise, eps = whitened(2)
    objective = exact(schedule, kind, t)
    turn = play(objective, told_batch(noise, eps))["fake_score"]
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64)))
    size = {"epsilon": alpha, "sample": sigma, "v_prediction": 1.0, "flow_prediction": 1.0}[kind]
    variance = size**2 * STUDENT[1] ** 2 / (alpha**2 * STUDENT[1] ** 2 + sigma**2)
    assert turn.loss == pytest.approx(variance, rel=1e-5)
    assert (turn["fake_score.mean"], turn["fake_score.log_std"]) == pytest.approx((0, 0), abs=2e-6)
    assert turn.touched() == {"fake_score"}
    with torch.no_grad():
        objective.triad.fake_score.mean += 0.1  # type: ignore[operator]
    moved = play(objective, told_batch(noise, eps))["fake_score"]
    assert moved.loss > turn.loss and moved["fake_score.mean"] > 1e-3


@pytest.mark.parametrize("t", [0.02, 0.1, 0.3])
def test_the_critic_weighs_low_noise_like_the_rest(t: float) -> None:
    """The weight min(1, 10 b^2) of a bridge would be .004 at t = .02; from clean samples it is one."""
    noise, eps = whitened(2)
    turn = play(exact(Flow(), "flow_prediction", t), told_batch(noise, eps))["fake_score"]
    assert turn.loss == pytest.approx(STUDENT[1] ** 2 / ((1 - t) ** 2 * STUDENT[1] ** 2 + t**2), rel=1e-4)


def test_signals_in_closed_form() -> None:
    """gap = rms of F - R; lag = E[(R - F)(F - x)], zero by projection where the critic is exact."""
    noise, eps = whitened(2)
    objective = exact(FIXTURE_VP, "epsilon", 0.75)
    logs = play(objective, told_batch(noise, eps))["generator"].logs
    (m_r, s_r), (m, s), alpha, sigma = TEACHER, STUDENT, 0.6, 0.8
    slope_r, slope = (alpha * v / (alpha**2 * v + sigma**2) for v in (s_r**2, s**2))
    shift = (m - m_r) * (1 - alpha * slope_r)
    gap = (shift**2 + (slope - slope_r) ** 2 * (alpha**2 * s**2 + sigma**2)) ** 0.5
    assert logs["gap"] == pytest.approx(gap, rel=1e-5)
    assert logs["lag"] == pytest.approx(0, abs=1e-6)
    assert (logs["x0/mean"], logs["x0/std"]) == pytest.approx(STUDENT, rel=1e-3)
    with torch.no_grad():
        objective.triad.fake_score.log_std += 0.2  # type: ignore[operator]
    assert abs(play(objective, told_batch(noise, eps))["generator"].logs["lag"]) > 1e-2


def test_a_critic_that_says_what_the_teacher_says_gives_no_gradient() -> None:
    noise, eps = whitened(2)
    for weight in ("abs_mean", "snr", "none"):
        objective = exact(Flow(), "flow_prediction", 0.4, weight=weight)
        objective.triad.fake_score.load_state_dict(objective.triad.real_score.inner.state_dict())  # type: ignore[union-attr]
        turn = play(objective, told_batch(noise, eps))["generator"]
        assert turn.loss == 0 and turn["generator.mean"] == 0 and turn["generator.std"] == 0


def gap_of(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    rows = torch.full((len(x),), 0.4)
    return direction(real, fake, x, "abs_mean", Flow(), 0 * rows, rows)


def test_the_abs_mean_direction_has_its_invariances() -> None:
    x, real, fake = torch.randn(3, 5, 3, 4, 4)
    g = gap_of(x, real, fake)
    assert torch.allclose(g, (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True), rtol=1e-6)
    assert torch.allclose(gap_of(3 * x, 3 * real, 3 * fake), g, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gap_of(x + 2, real + 2, fake + 2), g, rtol=1e-5, atol=1e-5)
    assert torch.equal(gap_of(x, real, real), torch.zeros_like(x))


def test_the_abs_mean_direction_is_per_sample() -> None:
    x, real, fake = torch.randn(3, 5, 3, 4, 4)
    g = gap_of(x, real, fake)
    other = x.clone()
    other[1:] *= 7
    assert torch.equal(gap_of(other, real, fake)[0], g[0]) and not torch.allclose(gap_of(other, real, fake)[1], g[1])
    assert torch.equal(gap_of(x[2:3], real[2:3], fake[2:3]), g[2:3])


def test_the_abs_mean_direction_is_finite_where_the_teacher_gives_the_sample_back() -> None:
    x = torch.randn(2, 8)
    assert torch.isfinite(gap_of(x, x, x + 1e-6)).all()


def test_the_surrogate_carries_its_gradient() -> None:
    x, g = torch.randn(2, 6, 3, 8, 8)
    x.requires_grad_()
    loss = surrogate(x, g)
    (got,) = torch.autograd.grad(loss, x)
    assert (got - g / x.numel()).norm() < 1e-6 * (g / x.numel()).norm()
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-5)  # so it measures no progress
    low = x.detach().bfloat16().requires_grad_()
    (got,) = torch.autograd.grad(surrogate(low, g), low)
    assert ((got.float() - g / x.numel()).norm() / (g / x.numel()).norm()) < 4e-3  # bfloat16 only at the very end


def pair_of(noise: Tensor) -> Pair:
    """The teacher's deterministic pairs in closed form: z -> m + s z."""
    return Pair(noise, TEACHER[0] + TEACHER[1] * noise, Condition())


def test_the_regression_in_closed_form() -> None:
    """E (G(z) - y)^2 = (mu - m_r)^2 + (s - s_r)^2 on the pairs' own noise; its gradient adds with its weight."""
    noise, eps, stored = whitened(3)
    batch = told_batch(noise, eps, pair=pair_of(stored))
    plain = play(exact(FIXTURE_VP, "epsilon", 0.75), batch)["generator"]
    with_pairs = play(exact(FIXTURE_VP, "epsilon", 0.75, regression=0.25), batch)["generator"]
    off, wide = STUDENT[0] - TEACHER[0], STUDENT[1] - TEACHER[1]
    assert with_pairs.logs["regression"] == pytest.approx(off**2 + wide**2, rel=1e-5)
    assert with_pairs.loss - plain.loss == pytest.approx(0.25 * (off**2 + wide**2), rel=1e-4)
    assert with_pairs["generator.mean"] - plain["generator.mean"] == pytest.approx(0.25 * 2 * off, rel=1e-4)
    assert with_pairs["generator.std"] - plain["generator.std"] == pytest.approx(0.25 * 2 * wide, rel=1e-4)


def test_pairs_are_read_only_where_there_is_a_regression() -> None:
    assert exact(Flow(), "flow_prediction", 0.4, regression=0.25).reads == ("pair",)
    assert exact(Flow(), "flow_prediction", 0.4).reads == ()
    for wrong in ({"ratio": 0}, {"regression": -0.1}):
        with pytest.raises(UserError):
            Config(**wrong)  # type: ignore[arg-type]


def test_the_critic_is_unguided_and_the_teacher_guided() -> None:
    """With a null condition that shifts the mean by -1, guidance 2 shifts the teacher's answer by +1."""

    class Shifted(GaussianModel):
        def null(self, cond: Condition) -> Condition:
            return Condition({"shift": cond.inputs["shift"] - 1})

        def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
            prediction = super().forward(x_t, t, cond, to=to, taps=taps, stop=stop)
            return replace(prediction, value=prediction.value + cond.inputs["shift"][:, None])

    noise, eps = whitened(2)
    triad = gaussian_triad(Flow(), "sample")
    teacher = Shifted(*TEACHER, Flow(), "sample")
    cond = Condition({"shift": torch.zeros(len(noise))})
    gaps = []
    for scale in (1.0, 2.0):
        own = Triad(triad.generator, Guided(teacher, scale), triad.fake_score)
        config = Config(weight="none", times=at(0.4), critic_times=at(0.4), regression=0)
        played = play(Objective(config, own, one_step()), Batch(noise, cond, told_batch(noise, eps).draw))
        gaps.append(played["generator"]["generator.mean"])
        assert played["fake_score"]["fake_score.mean"] == pytest.approx(0, abs=2e-6)
    assert gaps[1] - gaps[0] == pytest.approx(-1, abs=1e-5)


def test_both_turns_look_at_one_sample_and_the_generator_moves_every_ratio_steps() -> None:
    noise, eps = whitened(2)
    objective = exact(Flow(), "flow_prediction", 0.4, ratio=3)
    moved = [tuple(play(objective, told_batch(noise, eps), step)) for step in range(6)]
    both, critic = ("generator", "fake_score"), ("fake_score",)
    assert moved == [both, critic, critic, both, critic, critic]
    assert len(objective.triad.generator.seen) == 6  # one pass a step, whoever moves


def test_a_rollout_of_several_steps_trains_the_step_it_exits_at() -> None:
    times = (1.0, 0.75, 0.5, 0.25)
    student = Student(Flow(), [STUDENT] * 4, times)
    triad = gaussian_triad(Flow(), "flow_prediction")
    config = Config(weight="snr", regression=0)
    objective = Objective(config, Triad(student, triad.real_score, triad.fake_score), walk(times, ode))
    seen = set()
    for step in range(24):
        draw = Draw(0, step, torch.arange(4))
        turn = play(objective, Batch(draw.normal("noise", (32,)), Condition(), draw), step)["generator"]
        trained = turn.gradients["generator.mean"].nonzero().flatten().tolist()
        assert len(trained) == 1
        seen.update(trained)
    assert seen == {0, 1, 2, 3}


def test_the_law_of_a_student_is_what_its_rollout_makes() -> None:
    """The harness of the learning tests against samples: 2^18 of them, four standard errors."""
    times = (1.0, 0.75, 0.5)
    student = Student(Flow(), [(0.3, 0.8), (-0.2, 0.5), (0.1, 0.9)], times)
    for fresh, transition in ((True, None), (False, ode)):
        rollout = walk(times, transition) if transition else walk(times)
        draw = Draw(0, 0, torch.arange(1 << 13))
        sample = rollout(student, draw.normal("noise", (32,)), Condition(), draw, exit=2)
        mean, std = exact_law(student, rollout, 2, 0.0, fresh)
        count = sample.x.numel()
        assert sample.x.mean().item() == pytest.approx(mean, abs=4 * std / count**0.5)
        assert sample.x.std().item() == pytest.approx(std, rel=4 / (2 * count) ** 0.5)


@pytest.mark.parametrize("weight", ["abs_mean", pytest.param("snr", marks=pytest.mark.slow)])
def test_learns_the_teacher_with_an_exact_critic(weight: str) -> None:
    """From (-.5, 1.3) to N(1, .7^2) in 32 dimensions: within 2 %, 1200 moves of Adam at 1e-2, cosine."""
    config = Config(weight=weight, regression=0)  # type: ignore[arg-type]
    objective = Objective(config, gaussian_triad(Flow(), "flow_prediction"), one_step())
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(1e-9)), 1200)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_learns_the_teacher_with_a_learned_critic(kind: Kind, vp: NoiseSchedule) -> None:
    """Five critic moves at 2e-2 for each of 1200 generator moves at 1e-2, cosine: within 4 %."""
    config = Config(regression=0, ratio=5)
    objective = Objective(config, gaussian_triad(vp, kind), one_step())
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)


@pytest.mark.slow
def test_learns_the_teacher_with_pairs() -> None:
    """The regression alone has the same optimum on Gaussians: with it, within 2 % and at any ratio."""
    objective = Objective(Config(), gaussian_triad(Flow(), "flow_prediction"), one_step())
    keep_critic_exact(objective, fresh=True)
    players = players_for(objective, adam(1e-2, 1200), adam(1e-9))
    learn(objective, players, 1200, extra=lambda draw: {"pair": pair_of(draw.normal("stored", (32,)))})
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)

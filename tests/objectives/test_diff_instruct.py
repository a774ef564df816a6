from __future__ import annotations

import pytest
import torch
from oracle import (
    CASE_NAMES,
    CASES,
    STUDENT,
    TEACHER,
    Renamed,
    Student,
    adam,
    at,
    gaussian_triad,
    keep_critic_exact,
    kl_gradient,
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

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.objectives import dmd
from fewstep.objectives.base import Triad
from fewstep.objectives.diff_instruct import Config, Objective, edm_times
from fewstep.objectives.pieces.score_gap import surrogate


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_the_gradient_is_that_of_the_kl_over_the_snr(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    """w(t) is one on F - R, so the gradient of KL(q_t || p_t) is divided by alpha^2 / sigma^2 (fixture A)."""
    noise, eps = whitened(2)
    config = Config(times=at(t), critic_times=at(t))
    played = play(Objective(config, gaussian_triad(schedule, kind), one_step()), told_batch(noise, eps))
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64)))
    expected = [part * sigma**2 / alpha**2 for part in kl_gradient(schedule, t)]
    turn = played["generator"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(expected, abs=1e-5)
    assert turn.touched() == {"generator"} and played["fake_score"].touched() == {"fake_score"}


def test_the_papers_linear_loss_has_the_same_gradient() -> None:
    """sum <F - R, x> against our mean: equal up to the number of elements, to 1e-6."""
    x, gap = torch.randn(2, 6, 3, 8, 8, dtype=torch.float64)
    x.requires_grad_()
    (linear,) = torch.autograd.grad((gap * x).sum(), x)
    (ours,) = torch.autograd.grad(surrogate(x, gap), x)
    assert torch.allclose(ours.double() * x.numel(), linear, rtol=1e-6, atol=1e-6)


def test_the_noise_levels_are_log_normal() -> None:
    """ln(sigma / alpha) has mean -1.2 and deviation 1.2, to four standard errors of 2^15 draws."""
    t = edm_times()(Draw(0, 0, torch.arange(1 << 15)).uniform("t"), Flow())
    alpha, sigma, _, _ = Flow().coefficients(t.double())
    logs = (sigma / alpha).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / 2**7.5)
    assert logs.std().item() == pytest.approx(1.2, rel=4 / 2**8)


def test_it_is_dmd_with_another_weight_and_other_times(vp: NoiseSchedule) -> None:
    """The same draws by their last word: losses and every gradient of both players, in one and in three steps."""
    for times in ((1.0,), (1.0, 0.75, 0.5)):
        base = gaussian_triad(vp, "epsilon", critic=(0.2, 0.9))
        triad = Triad(Student(vp, [STUDENT] * len(times), times), base.real_score, base.fake_score)
        same = {"weight": "none", "times": edm_times(), "critic_times": edm_times()}
        first = Objective(Config(), triad, walk(times))
        second = dmd.Objective(dmd.Config(regression=0, **same), triad, walk(times))  # type: ignore[arg-type]
        for step in range(3):
            one, other = (play(o, real_batch(step, draw=Renamed), step) for o in (first, second))
            for player in ("generator", "fake_score"):
                assert one[player].gradients.keys() == other[player].gradients.keys()
                for name, gradient in one[player].gradients.items():
                    assert torch.allclose(gradient, other[player].gradients[name], rtol=1e-5, atol=1e-8)
            assert one["generator"].gradients["generator.mean"].abs().max() > 1e-3


def test_the_generator_needs_no_diffusion_architecture() -> None:
    """Any map from noise will do: it is asked once, at the time of pure noise, and needs no data."""
    objective = Objective(Config(), gaussian_triad(Flow(), "flow_prediction"), one_step())
    assert objective.reads == ()
    draw = Draw(0, 0, torch.arange(4))
    batch = told_batch(draw.normal("noise", (32,)), draw.normal("eps", (32,)))
    assert set(play(objective, batch)) == {"generator", "fake_score"}
    assert len(objective.triad.generator.seen) == 1 and batch.cond == Condition()


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1, but 0"):
        Config(ratio=0)


@pytest.mark.parametrize("weight", ["none", pytest.param("alpha_sigma", marks=pytest.mark.slow)])
def test_learns_the_teacher_with_an_exact_critic(weight: str) -> None:
    """Any positive w(t) has the teacher for its optimum: from (-.5, 1.3) to N(1, .7^2) within 2 %."""
    objective = Objective(Config(weight=weight), gaussian_triad(Flow(), "flow_prediction"), one_step())  # type: ignore[arg-type]
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic(vp: NoiseSchedule) -> None:
    """One critic move at 2e-2 for each of 2000 generator moves at 1e-2, cosine: within 4 %."""
    objective = Objective(Config(), gaussian_triad(vp, "epsilon"), one_step())
    learn(objective, players_for(objective, adam(1e-2, 2000), adam(2e-2)), 2000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)

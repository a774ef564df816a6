from __future__ import annotations

import pytest
import torch
from oracle import (
    FIXTURE_VP,
    LEAN,
    STUDENT,
    TEACHER,
    Leaning,
    Student,
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
    walk,
    whitened,
)
from test_swiftbrush import labelled

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.objectives import diff_instruct
from fewstep.objectives.base import Triad
from fewstep.objectives.sid import Config, Objective
from fewstep.rollout import Rollout, Step

M, OF_M = 1.637918, (-1.843636, 0.914495)  # arXiv:2404.04057 on fixture A: E |R - F|^2 and its gradient
OF_ONE = (-1.205659, 0.723163)  # twice the gradient of the loss with alpha = 1


def exact(alpha: float, kind: Kind = "epsilon", **changes) -> Objective:
    """SiD without normaliser at alpha_t = .6, sigma_t = .8, with the critic that knows the student."""
    config = Config(**{"alpha": alpha, "weight": "none", "times": at(0.75), "critic_times": at(0.75), **changes})  # type: ignore[arg-type]
    return Objective(config, gaussian_triad(FIXTURE_VP, kind), one_step())


def said(x0: torch.Tensor) -> Prediction:
    """A prediction of x0 at any level."""
    return Prediction(x0, "sample", x0, torch.full((len(x0),), 0.75), FIXTURE_VP)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("alpha, twice", [(0.5, OF_M), (1.0, OF_ONE)])
def test_the_gradient_at_one_half_is_half_that_of_the_divergence(alpha: float, twice: tuple, kind: Kind) -> None:
    noise, eps = whitened(2)
    played = play(exact(alpha, kind), told_batch(noise, eps))
    turn = played["generator"]
    assert (2 * turn["generator.mean"], 2 * turn["generator.std"]) == pytest.approx(twice, abs=1e-5)
    assert turn.touched() == {"generator"} and played["fake_score"].touched() == {"fake_score"}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.2])
def test_the_loss_is_one_minus_alpha_times_the_divergence(alpha: float) -> None:
    turn = play(exact(alpha), told_batch(*whitened(2)))["generator"]
    assert turn.loss == pytest.approx((1 - alpha) * M, abs=1e-5)
    assert turn.logs["gap"] ** 2 == pytest.approx(M, abs=1e-5)
    assert turn.logs["lag"] == pytest.approx(0, abs=1e-5)  # E (R - F)(F - x): the critic knows the generator


def test_the_fixture_is_the_gradient_of_the_divergence_itself() -> None:
    """M in closed form, with the critic following the student, differentiated in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)
    (m_r, s_r), alpha, sigma = TEACHER, 0.6, 0.8
    slope_r, slope = (alpha * s**2 / (alpha**2 * s**2 + sigma**2) for s in (s_r, std))
    offset = (mean - m_r) * (1 - alpha * slope_r)
    divergence = offset**2 + (slope - slope_r) ** 2 * (alpha**2 * std**2 + sigma**2)
    assert divergence.item() == pytest.approx(M, abs=1e-6)
    gradient = torch.autograd.grad(divergence, [mean, std])
    assert [g.item() for g in gradient] == pytest.approx(OF_M, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_with_blocked_scores_it_would_be_the_plain_score_gap(alpha: float) -> None:
    """d / dx of the loss with R and F held is F - R whatever alpha is, which the objective refuses to be."""
    x = torch.randn(4, 8, requires_grad=True)
    real, fake = torch.randn(2, 4, 8)
    with pytest.raises(AssertionError, match="differentiable"):
        exact(alpha).identity(x, said(real), said(fake))
    gap = real - fake
    (got,) = torch.autograd.grad((gap * (real - x - alpha * gap)).sum(), x)
    assert torch.allclose(got, fake - real)
    turns = [play(exact(a), told_batch(*whitened(2)))["generator"]["generator.mean"] for a in (alpha, alpha + 0.1)]
    assert abs(turns[0] - turns[1]) > 1e-2


def test_alpha_one_without_the_difference_of_the_scores() -> None:
    """(R - F) [(R - x) - (R - F)] = (R - F) (F - x)."""
    x, real, fake = (v.requires_grad_() for v in torch.randn(3, 4, 8))
    expected = ((real - fake) * (fake - x)).mean()
    assert exact(1.0).identity(x, said(real), said(fake)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_normaliser_is_that_of_each_sample_and_carries_no_gradient() -> None:
    x, real, fake = (v.requires_grad_() for v in torch.randn(3, 4, 8))
    gap = real - fake
    n = (x - real).abs().mean(1, keepdim=True).detach()
    expected = (gap * (real - x - 1.2 * gap) / n).mean()
    loss = exact(1.2, weight="abs_mean").identity(x, said(real), said(fake))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(of, [x, real, fake]) for of in (loss, expected))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_critics_turn_is_that_of_diff_instruct() -> None:
    times = (1.0, 0.75)
    base = gaussian_triad(FIXTURE_VP, "epsilon", critic=(0.2, 0.9))
    triad = Triad(Student(FIXTURE_VP, [STUDENT] * 2, times), base.real_score, base.fake_score)
    config = Config()
    plain = diff_instruct.Config(critic_times=config.critic_times)
    for step in range(3):
        one = play(Objective(config, triad, walk(times)), real_batch(step), step)["fake_score"]
        other = play(diff_instruct.Objective(plain, triad, walk(times)), real_batch(step), step)["fake_score"]
        assert one.loss == other.loss and one.gradients == other.gradients != {}


class Deaf(Backbone):
    """A teacher that answers without a derivative."""

    def __init__(self, inner: Backbone):
        super().__init__()
        self.inner, self.schedule, self.kind = inner, inner.schedule, inner.kind

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False) -> Prediction:
        with torch.no_grad():
            return self.inner(x_t, t, cond)


def test_a_teacher_without_a_derivative_is_noticed() -> None:
    triad = gaussian_triad(Flow(), "flow_prediction")
    objective = Objective(Config(), Triad(triad.generator, Deaf(triad.real_score), triad.fake_score), one_step())
    with pytest.raises(AssertionError, match="differentiable"):
        play(objective, real_batch())


def test_a_move_costs_one_pass_of_each_score(tiny_unet) -> None:
    """And a checkpointed network gives the same gradient as a plain one."""
    gradients = []
    for checkpointed in (False, True):
        nets = [DiffusersBackbone(tiny_unet(seed), Flow(), "flow_prediction", 4) for seed in (1, 2, 3)]
        if checkpointed:
            for net in nets:
                net.net.enable_gradient_checkpointing()
                net.train()
        triad = Triad(nets[0], Guided(nets[1].requires_grad_(False), 1.5), nets[2])
        objective = Objective(Config(), triad, Rollout([Step(1.0, 1.0)]))
        batch = real_batch(ids=torch.arange(4))
        noise = batch.draw.normal("noise", (3, 8, 8))
        told = type(batch)(noise, Condition({"class_labels": torch.arange(4)}), batch.draw)
        gradients.append(play(objective, told)["generator"].gradients)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.abs().max() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6 * float(largest))


def lsg(kappa: float, mean: float, **changes) -> Objective:
    """SiD-LSG with networks whose mean guidance kappa moves by LEAN (kappa - 1); the student is N(-.5, 1.3^2)."""
    teacher = Leaning(*TEACHER, Flow(), "sample").requires_grad_(False)
    critic = Leaning(mean, STUDENT[1], Flow(), "sample", learned=True)
    triad = Triad(Student(Flow(), [STUDENT]), Guided(teacher, kappa), critic)
    return Objective(Config(**{"alpha": 1.0, "critic_guidance": kappa, **changes}), triad, one_step())


@pytest.mark.parametrize("kappa", [1.0, 2.5])
def test_a_guided_critic_knows_the_student_by_its_guided_answer(kappa: float) -> None:
    """SiD-LSG: it has learned all where u + kappa (c - u) is the student's mean, and both turns ask it like that."""
    told, right = {"weight": "none", "times": at(0.4), "critic_times": at(0.4)}, STUDENT[0] - LEAN * (kappa - 1)
    played = play(lsg(kappa, right, **told), labelled(0))
    critic = played["fake_score"]
    assert (critic["fake_score.mean"], critic["fake_score.log_std"]) == pytest.approx((0, 0), abs=1e-5)
    assert played["generator"].logs["lag"] == pytest.approx(0, abs=1e-5)
    off = play(lsg(3.5 - kappa, right, **told), labelled(0))
    assert abs(off["fake_score"]["fake_score.mean"]) > 1e-2 and abs(off["generator"].logs["lag"]) > 1e-2


@pytest.mark.slow
def test_with_one_guidance_for_both_it_learns_the_guided_teacher() -> None:
    """Guidance 2: N(1.4, .7^2) from N(-.5, 1.3^2) with a learned critic: within 4 %."""
    objective = lsg(2.0, STUDENT[0], ratio=2)
    cond = {"cond": Condition({"class_labels": torch.zeros(64, dtype=torch.int64)})}
    learn(objective, players_for(objective, adam(1e-2, 1000), adam(2e-2)), 2000, 64, extra=lambda draw: cond)
    assert law_of(objective) == pytest.approx((TEACHER[0] + LEAN, TEACHER[1]), rel=0.04)


def test_a_critic_that_cannot_be_guided_is_refused_before_training(tiny_unet) -> None:
    nets = [DiffusersBackbone(tiny_unet(seed), Flow(), "flow_prediction", None) for seed in (1, 2, 3)]
    objective = Objective(Config(critic_guidance=2.0), Triad(nets[0], Guided(nets[1]), nets[2]), one_step())
    with pytest.raises(UserError, match=r"no null condition: set objective\.critic_guidance=1"):
        objective.attach(torch.zeros(2, 3, 8, 8), Condition({"class_labels": torch.arange(2)}))


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1, but 0"):
        Config(ratio=0)


@pytest.mark.parametrize(
    "alpha", [1.0, pytest.param(0.5, marks=pytest.mark.slow), pytest.param(1.2, marks=pytest.mark.slow)]
)
def test_learns_the_teacher_with_an_exact_critic(alpha: float) -> None:
    """From (-.5, 1.3) to N(1, .7^2) in 32 dimensions: within 2 %, 700 moves of Adam at 2e-2, cosine."""
    objective = Objective(Config(alpha=alpha), gaussian_triad(Flow(), "flow_prediction"), one_step())
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_learns_the_teacher_with_a_learned_critic(alpha: float, vp: NoiseSchedule) -> None:
    """Five critic moves at 2e-2 for each of 800 generator moves at 1e-2, cosine: within 4 %."""
    objective = Objective(Config(alpha=alpha, ratio=5), gaussian_triad(vp, "epsilon"), one_step())
    learn(objective, players_for(objective, adam(1e-2, 800), adam(2e-2)), 4000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)

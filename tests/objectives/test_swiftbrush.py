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
    gaussian_triad,
    keep_critic_exact,
    kl_gradient,
    know,
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
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Guided
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.gaussian import GaussianModel
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared
from fewstep.objectives import diff_instruct
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.score_gap import direction
from fewstep.objectives.swiftbrush import Config, Objective
from fewstep.rollout import Rollout, Step
from fewstep.train.loop import train_step


class Told(GaussianModel):
    """A Gaussian whose condition moves its clean mean: 0 by class 0, +2 by class 1, -1 by "no class" (2)."""

    def __init__(self, *args, **given):
        super().__init__(*args, **given)
        self.heard: list[Tensor] = []

    def null(self, cond: Condition) -> Condition:
        return cond.with_inputs(class_labels=torch.full_like(cond.inputs["class_labels"], 2))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        labels = cond.inputs["class_labels"]
        self.heard.append(labels)
        prediction = super().forward(x_t, t, cond)
        by = torch.tensor([0.0, 2.0, -1.0])[labels][:, None]
        return replace(prediction, value=prediction.target(prediction.x0 + by, prediction.eps))


def told(guidance: float, own: float = 0.0, **changes) -> Objective:
    """Student, teacher and critic that hear labels; the critic's answers are the teacher's, and `own` more."""
    teacher = Told(*TEACHER, Flow(), "sample").requires_grad_(False)
    critic = Told(TEACHER[0] + own, TEACHER[1], Flow(), "sample", learned=True)
    triad = Triad(Student(Flow(), [STUDENT]), Guided(teacher, guidance), critic)
    return Objective(Config(times=at(0.4), critic_times=at(0.4), **changes), triad, one_step())


def labelled(label: int = 0) -> Batch:
    noise, eps = whitened(2)
    return Batch(noise, Condition({"class_labels": torch.full((64,), label)}), told_batch(noise, eps).draw)


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_with_the_snr_and_no_guidance_it_is_the_kl(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    """Fixture A and its like; the critic that knows the student has no gradient left."""
    noise, eps = whitened(2)
    config = Config(weight="snr", times=at(t), critic_times=at(t), label_dropout=0)
    played = play(Objective(config, gaussian_triad(schedule, kind), one_step()), told_batch(noise, eps))
    turn, critic = played["generator"], played["fake_score"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(kl_gradient(schedule, t), abs=1e-5)
    assert turn.touched() == {"generator"} and critic.touched() == {"fake_score"}
    assert (critic["fake_score.mean"], critic["fake_score.log_std"]) == pytest.approx((0, 0), abs=2e-6)
    if schedule is FIXTURE_VP:
        assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(FIXTURE_A, abs=1e-5)


def test_its_weight_is_sigma_squared_on_the_noises() -> None:
    """sigma^2 (eps_R - eps_F) = alpha sigma (F - R) with x_t = alpha x0 + sigma eps: to 1e-12 in float64.

    t is a multiple of 1/16, so that both coefficients and their product are exact in float32 too.
    """
    real, fake, x_t = torch.randn(3, 15, 8, dtype=torch.float64)
    t = torch.arange(1, 16) / 16
    c = Flow().at(t, x_t)
    eps_real, eps_fake = ((x_t - c.alpha * x0) / c.sigma for x0 in (real, fake))
    ours = direction(real, fake, x_t, "alpha_sigma", Flow(), 0 * t, t)
    assert torch.allclose(ours, c.sigma**2 * (eps_real - eps_fake), rtol=1e-12, atol=1e-12)


def test_without_guidance_and_dropout_it_is_diff_instruct_with_its_weight() -> None:
    """An x0 network would learn alpha^2 |eps_F - eps|^2 at another pace, so only the generator's turn is the same."""
    times = (1.0, 0.75)
    base = gaussian_triad(FIXTURE_VP, "epsilon", critic=(0.2, 0.9))
    triad = Triad(Student(FIXTURE_VP, [STUDENT] * 2, times), base.real_score, base.fake_score)
    config = Config(label_dropout=0)
    same = diff_instruct.Config(weight="alpha_sigma", times=config.times, critic_times=config.critic_times)
    for step in range(3):
        one = play(Objective(config, triad, walk(times)), real_batch(step), step)["generator"]
        other = play(diff_instruct.Objective(same, triad, walk(times)), real_batch(step), step)["generator"]
        assert one.gradients.keys() == other.gradients.keys()
        for name, gradient in one.gradients.items():
            assert torch.allclose(gradient, other.gradients[name], rtol=1e-5)
        assert one.gradients["generator.mean"].abs().max() > 1e-3


def test_guidance_acts_on_both_scores() -> None:
    """A critic that hears labels as the teacher does leaves the same gap at any guidance; a deaf teacher does not."""
    for label in (0, 1):
        gaps = [play(told(w, own=0.3), labelled(label))["generator"]["generator.mean"] for w in (1.0, 4.5)]
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-5) and abs(gaps[0]) > 1e-2
        unguided = told(4.5, own=0.3)
        unguided.compared = lambda batch, o=unguided: o.triad  # type: ignore[method-assign]
        moved = play(unguided, labelled(label))["generator"]["generator.mean"]
        # alpha sigma (w - 1) (by(label) - by(null)) more, at alpha = .6 and sigma = .4
        assert gaps[1] - moved == pytest.approx(0.24 * 3.5 * (2 * label + 1), abs=1e-4)


def test_the_critic_learns_without_its_condition_now_and_then() -> None:
    objective = told(1.0, label_dropout=0.25)
    draw = Draw(0, 0, torch.arange(1 << 12))
    cond = Condition({"class_labels": torch.zeros(1 << 12, dtype=torch.int64)})
    play(objective, Batch(draw.normal("noise", (32,)), cond, draw))
    scored, trained = objective.triad.fake_score.heard
    dropped = (trained == 2).float().mean().item()
    assert not (scored == 2).any() and dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75) ** 0.5 / 64)


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_the_critics_loss_is_alpha_squared_on_the_noise(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    """alpha^2 E |eps_F - eps|^2 = alpha^4 s^2 / V for the exact critic, whatever the network predicts."""
    noise, eps = whitened(2)
    config = Config(times=at(t), critic_times=at(t), label_dropout=0)
    turn = play(Objective(config, gaussian_triad(schedule, kind), one_step()), told_batch(noise, eps))["fake_score"]
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64)))
    variance = STUDENT[1] ** 2 / (alpha**2 * STUDENT[1] ** 2 + sigma**2)
    assert turn.loss == pytest.approx(alpha**4 * variance, rel=1e-5)


def test_a_fresh_adapter_of_the_teacher_leaves_no_gap(tiny_unet) -> None:
    """B = 0 at the start, so the critic says what the teacher says and the first gradient is zero."""
    shared = Shared(DiffusersBackbone(tiny_unet(3), Flow(), "flow_prediction", 4), {"critic": LoraSpec(4, 8.0, ["*"])})
    generator = DiffusersBackbone(tiny_unet(4), Flow(), "flow_prediction", 4)
    triad = Triad(generator, Guided(shared.as_(None), 4.5), shared.as_("critic"))
    objective = Objective(Config(), triad, Rollout([Step(1.0, 1.0)]))
    draw = Draw(0, 0, torch.arange(4))
    batch = Batch(draw.normal("noise", (3, 8, 8)), Condition({"class_labels": torch.arange(4)}), draw)
    played = play(objective, batch)
    assert played["generator"].logs["gap"] == 0 and played["generator"].loss == 0
    adapters = nn.utils.parameters_to_vector([p.grad for p in triad.fake_score.parameters() if p.grad is not None])
    assert adapters.abs().max() > 0


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"label_dropout": 1.0}, {"label_dropout": -0.1}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_learns_the_teacher_with_an_exact_critic() -> None:
    """From (-.5, 1.3) to N(1, .7^2) in 32 dimensions: within 2 %, 700 moves of Adam at 2e-2, cosine."""
    objective = Objective(Config(label_dropout=0), gaussian_triad(Flow(), "flow_prediction"), one_step())
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic(vp: NoiseSchedule) -> None:
    """One critic move at 2e-2 for each of 2000 generator moves at 1e-2, cosine: within 4 %."""
    objective = Objective(Config(), gaussian_triad(vp, "epsilon"), one_step())
    learn(objective, players_for(objective, adam(1e-2, 2000), adam(2e-2)), 2000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)


@pytest.mark.slow
def test_guided_on_both_sides_it_still_ends_at_the_teacher() -> None:
    """Guidance 4.5 on critic and teacher alike: the gap vanishes where the two agree, at the unguided law."""
    objective = told(4.5, label_dropout=0.0)
    objective.config.times = Config().times
    sample = objective.sample

    def knowing(batch: Batch, step: int, grad: bool):
        know(objective.triad.fake_score, law_of(objective))  # type: ignore[arg-type]
        return sample(batch, step, grad)

    objective.sample = knowing  # type: ignore[method-assign]
    players = players_for(objective, adam(2e-2, 700), adam(1e-9))
    for step in range(700):
        draw = Draw(0, step, torch.arange(step * 64, (step + 1) * 64))
        cond = Condition({"class_labels": torch.zeros(64, dtype=torch.int64)})
        train_step(objective, [Batch(draw.normal("noise", (32,)), cond, draw)], step, players)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)

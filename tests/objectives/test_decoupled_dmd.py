from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Law,
    Student,
    adam,
    at,
    gaussian_triad,
    keep_critic_exact,
    know,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    told_batch,
    whitened,
)
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, shift
from fewstep.core.times import Step, Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.decoupled_dmd import Config, Objective
from fewstep.objectives.pieces.score_gap import abs_mean
from fewstep.rollout import Rollout

ANYTHING: Law = (0.6, 1.0)
"""what the teacher makes without its condition"""
W = 2.0


class Told(Backbone):
    """N(1, .7^2) for label 0, and `ANYTHING` for label 1, which says nothing."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule, self.kind = schedule, "sample"
        self.laws = torch.nn.ModuleList(GaussianModel(*law, schedule, "sample") for law in (TEACHER, ANYTHING))
        self.sizes: list[int] = []

    def null(self, cond: Condition) -> Condition:
        return Condition({"label": torch.ones_like(cond.inputs["label"])})

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        self.sizes.append(len(x_t))
        said, nothing = (law(x_t, t, cond).value for law in self.laws)
        value = torch.where(cond.inputs["label"][:, None] == 0, said, nothing)
        return Prediction(value, self.kind, x_t, t, self.schedule)


def guided(kind: type, rollout: Rollout | None = None, schedule: NoiseSchedule | None = None, **changes):
    """An objective with a guided teacher; `changes` of its config."""
    base = gaussian_triad(schedule or Flow(), "sample", critic=(0.2, 0.9))
    rollout = rollout or one_step()
    times = tuple(step.level for step in rollout.steps)
    student = Student(schedule or Flow(), [STUDENT] * len(times), times)
    triad = Triad(student, Guided(Told(schedule or Flow()), W), base.fake_score)
    config = {Objective: Config, dmd2.Objective: dmd2.Config}[kind]
    return kind(config(**{"gan_weight": 0.0, "ratio": 1, **changes}), triad, rollout)


def labelled(batch: Batch) -> Batch:
    return replace(batch, cond=Condition({"label": torch.zeros(len(batch))}))


@pytest.mark.parametrize("weight", ["snr", "none"])
def test_at_one_time_with_one_noise_it_is_dmd(weight: str) -> None:
    """(F - R_c) + (R_c - R_cfg) = F - R_cfg, to 2e-6 of every gradient, at several times."""
    noise, eps = whitened(2)
    for t in (0.2, 0.5, 0.9):
        ours = guided(Objective, weight=weight, times=at(t), guidance_times=at(t))
        base = guided(dmd2.Objective, weight=weight, times=at(t))
        one, other = (play(o, labelled(told_batch(noise, eps)))["generator"] for o in (ours, base))
        for name in ("generator.mean", "generator.std"):
            assert one[name] == pytest.approx(other[name], rel=2e-6) and abs(one[name]) > 1e-4


def test_each_part_has_its_own_normaliser() -> None:
    """(F - R_c) / mean |x - R_c| + (R_c - R_cfg) / mean |x - R_cfg|, from networks that are asked one by one."""
    noise, eps = whitened(2)
    objective, batch = guided(Objective, times=at(0.7), guidance_times=at(0.3)), labelled(told_batch(noise, eps))
    sample = objective.sample(batch, 0, grad=False)
    got = objective.gradient(batch, sample, objective.look(batch, sample))
    x, rows = STUDENT[0] + STUDENT[1] * noise, torch.ones(64)
    teacher, null = objective.triad.real_score.inner, Condition({"label": rows})
    far, near = 0.3 * x + 0.7 * eps, 0.7 * x + 0.3 * eps
    with torch.no_grad():
        fake, real = objective.triad.fake_score(far, 0.7 * rows, null).x0, teacher(far, 0.7 * rows, batch.cond).x0
        said, nothing = (teacher(near, 0.3 * rows, cond).x0 for cond in (batch.cond, null))
    sharp = nothing + W * (said - nothing)
    expected = (fake - real) / abs_mean(x, real) - (W - 1) * (said - nothing) / abs_mean(x, sharp)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_guidance_never_asks_the_critic_and_is_nothing_at_one() -> None:
    noise, eps = whitened(2)
    parts = []
    for critic in (STUDENT, (4.0, 0.2)):
        objective, batch = guided(Objective, guidance_times=at(0.3)), labelled(told_batch(noise, eps))
        know(objective.triad.fake_score, critic)
        sample = objective.sample(batch, 0, grad=False)
        look = objective.look(batch, sample)
        matching = dmd2.Objective.gradient(objective, batch, sample, look)
        parts.append((matching, objective.gradient(batch, sample, look) - matching))
    (matching, sharper), (other, same) = parts
    assert not torch.allclose(matching, other, rtol=0.1) and torch.allclose(sharper, same, atol=1e-4)
    assert sharper.abs().max() > 1e-2
    objective.triad.real_score.scale = 1.0
    look = objective.look(batch, sample)
    plain = dmd2.Objective.gradient(objective, batch, sample, look)
    assert torch.allclose(objective.gradient(batch, sample, look), plain, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_guidance_is_read_below_the_students_input(factor: float, vp: NoiseSchedule) -> None:
    """Uniform on the clean side before the shift; after it, and on the grid of the process, still below."""
    u = (torch.arange(4096) + 0.5) / 4096
    for schedule in (Flow(), vp):
        levels = [shift(torch.tensor(t), factor).item() for t in (1.0, 0.75, 0.5, 0.25)]
        rollout = Rollout([Step(t, t) for t in levels])
        times = Times(low=0.0, high=1.0, shift=factor)
        objective = guided(Objective, rollout, schedule, guidance_times=times)
        for before, level in zip((1.0, 0.75, 0.5, 0.25), levels, strict=True):
            draw = Draw(0, 0, torch.arange(4096))
            batch = Batch(torch.zeros(4096, 1), Condition(), draw)
            t = objective.cleaner(batch, torch.full_like(u, level))
            assert (t <= level + 1e-6).all() and (t > 0).all()
            share = shift(t, 1 / factor) / before
            assert share.mean().item() == pytest.approx(0.5, abs=0.02)
            assert share.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_times_and_noises_of_the_parts_are_their_own() -> None:
    objective = guided(Objective)
    draw = Draw(0, 0, torch.arange(2048))
    batch = labelled(Batch(draw.normal("noise", (32,)), Condition(), draw))
    look = objective.look(batch, objective.sample(batch, 0, False))
    assert abs(torch.corrcoef(torch.stack([look.t, look.guided_t]))[0, 1]) < 0.08
    x = look.x
    eps = (look.x_t - (1 - look.t[:, None]) * x) / look.t[:, None]
    other = draw.normal("decoupled.guided_eps", (32,))
    assert abs(torch.corrcoef(torch.stack([eps.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_the_teacher_is_asked_once() -> None:
    objective = guided(Objective)
    play(objective, labelled(told_batch(*whitened(2))))
    assert objective.triad.real_score.inner.sizes == [3 * 64]


def test_a_teacher_without_guidance_is_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.guidance above 1"):
        Objective(Config(), gaussian_triad(Flow(), "sample"), one_step())


def left(law: Tensor) -> Tensor:
    """E g and E g z of weight none for a student of that law with an exact critic, t of both parts U(.02, .98)."""
    t = torch.linspace(0.02, 0.98, 4001, dtype=torch.float64)
    alpha, (mean, std) = 1 - t, law

    def slope(s: Tensor | float) -> Tensor:
        return alpha * s**2 / (alpha**2 * s**2 + t**2)

    def gap(one: tuple[Tensor, Tensor | float], other: Law) -> Tensor:
        """Mean and slope in z of one denoiser less another at x_t = alpha (mean + std z) + t eps."""
        shifts = [m + slope(s) * alpha * (mean - m) for m, s in (one, other)]
        return torch.stack([shifts[0] - shifts[1], (slope(one[1]) - slope(other[1])) * alpha * std])

    everywhere = gap((mean, std), TEACHER) - (W - 1) * gap(TEACHER, ANYTHING)  # type: ignore[arg-type]
    return torch.trapezoid(everywhere, t, dim=1)


def optimum() -> Law:
    """Where nothing is left, by Newton's method."""
    law = torch.tensor(TEACHER, dtype=torch.float64)
    for _ in range(20):
        law = law - torch.linalg.solve(torch.autograd.functional.jacobian(left, law), left(law))
    assert left(law).abs().max() < 1e-12
    return law[0].item(), law[1].item()


@pytest.mark.slow
def test_learns_its_own_optimum() -> None:
    """Two times and two noises: neither the teacher's law nor its guided one, but the root of `left`, within 2 %."""
    objective = guided(Objective, weight="none")
    keep_critic_exact(objective, fresh=True)
    players = players_for(objective, adam(2e-2, 800), adam(1e-9))
    learn(objective, players, 800, extra=lambda draw: {"cond": Condition({"label": torch.zeros(len(draw.ids))})})
    assert law_of(objective) == pytest.approx(optimum(), rel=0.02)
    assert optimum()[0] > 1.1 * TEACHER[0]

from __future__ import annotations

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Law,
    Renamed,
    Student,
    adam,
    at,
    gaussian_triad,
    kl_gradient,
    know,
    learn,
    made,
    one_step,
    play,
    real_batch,
    told_batch,
    walk,
    weights,
    whitened,
)

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import dmd
from fewstep.objectives.base import Triad
from fewstep.objectives.twinflow import Config, Objective
from fewstep.rollout import ode
from fewstep.train.player import Player

ALONE = {"jump": 0.0, "rectify": 1.0, "clamp": 1e6}


class Mean(GaussianModel):
    """The exact mean velocity of a Gaussian's flow from t to 0."""

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        x0 = self.flow_map(x_t, t, torch.zeros_like(t))
        return Prediction((x_t - x0) / t[:, None], self.kind, x_t, t, self.schedule)


class Signed(Backbone):
    """Separate networks behind the sign: none, + and -."""

    def __init__(self, jump: Backbone, real: Law, fake: Law):
        super().__init__()
        self.jump, self.schedule, self.kind = jump, jump.schedule, jump.kind
        self.real = GaussianModel(*real, self.schedule, "flow_prediction", learned=True)
        self.fake = GaussianModel(*fake, self.schedule, "flow_prediction", learned=True)

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        sign = cond.dials.get("sign", torch.zeros_like(t)).unique().item()
        return {0.0: self.jump, 1.0: self.real, -1.0: self.fake}[sign](x_t, t, cond)


def twin(
    student: Law = STUDENT,
    real: Law = TEACHER,
    fake: Law | None = None,
    schedule: NoiseSchedule | None = None,
    **changes,
) -> Objective:
    net = Signed(Student(schedule or Flow(), [student]), real, fake or student)
    return Objective(Config(**{**ALONE, **changes}), Triad(net), one_step())  # type: ignore[arg-type]


def rectified(objective: Objective, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients of the gap between the velocities alone."""
    loss, _ = objective.rectified(batch, objective.sample(batch, 0, True))
    objective.zero_grad()
    for _, parameter in weights(objective):
        parameter.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in weights(objective) if p.grad is not None}


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_the_gap_of_the_velocities_is_the_gradient_of_the_kl(t: float) -> None:
    """v- - v+ = (R - F) / t, of which the KL's gradient in x is (1 - t)^2 / t: the student's x is eps - v at time 1."""
    noise, eps = whitened(2)
    gradient = rectified(twin(times=at(t)), told_batch(noise, eps))
    assert set(gradient) == {"generator.jump.mean", "generator.jump.std"}
    scale = (1 - t) ** 2 / t
    got = [scale * gradient[f"generator.jump.{name}"].item() for name in ("mean", "std")]
    assert got == pytest.approx(kl_gradient(Flow(), t), abs=1e-5)


@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.5)])
def test_the_gap_is_that_of_dmd_with_three_networks(steps: tuple[float, ...]) -> None:
    """DMD's plain gap at a time t, times 1 / (t t_in), where t_in is the time of the step; the same draws."""
    student, other, times = Student(Flow(), [STUDENT] * len(steps), steps), (0.2, 0.9), Times(low=0.6, high=0.6000001)
    base = gaussian_triad(Flow(), "flow_prediction", critic=other)
    triads = Triad(Signed(student, TEACHER, other)), Triad(student, base.real_score, base.fake_score)
    one = Objective(Config(**{**ALONE, "times": times}), triads[0], walk(steps))  # type: ignore[arg-type]
    two = dmd.Objective(dmd.Config(weight="none", regression=0, times=times), triads[1], walk(steps))
    exits = set()
    for step in range(6):
        draw = Renamed(0, step, torch.arange(16))
        batch = Batch(draw.normal("noise", (32,)), Condition(), draw)
        gradient, theirs = rectified(one, batch), play(two, batch, step)["generator"].gradients
        sample = one.sample(batch, step, False)
        exits.add(sample.index)
        for name in ("mean", "std"):
            scaled = theirs[f"generator.{name}"] / (0.6 * sample.t[0])
            assert torch.allclose(gradient[f"generator.jump.{name}"], scaled, rtol=1e-5, atol=1e-7)
    assert len(exits) == len(steps)


def test_a_small_gap_is_not_clamped_and_a_large_one_is() -> None:
    noise, eps = whitened(2)
    free, wide, tight = (
        rectified(twin(times=at(0.5), clamp=clamp), told_batch(noise, eps))["generator.jump.mean"].item()
        for clamp in (1e6, 20.0, 1e-3)
    )
    assert wide == free
    assert abs(tight) <= 1e-3 < abs(free)


def test_no_gap_where_the_samples_are_the_data() -> None:
    noise, eps = whitened(2)
    gradient = rectified(twin(student=TEACHER), told_batch(noise, eps))
    assert all(value.abs().max() < 1e-6 for value in gradient.values())


def test_each_velocity_learns_its_own_samples_and_nothing_else() -> None:
    """Both know what they are to learn: no gradient. Told of the other's law, both have one."""
    noise, eps = whitened(2)
    x0 = TEACHER[0] + TEACHER[1] * noise  # independent of eps, exactly of the teacher's law
    for real, fake, silent in ((TEACHER, STUDENT, True), (STUDENT, TEACHER, False)):
        turn = play(twin(real=real, fake=fake, flow_times=at(0.4)), told_batch(noise, eps, x0))["generator"]
        for name in ("real.mean", "real.log_std", "fake.mean", "fake.log_std"):
            assert (abs(turn[f"generator.{name}"]) < 1e-5) == silent
    other = play(twin(real=(0.3, 0.5), flow_times=at(0.4)), told_batch(noise, eps, 0 * x0))["generator"]
    same = play(twin(real=(0.3, 0.5), flow_times=at(0.4)), told_batch(noise, eps, x0))["generator"]
    assert other["generator.fake.mean"] == same["generator.fake.mean"]  # the data never reach the velocity of samples
    assert other["generator.real.mean"] != same["generator.real.mean"]


def any_step(law: Law, short_step: float, t: float = 0.6) -> torch.Tensor:
    """The gradient in mean and log-deviation of the any-step residual at the flow map of a law, on the teacher's data.

    Everything is quadratic in x0 and eps, so whitened draws give its expectation.
    """
    x, eps = whitened(2)
    net = Mean(*law, Flow(), "flow_prediction", learned=True)
    objective = Objective(Config(clamp=1e6, short_step=short_step, flow_times=at(t)), Triad(net), one_step())
    objective.jumped(told_batch(x, eps), TEACHER[0] + TEACHER[1] * x).backward()
    return torch.stack([net.mean.grad, net.log_std.grad])


def test_the_any_step_residual_vanishes_at_the_flow_map_with_the_short_step() -> None:
    """In the first order: half the step, half of what is left, and nothing in the mean, whose way is straight.

    At the map of another law it stays.
    """
    coarse, fine = (any_step(TEACHER, d) for d in (0.02, 0.01))
    assert coarse[1].abs() < 0.02 and coarse[1] / fine[1] == pytest.approx(2, abs=0.1)
    assert coarse[0].abs() < 1e-5 and fine[0].abs() < 1e-5
    assert any_step(STUDENT, 0.01).norm() > 0.2


def test_below_the_short_step_the_jump_is_flow_matching() -> None:
    """The gradient of half the squared error of v against eps - x0, whatever the network says at time 0."""
    x, eps = whitened(2)
    net = GaussianModel(*STUDENT, Flow(), "flow_prediction", learned=True)
    objective = Objective(Config(clamp=1e6, short_step=0.2, flow_times=at(0.1)), Triad(net), one_step())
    objective.jumped(told_batch(x, eps), x).backward()
    jump = net.mean.grad.clone(), net.log_std.grad.clone()
    net.zero_grad()
    t = torch.full((len(x),), 0.1)
    (0.5 * (net(0.9 * x + 0.1 * eps, t, Condition()).velocity - (eps - x)).square().mean()).backward()
    for got, expected in zip(jump, (net.mean.grad, net.log_std.grad), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5)


def trained(exact: bool, steps: int, lr: float) -> tuple[float, float]:
    """What a student ends at that learns by the gap alone; its velocities are told the truth, or learn it beside it."""
    objective = twin()
    net: Signed = objective.triad.generator  # type: ignore[assignment]
    if exact:
        sample = objective.sample

        def told(batch: Batch, step: int, grad: bool):
            know(net.fake, (net.jump.mean.item(), net.jump.std.item()))  # type: ignore[arg-type]
            know(net.real, TEACHER)
            return sample(batch, step, grad)

        objective.sample = told  # type: ignore[method-assign]
    player = Player("generator", [net], adam(lr, steps))
    learn(objective, {"generator": player}, steps, extra=lambda draw: {"x0": real_batch(draw.step, draw.ids).x0})
    return made(net, (1.0,))


def test_learns_the_data_with_exact_velocities() -> None:
    """From (-.5, 1.3) to N(1, .7^2), 400 moves of Adam at 2e-2, cosine: within 2 %."""
    assert trained(True, 400, 2e-2) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_data_with_learned_velocities() -> None:
    """All three start where the student is, with one rate, 1,500 moves: within 4 %."""
    assert trained(False, 1500, 1e-2) == pytest.approx(TEACHER, rel=0.04)


@pytest.mark.parametrize("wrong", [{"rectify": -1.0}, {"jump": -1.0}, {"clamp": 0.0}, {"short_step": 0.0}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="objective"):
        Config(**wrong)


def test_another_process_and_jumps_without_fresh_noise_are_refused(vp: NoiseSchedule) -> None:
    with pytest.raises(UserError, match="flow teacher"):
        Objective(Config(), Triad(Student(vp, [STUDENT])), one_step())
    with pytest.raises(UserError, match="transition=renoise"):
        Objective(Config(), Triad(Student(Flow(), [STUDENT] * 2, (1.0, 0.5))), walk((1.0, 0.5), ode))

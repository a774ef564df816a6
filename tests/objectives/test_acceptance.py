"""What every student map has to show on every process, whatever the network predicts."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from flow_maps import LAW, Jump, Perceptron
from oracle import ConsistencyMap
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import KINDS, Kind, Prediction
from fewstep.core.schedule import EDM, VP, Flow, NoiseSchedule, Trig, add_noise, expand, remap, vp_from_betas
from fewstep.core.times import Grid, Step
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel, MixtureModel
from fewstep.models.tangent import Direction, along
from fewstep.objectives import consistency
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.flow import as_flow
from fewstep.objectives.pieces.teacher_step import teacher_step
from fewstep.rollout import GammaJump, Rollout, Transition, ode, renoise

COND = Condition()
SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": Flow(),
    "vp": vp_from_betas("linear", 1e-4, 0.02),
    "vp0": vp_from_betas("scaled_linear", 0.00085, 0.012, zero_terminal_snr=True),
    "edm": EDM(),
    "trig": Trig(),
}
CELLS = [
    (name, kind)
    for name in SCHEDULES
    for kind in KINDS
    if not (name == "vp0" and kind == "epsilon") and not (name == "edm" and kind == "v_prediction")
]
"""A prediction of the noise alone says nothing at pure noise; v belongs to alpha^2 + sigma^2 = 1."""
every_cell = pytest.mark.parametrize("name, kind", CELLS, ids=[f"{name}-{kind}" for name, kind in CELLS])
every_process = pytest.mark.parametrize("name", SCHEDULES)


def teacher_of(name: str, kind: Kind = "v_prediction") -> GaussianModel:
    return GaussianModel(*LAW, SCHEDULES[name], "sample" if name == "edm" and kind == "v_prediction" else kind)


def start(name: str, rows: int = 4000) -> Tensor:
    """Pure noise with exact moments."""
    z = torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))
    return (z - z.mean()) / z.std()


@every_cell
def test_readings_make_the_state_and_the_output_again(name: str, kind: Kind) -> None:
    """Any output: alpha x0 + sigma eps = x_t, and `target` of the two is the output."""
    schedule, x = SCHEDULES[name], torch.randn(64, 3)
    t = torch.linspace(0.05, 0.95, 64)
    x = x * (schedule.at(t, x).alpha ** 2 + schedule.at(t, x).sigma ** 2).sqrt()
    prediction = Prediction(torch.randn(64, 3), kind, x, t, schedule)
    again = add_noise(schedule, prediction.x0, prediction.eps, t)
    assert torch.allclose(again, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert torch.allclose(prediction.target(prediction.x0, prediction.eps), prediction.value, rtol=1e-3, atol=1e-3)


@every_cell
def test_maps_stay_where_they_are_told_to_stay(name: str, kind: Kind) -> None:
    """The jump from t to t is the identity for any output, and the clean end is the fixed point of the exact maps."""
    schedule = SCHEDULES[name]
    t = torch.linspace(0.05, 0.95, 64)
    x = (
        torch.randn(64, 3)
        * (schedule.at(t, torch.ones(64, 3)).alpha ** 2 + schedule.at(t, torch.ones(64, 3)).sigma ** 2).sqrt()
    )
    prediction = Prediction(torch.randn(64, 3), kind, x, t, schedule)
    assert torch.allclose(prediction.to(t), x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    teacher = teacher_of(name, kind)
    near = torch.full((64,), 1e-3)
    clean = ConsistencyMap(teacher)(x0 := torch.randn(64, 3), near, COND).x0
    assert (clean - x0).abs().max() < (0.01 if name != "edm" else 0.05)
    assert torch.allclose(teacher.flow_map(x, t, t), x, atol=1e-4 * float(x.abs().max()))


@every_process
def test_a_teacher_step_has_the_order_of_its_solver(name: str) -> None:
    """At the exact map: f(x_t) - f(teacher's x_s) goes like h^2 for DDIM and like h^3 for Heun."""
    teacher = teacher_of(name)
    middle = 0.5 if name != "edm" else 0.02
    t = torch.full((4000,), middle)
    x = add_noise(teacher.schedule, LAW[0] + LAW[1] * start(name), start(name).flip(0), t)
    f = ConsistencyMap(teacher)
    for solver, order in (("euler", 2), ("heun", 3)):
        steps, residuals = [1 / 20, 1 / 30, 1 / 40], []
        for h in steps:
            s = t * (1 - h)
            x_s = teacher_step(teacher, x, t, s, COND, solver)  # type: ignore[arg-type]
            residuals.append(float((f(x, t, COND).x0 - f(x_s, s, COND).x0).square().mean().sqrt()))
        slope = np.polyfit(np.log(steps), np.log(residuals), 1)[0]
        assert slope == pytest.approx(order, abs=0.25) and residuals[-1] > 2e-7, solver


@every_process
def test_velocities_of_data_are_the_teachers_on_average(name: str) -> None:
    """E[alpha' x0 + sigma' eps | x_t] = v(x_t): residual and its product with x_t have mean zero, to four errors."""
    teacher, rows = teacher_of(name), 200_000
    generator = torch.Generator().manual_seed(0)
    x0, eps = LAW[0] + LAW[1] * torch.randn(rows, 1, generator=generator), torch.randn(rows, 1, generator=generator)
    t = (
        0.05 + 0.9 * torch.rand(rows, generator=generator)
        if name != "edm"
        else 0.001 + 0.05 * torch.rand(rows, generator=generator)
    )
    c = teacher.schedule.at(t, x0)
    x_t = add_noise(teacher.schedule, x0, eps, t)
    off = c.d_alpha * x0 + c.d_sigma * eps - teacher(x_t, t, COND).velocity
    size = off.std()
    assert size > 0.2
    for weight in (torch.ones_like(x_t), x_t / x_t.std()):
        product = off * weight
        assert product.mean().abs() < 4 * product.std() / rows**0.5


@every_process
def test_forward_mode_is_the_difference(name: str) -> None:
    """d/dt of the network along the flow, against a central difference in float64 of the same weights."""
    torch.manual_seed(0)
    net = Perceptron(dims=3, schedule=SCHEDULES[name], kind="sample").double()
    x, t, dx = (
        torch.randn(8, 3, dtype=torch.float64),
        torch.linspace(0.2, 0.8, 8, dtype=torch.float64),
        torch.randn(8, 3, dtype=torch.float64),
    )
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (net(x + sign * h * dx, t + sign * h, COND).value for sign in (1, -1))
        exact = along(net, x, t, COND, Direction(dx, torch.ones_like(t)), "exact", 1e-4, None)
        twice = along(net, x, t, COND, Direction(2 * dx, 2 * torch.ones_like(t)), "exact", 1e-4, None)
    truth = (ahead - behind) / (2 * h)
    assert (exact - truth).norm() / truth.norm() < 1e-3
    assert torch.allclose(twice, 2 * exact, rtol=1e-4) and not exact.requires_grad


@every_cell
def test_guidance_is_one_thing_for_every_prediction(name: str, kind: Kind) -> None:
    """u + w (c - u) of outputs is that of x0, eps and velocities; w = 1 is the condition, w = 0 none."""

    class Two(GaussianModel):
        def null(self, cond: Condition) -> Condition:
            return Condition({"class_labels": torch.ones_like(cond.inputs["class_labels"])})

        def forward(self, x_t, t, cond, **more):
            here = super().forward(x_t, t, cond, **more)
            by = cond.inputs["class_labels"][:, None] * 0.5
            return Prediction(here.target(here.x0 + by, here.eps), self.kind, x_t, t, self.schedule)

    net = Two(*LAW, SCHEDULES[name], kind)
    cond, t = Condition({"class_labels": torch.zeros(16)}), torch.linspace(0.1, 0.9, 16)
    x = torch.randn(16, 3)
    c, u, guided = net(x, t, cond), net(x, t, net.null(cond)), Guided(net, 2.5)(x, t, cond)
    for reading in ("x0", "eps", "velocity"):
        a, b, g = (getattr(one, reading) for one in (u, c, guided))
        assert torch.allclose(g, a + 2.5 * (b - a), rtol=1e-3, atol=2e-3 * float(g.abs().max()))
    assert torch.allclose(Guided(net, 0.0)(x, t, cond).value, u.value, atol=1e-4)


@every_process
@pytest.mark.parametrize("how", [ode, renoise, GammaJump(0.3)], ids=["jump", "renoise", "gamma"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_samplers_keep_the_law_with_the_exact_map(name: str, how: Transition, count: int) -> None:
    """Mean and deviation after `count` steps, to four standard errors; the jump is taken from the map itself."""
    teacher, rows = teacher_of(name), 20_000
    steps = [Step(level, level) for level in _levels(name, count)]
    two = how is not renoise
    net: Backbone = Jump(teacher) if two else ConsistencyMap(teacher)
    noise = start(name, rows)
    made = Rollout(steps, how, two_times=two)(net, noise, COND, Draw(0, 0, torch.arange(rows))).x0
    # Noise of unit deviation is not the process's own law at its last level.
    first = teacher.flow_map(noise * teacher.schedule.prior_std, torch.ones(rows), torch.zeros(rows))
    slack = 4 / rows**0.5
    assert made.mean().item() == pytest.approx(first.mean().item(), abs=LAW[1] * slack)
    assert made.std().item() == pytest.approx(first.std().item(), abs=LAW[1] * slack)
    if how is ode:
        assert torch.allclose(made, first, atol=2e-3)


def _levels(name: str, count: int) -> list[float]:
    even = [1 - i / count for i in range(count)]
    return [level**4 for level in even] if name == "edm" else even


@every_process
def test_every_process_is_a_flow(name: str) -> None:
    """The same map at the same sigma / alpha: x0 of the remapped network, and its velocity of a line."""
    teacher, flow = teacher_of(name), as_flow(teacher_of(name))
    t = torch.linspace(0.1, 0.9, 32)
    x = torch.randn(32, 3)
    there, scale = remap(Flow(), teacher.schedule, t, x)
    inner = teacher(scale * x, there, COND)
    outer = flow(x, t, COND)
    assert torch.allclose(outer.x0, inner.x0, atol=2e-3) and torch.allclose(
        outer.velocity, outer.eps - outer.x0, atol=1e-3
    )


def test_a_trig_flow_and_a_linear_one_are_each_other() -> None:
    """s = sin / (sin + cos), x_fm = x_trig sqrt(s^2 + (1 - s)^2), in numbers."""
    t = torch.tensor([0.2, 0.5, 0.9])
    there, scale = remap(Trig(), Flow(), t, torch.zeros(3, 1))
    angle = t.double() * math.pi / 2
    s = angle.sin() / (angle.sin() + angle.cos())
    assert torch.allclose(there.double(), s, atol=1e-6)
    assert torch.allclose(scale.double().flatten(), (s**2 + (1 - s) ** 2).sqrt(), atol=1e-6)


def test_a_curriculum_resumes_where_it_stopped() -> None:
    """Nothing but the step decides it: pairs of step 700 are those of a run that began there."""
    config: Any = consistency.Config(mode="training", target="self")
    config.curriculum.law, config.curriculum.over = "root", 800
    draw = Draw(3, 700, torch.arange(32))
    batch = Batch(draw.normal("noise", (2,)), COND, draw, draw.normal("x0", (2,)))
    net = GaussianModel(*LAW, Flow(), "flow_prediction", learned=True)
    first, second = (
        consistency.Objective(copy.deepcopy(config), Triad(net), Rollout([Step(1.0, 1.0)])) for _ in range(2)
    )
    for step in range(5):
        list(first.turns(batch, step))
    one, other = (next(iter(objective.turns(batch, 700))).loss for objective in (first, second))
    assert torch.equal(one, other)


def test_the_exact_map_of_a_mixture_is_curved() -> None:
    """A consistency model of a mixture by 400 Heun steps: one DDIM step leaves h^2 there too."""
    teacher = MixtureModel(torch.tensor([[-1.5], [1.0]]), 0.4, torch.tensor([0.3, 0.7]), Flow(), "flow_prediction")
    x, residuals = start("flow", 400), []
    t = torch.full((400,), 0.6)
    end = teacher.flow_map(x, t, torch.zeros(400))
    for h in (0.1, 0.05, 0.025):
        s = t - h
        residuals.append(
            float((teacher.flow_map(teacher(x, t, COND).to(s), s, torch.zeros(400)) - end).square().mean().sqrt())
        )
    slope = np.polyfit(np.log([0.1, 0.05, 0.025]), np.log(residuals), 1)[0]
    assert slope == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, law="karras"), Grid(8, shift=3.0)])
@every_process
def test_pairs_lie_on_the_process(name: str, grid: Grid) -> None:
    times = grid.times(SCHEDULES[name])
    assert times[0] == 0 and times[-1] == 1 and (times[1:] > times[:-1]).all()
    if isinstance(SCHEDULES[name], VP):
        assert torch.allclose(times * 1000, (times * 1000).round(), atol=1e-3)


@every_process
def test_half_precision_gives_finite_numbers(name: str) -> None:
    """bfloat16 states and outputs at both ends of time: readings are float32 and finite."""
    schedule = SCHEDULES[name]
    kind: Kind = "sample" if name == "edm" else "v_prediction"
    for when in (1e-3, 0.5, 1.0):
        t = torch.full((4,), when)
        prediction = Prediction(torch.randn(4, 3).bfloat16(), kind, torch.randn(4, 3).bfloat16(), t, schedule)
        for reading in (prediction.x0, prediction.velocity, prediction.to(0.5 * t)):
            assert reading.dtype == torch.float32 and reading.isfinite().all()
    assert expand(torch.ones(2), torch.ones(2, 3)).shape == (2, 1)

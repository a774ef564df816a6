from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Perceptron, train
from oracle import walk
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, vp_from_betas
from fewstep.core.times import Grid, Step
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.boot import Config, Objective
from fewstep.objectives.pieces.teacher_step import teacher_step
from fewstep.rollout import Rollout, ode, renoise

EARLY = vp_from_betas("scaled_linear", 0.00085, 0.012)
"""A process that leaves some of the image at its last level."""
ONE = Rollout([Step(1.0, 1.0)], ode, two_times=True)


class Signal(Backbone):
    """The signal of a Gaussian's flow: exact, or of the DDIM steps down a ladder."""

    def __init__(self, of: GaussianModel, ladder: Grid | None = None):
        super().__init__()
        self.of, self.schedule, self.kind, self.ladder = of, of.schedule, of.kind, ladder

    def state(self, x_t: Tensor, t: Tensor, to: Tensor) -> Tensor:
        if self.ladder is None:
            return self.of.flow_map(x_t, t, to)
        times = self.ladder.times(self.schedule).flip(0)
        x, found = x_t, torch.where((to == times[0])[:, None], x_t, 0.0)
        for here, there in itertools.pairwise(times):
            x = teacher_step(self.of, x, here * torch.ones_like(t), there * torch.ones_like(t), Condition(), "euler")
            found = torch.where((to == there)[:, None], x, found)
        return found

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        local, at_to, at_t = self.of(x_t, t, cond), self.schedule.at(to, x_t), self.schedule.at(t, x_t)
        y = (self.state(x_t, t, to) - at_to.sigma * local.eps) / at_to.alpha
        y = torch.where((to == t)[:, None], local.x0, y)
        value = local.target(y, (x_t - at_t.alpha * y) / at_t.sigma)
        return Prediction(value, self.kind, x_t, t, self.schedule)


def objective_of(net: Backbone, teacher: Backbone, **changes: Any) -> Objective:
    return Objective(Config(**changes), Triad(net, Guided(teacher)), ONE)


def batch(rows: int = 512, dims: int = 3) -> Batch:
    draw = Draw(0, 0, torch.arange(rows))
    return Batch(draw.normal("noise", (dims,)), Condition(), draw)


def told(objective: Objective, given: Batch) -> dict[str, float]:
    (turn,) = objective.turns(given, 0)
    return {name: value.item() for name, value in turn.logs.items()}


@pytest.mark.parametrize("schedule, kind", [*PROCESSES, (EARLY, "epsilon")], ids=[*NAMES, "vp-early"])
def test_the_teachers_steps_down_the_ladder_are_its_zero(schedule: NoiseSchedule, kind: Kind) -> None:
    """The student that has nothing to learn samples as the teacher does in 8 DDIM steps; on another ladder it has."""
    teacher = GaussianModel(*LAW, schedule, kind)
    seen = told(objective_of(Signal(teacher, Grid(8)), teacher, grid=Grid(8)), batch())
    assert seen["along"] < 1e-5 and seen["boundary"] < 1e-8
    finer = told(objective_of(Signal(teacher), teacher, grid=Grid(8)), batch())
    assert finer["along"] > 5e-4 and finer["boundary"] < 1e-8


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_signal_of_the_flow_obeys_the_equation(schedule: NoiseSchedule, kind: Kind) -> None:
    """One step from the exact signal misses it by the square of its length: slope 2. Seen: 1.93, 1.94."""
    teacher, given, missed = GaussianModel(*LAW, schedule, kind), batch(), []
    net, noisiest = Signal(teacher), torch.ones(512)
    z, eps = given.noise, teacher(given.noise, noisiest, Condition()).eps
    counts = [10, 20, 40]
    for count in counts:
        t, s = torch.full((512,), 0.6), torch.full((512,), 0.6 - 1 / count)
        y_t, y_s = (net(z, noisiest, Condition(), to=time).x0 for time in (t, s))
        step = objective_of(net, teacher).cleaner(y_t, eps, given, t, s)
        missed.append((step - y_s).square().mean().sqrt().item())
    slope = float(np.polyfit(np.log([1 / count for count in counts]), np.log(missed), 1)[0])
    assert slope == pytest.approx(2, abs=0.25)


def test_a_step_of_no_length_changes_nothing() -> None:
    teacher, given = GaussianModel(*LAW, Flow(), "flow_prediction"), batch()
    y, t = torch.randn(512, 3), torch.full((512,), 0.5)
    objective = objective_of(Signal(teacher), teacher)
    assert torch.equal(objective.cleaner(y, given.noise, given, t, t), y)
    last = objective.cleaner(y, given.noise, given, t, 0 * t)  # and the last one denoises
    assert torch.equal(last, teacher(0.5 * y + 0.5 * given.noise, t, Condition()).x0)


def test_short_steps_weigh_as_much_as_long_ones() -> None:
    """On an uneven ladder the residual is divided by the length of its step in even steps."""
    net, teacher = (GaussianModel(mean, 0.7, Flow(), "flow_prediction") for mean in (0.0, 1.0))
    given, grid = batch(), Grid(4, shift=3.0)
    t, s = grid.pair(given.draw.uniform("boot.t"), Flow())
    objective = objective_of(net, teacher, grid=grid)
    y = net(given.noise, torch.ones(512), Condition()).x0
    off = y - objective.cleaner(y, given.noise, given, t, s)
    assert told(objective, given)["along"] == pytest.approx((off / (4 * (t - s))[:, None]).square().mean().item())
    assert told(objective, given)["boundary"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_its_end_is_the_sample(schedule: NoiseSchedule, kind: Kind) -> None:
    teacher, given = GaussianModel(*LAW, schedule, kind), batch(64)
    sampled = ONE(Signal(teacher), given.noise, Condition(), given.draw).x0
    assert torch.allclose(sampled, teacher.flow_map(given.noise, torch.ones(64), torch.zeros(64)), atol=1e-4)


def test_nothing_reads_data() -> None:
    assert Objective.reads == () and Objective.needs(Config()) == ("generator", "real_score")


def test_it_learns_the_end_of_the_path() -> None:
    """From random weights on a ladder of 16, whose DDIM steps end at a deviation of .656. Seen: .037."""
    torch.manual_seed(0)
    net, teacher = Perceptron(), GaussianModel(*LAW, Flow(), "flow_prediction")
    train(objective_of(net, teacher, grid=Grid(16)), 1500, 3e-3)
    with torch.no_grad():
        noise = batch(4096, 1).noise
        x = ONE(net, noise, Condition(), Draw(0, 0, torch.arange(4096))).x0
        end = Signal(teacher, Grid(16)).state(noise, torch.ones(4096), torch.zeros(4096))
    assert (x - end).square().mean().sqrt() < 0.07


def test_other_steps_are_refused() -> None:
    triad = Triad(net := GaussianModel(*LAW, Flow(), "flow_prediction"), Guided(net))
    with pytest.raises(UserError, match=r"set model\.steps=1"):
        Objective(Config(), triad, walk((1.0, 0.5), ode))
    with pytest.raises(UserError, match=r"set model\.transition=ode"):
        Objective(Config(), triad, walk((1.0,), renoise))


@pytest.mark.parametrize("wrong", [{"boundary": 0.0}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

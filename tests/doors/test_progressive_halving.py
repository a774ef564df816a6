"""Progressive distillation: a student's one step matches two of its teacher's, and stages halve the steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Step, ode

MEAN, STD = 0.5, 0.4


def walk(count: int) -> Rollout:
    return Rollout([Step(1 - i / count, 1 - i / count) for i in range(count)], ode)


class Affine(Backbone):
    """The exact Gaussian velocity at four times, a x + b, with a and b learned at each: its steps compose exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        exact, times = GaussianModel(MEAN, STD, Flow(), "flow_prediction"), torch.arange(1, 5) / 4
        at_zero, at_one = (exact(torch.full((4, 1), x), times, Condition()).value for x in (0.0, 1.0))
        self.table = nn.Parameter(torch.cat([at_one - at_zero, at_zero], 1).detach())

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        a, b = self.table[(4 * t).round().long() - 1].unbind(1)
        return Prediction(a[:, None] * x_t + b[:, None], self.kind, x_t, t, self.schedule)


class Halving(Objective):
    """`config` is the teacher's rollout, of twice the steps."""

    roles = ("generator", "real_score")

    def turns(self, batch: Batch, step: int):
        exit = batch.draw.shared_integer("exit", len(self.rollout))
        args = (batch.noise, batch.cond, batch.draw)
        stop = self.rollout.level_after(exit)
        told = self.rollout(self.triad.generator, *args, exit=exit, stop=stop, grad=1)
        with torch.no_grad():
            x = told.x_t
            for i in (2 * exit, 2 * exit + 1):
                here, level = self.config.steps[i], self.config.level_after(i)
                rows = torch.ones(len(x))
                prediction = self.triad.real_score(x, here.told * rows, batch.cond)
                x = prediction.to(level * rows) if level else prediction.x0
        yield Turn("generator", (told.x - x).square().mean())


def halve(stage: Any, points: Any, teacher: Backbone, count: int) -> Backbone:
    """A stage: the student starts from its teacher and is the next stage's."""
    one = stage(Halving, Triad(copy.deepcopy(teacher), teacher), walk(count), walk(2 * count), lr=0.01)
    one.play(points, steps=200, rows=64)
    return one.objective.triad.generator


def end(net: Backbone, count: int) -> torch.Tensor:
    noise = torch.linspace(-2, 2, 41)[:, None]
    return walk(count)(net, noise, Condition(), None).x0.detach()  # type: ignore[arg-type]


def test_two_halvings_keep_the_map_of_four_steps(stage: Any, points: Any) -> None:
    """From 4 steps to 1 the end of every path within two standard deviations stays; undistilled it does not."""
    teacher = Affine()
    student = halve(stage, points, halve(stage, points, teacher, 2), 1)
    meant = end(teacher, 4)
    assert (end(student, 1) - meant).abs().max() < 0.02
    assert (end(teacher, 1) - meant).abs().max() > 0.3

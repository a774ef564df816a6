"""What the tests of two-time flow maps share: exact maps of a Gaussian, networks that learn one, and their errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, vp_from_betas
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective
from fewstep.rollout import Rollout, ode

LAW = (1.0, 0.7)
VP = vp_from_betas("linear", 1e-4, 0.02)
PROCESSES: list[tuple[NoiseSchedule, Kind]] = [(Flow(), "flow_prediction"), (VP, "epsilon"), (VP, "v_prediction")]
NAMES = ["flow", "vp-epsilon", "vp-v"]


class Jump(Backbone):
    """The exact two-time map of a Gaussian: x0 and eps such that their mixture at `to` is where the flow leads."""

    def __init__(self, of: GaussianModel):
        super().__init__()
        self.of, self.schedule, self.kind = of, of.schedule, of.kind

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        local = self.of(x_t, t, cond)
        here, there = self.schedule.at(t, x_t), self.schedule.at(to, x_t)
        x_s = self.of.flow_map(x_t, t, to)
        turn = there.alpha * here.sigma - here.alpha * there.sigma
        close = (turn.abs() < 1e-6).expand_as(x_t)
        turn = turn.masked_fill(turn.abs() < 1e-6, 1.0)
        x0 = torch.where(close, local.x0, (here.sigma * x_s - there.sigma * x_t) / turn)
        eps = torch.where(close, local.eps, (there.alpha * x_t - here.alpha * x_s) / turn)
        return Prediction(local.target(x0, eps), self.kind, x_t, t, self.schedule)


def data_batch(rows: int, seed: int = 0, dims: int = 3) -> Batch:
    draw = Draw(seed, 0, torch.arange(rows))
    x0 = LAW[0] + LAW[1] * draw.normal("x0", (dims,))
    return Batch(draw.normal("noise", (dims,)), Condition(), draw, x0)


class Perceptron(Backbone):
    """A velocity (B, 1) of x_t, t and to."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, *, to=None, taps=(), stop=False):
        value = self.layers(torch.cat([x_t, t[:, None], to[:, None]], 1))
        return Prediction(value, self.kind, x_t, t, self.schedule)


def walked(net: Backbone, count: int, noise: Tensor, schedule: NoiseSchedule | None = None) -> Tensor:
    """The samples of `count` even steps of a network that is told where they end."""
    times = [1 - i / count for i in range(count)]
    rollout = Rollout([Step(t, t) for t in times], ode, two_times=True)
    return rollout(net, noise, Condition(), Draw(0, 0, torch.arange(len(noise)))).x0


def train(objective: Objective, steps: int, lr: float, rows: int = 256, dims: int = 1) -> None:
    """Adam on the generator alone, a fresh batch of LAW a step; followers trail as in a run."""
    net: Any = objective.triad.generator
    optimizer = torch.optim.Adam(net.parameters(), lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    decays = objective.followers()
    for step in range(steps):
        draw = Draw(0, step, torch.arange(step * rows, (step + 1) * rows))
        x0 = LAW[0] + LAW[1] * draw.normal("x0", (dims,))
        (turn,) = objective.turns(Batch(draw.normal("noise", (dims,)), Condition(), draw, x0), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
        decay.step()
        for name, keep in decays.items():
            with torch.no_grad():
                for ours, theirs in zip(objective.targets[name].parameters(), net.parameters(), strict=True):
                    ours.lerp_(theirs, 1 - keep)


@torch.no_grad()
def error(net: Backbone, count: int = 1) -> float:
    """Rms distance of `count` steps to the exact map of LAW, 1 + .7 z."""
    noise = Draw(9, 0, torch.arange(4096)).normal("error", (1,))
    return (walked(net, count, noise) - (LAW[0] + LAW[1] * noise)).square().mean().sqrt().item()

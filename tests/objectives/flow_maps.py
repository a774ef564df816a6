"""What tests of maps to one end share, beside those of two times (`maps.py`): phases, data, a network, a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from maps import LAW, NAMES, PROCESSES, VP, Jump
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective

__all__ = ["LAW", "NAMES", "PROCESSES", "VP", "Jump"]


def teacher_of(schedule: NoiseSchedule = PROCESSES[0][0], kind: Kind = "flow_prediction") -> GaussianModel:
    return GaussianModel(*LAW, schedule, kind)


def data(rows: int, seed: int = 0, dims: int = 3, **cond: Tensor) -> Batch:
    draw = Draw(seed, 0, torch.arange(rows))
    x0 = LAW[0] + LAW[1] * draw.normal("x0", (dims,))
    return Batch(draw.normal("noise", (dims,)), Condition(dict(cond)), draw, x0)


class Ending(Backbone):
    """`Jump` whose end is decided by the time alone: `ends` says where a jump from t (B,) leads."""

    def __init__(self, of: GaussianModel, ends: Callable[[Tensor], Tensor]):
        super().__init__()
        self.map, self.ends, self.schedule, self.kind = Jump(of), ends, of.schedule, of.kind

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return self.map(x_t, t, cond, to=self.ends(t))


class Perceptron(Backbone):
    """value (B, D) of x_t, t and whatever else is told; sinusoids would be wasted on so smooth a truth."""

    def __init__(
        self, dims: int = 1, told: int = 0, schedule: NoiseSchedule | None = None, kind: Kind = "flow_prediction"
    ):
        super().__init__()
        self.schedule, self.kind = schedule or Flow(), kind
        self.layers = nn.Sequential(
            nn.Linear(dims + 1 + told, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, dims)
        )

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        more = [*([] if to is None else [to]), *cond.dials.values()]
        value = self.layers(torch.cat([x_t, t[:, None], *(one[:, None] for one in more)], 1))
        return Prediction(value, self.kind, x_t, t, self.schedule)


def train(objective: Objective, steps: int, lr: float = 3e-3, size: int = 256, dims: int = 1) -> None:
    """Adam on the generator with a falling rate; targets trail it by .95."""
    net = objective.triad.generator
    optimizer = torch.optim.Adam(net.parameters(), lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        draw = Draw(0, step, torch.arange(size))
        x0 = LAW[0] + LAW[1] * draw.normal("x0", (dims,))
        for turn in objective.turns(Batch(draw.normal("noise", (dims,)), Condition(), draw, x0), step):
            optimizer.zero_grad()
            turn.loss.backward()
            optimizer.step()
        falling.step()
        for target in objective.targets.values():
            with torch.no_grad():
                for mine, theirs in zip(target.parameters(), net.parameters(), strict=True):
                    mine.lerp_(theirs, 0.05)


def one_step_error(net: Backbone, told: dict[str, Tensor] | None = None, **to: Any) -> float:
    """rms of one step's x0 against 1 + .7 z, the exact map of the flow."""
    noise = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = net(noise, torch.ones(4096), Condition({}, told or {}), **to).x0
    return (x - (LAW[0] + LAW[1] * noise)).square().mean().sqrt().item()


def guided(net: Backbone) -> Guided:
    return Guided(net)

"""Continuous-time consistency (sCM; Lu & Song 2024, arXiv:2410.11081), by a network of any process.

The network is read on angles, x = cos(a) x0 + sin(a) eps, as F = dx/da. f = cos(a) x - sin(a) F jumps to the clean end,
and does not change along the flow where

    g = -cos^2(a) (F - v) - r (cos(a) sin(a) x + cos(a) sin(a) dF/da) = cos(a) df/da  is 0 (r = 1)

v is the (guided) teacher's velocity, or cos(a) eps - sin(a) x0 of data without a teacher, and dF/da the derivative
along it. r rises from 0, where this is flow matching, to 1 during `warmup`. The loss is |F - sg(F + g / (|g| + c))|^2
with a weight 1 / tan(a), divided by what a small head of the time learns to expect of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Trig, add_noise, expand
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.embedders import TimeEmbedder
from fewstep.models.tangent import Direction, Tangent, along
from fewstep.objectives import base
from fewstep.objectives.base import Logs, Turn, Turns, sample_logs
from fewstep.objectives.pieces.derivative import Derivative
from fewstep.objectives.pieces.flow import as_angles
from fewstep.objectives.pieces.fresh_noise import refuse_old_noise
from fewstep.rollout import Rollout

QUARTER = math.pi / 2
"""the angle of pure noise"""


@dataclass
class Config:
    name: str = "scm"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation: the (guided) teacher's velocity; training: that of data, no teacher"""
    data: Literal["real", "pairs"] = "real"
    """what is noised: real images, or the teacher's own samples"""
    times: Times = field(default_factory=lambda: Times(law="log_normal", mean=-1.0, std=1.4))
    """law of the angle; log_normal is of its tangent, sigma / alpha"""
    warmup: int = 200
    """steps over which r rises to 1; 0 = none"""
    normal: float = 0.1
    """c of g / (|g| + c), of a sample as a whole; 0 leaves g as it is"""
    weight: Literal["inverse_tan", "none"] = "inverse_tan"
    """inverse_tan: 1 / tan of the angle"""
    adaptive: bool = True
    """a head of the time learns the size of the loss"""
    tangent: Tangent = field(default_factory=Tangent)
    """how dF/da is taken"""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.normal < 0:
            raise UserError(
                f"objective.warmup and objective.normal are at least 0, but {self.warmup} and {self.normal} were given"
            )


@dataclass(frozen=True)
class States:
    """Where the flow is looked at: x (B, *S) at t = angle / (pi / 2) (B,), its velocity there, and what is told."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    cond: Condition


class Objective(Derivative, base.Objective):
    reads: tuple[str, ...] = ("x0",)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.expected = TimeEmbedder(1) if config.adaptive else None
        if config.data == "pairs" and self.reads == ("x0",):
            self.reads = ("pair",)

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score") if config.mode == "distillation" else ("generator",)

    @classmethod
    def by_derivative(cls, config: Any) -> bool:
        return True

    def refuse(self, rollout: Rollout) -> None:
        refuse_old_noise(rollout)

    def attach(self, x: Tensor, cond: Condition) -> None:
        tells = self.tells(self.config)
        told = Condition(cond.inputs, {name: x.new_full((len(x),), value) for name, value in tells.items()})
        self.choose_way(self.net, x, told)

    def learns(self):
        return {} if self.expected is None else {"generator": [self.expected]}

    @property
    def net(self) -> Backbone:
        return as_angles(self.triad.generator)

    def turns(self, batch: Batch, step: int) -> Turns:
        loss, logs, x0 = self.continuous(self.states(batch), step)
        yield Turn("generator", loss, {**logs, **sample_logs(x0[: len(batch.noise)], batch)})

    def states(self, batch: Batch) -> States:
        """Data, noised."""
        source = batch.pair if self.config.data == "pairs" else batch
        assert source is not None and source.x0 is not None
        x0, t = source.x0, self.config.times(batch.draw.uniform("scm.t"), Trig())
        eps = batch.draw.normal("scm.eps", x0.shape[1:])
        x, c = add_noise(Trig(), x0, eps, t), Trig().at(t, x0)
        line = c.alpha * eps - c.sigma * x0
        v = line if self.config.mode == "training" else self.velocity(self.teacher(batch), x, t, source.cond)
        return States(x, t, v, self.told(batch, source.cond))

    def teacher(self, batch: Batch) -> Backbone:
        return self.triad.real_score

    def told(self, batch: Batch, cond: Condition) -> Condition:
        return cond

    @torch.no_grad()
    def velocity(self, teacher: Backbone, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """dx/da (B, *S) of the teacher."""
        return as_angles(teacher)(x, t, cond).value

    def continuous(self, states: States, step: int) -> tuple[Tensor, Logs, Tensor]:
        """The loss at these states, and the clean ends (B, *S) that they were led to."""
        x, t = states.x, states.t
        toward = Direction(states.velocity, torch.full_like(t, 1 / QUARTER))
        dF = along(self.net, x, t, states.cond, toward, self.way, self.config.tangent.step, None)
        F = self.net(x, t, states.cond).value.float()
        g = self.tangent(F.detach(), dF, states, self.share(step))
        each = (F - (F.detach() + self.normalised(g))).square().flatten(1).mean(1)
        c = Trig().at(t, x)
        return self.weighed(each, t), {"tangent": g.square().mean().sqrt()}, (c.alpha * x - c.sigma * F).detach()

    def share(self, step: int) -> float:
        """r at a step."""
        return min(1.0, step / self.config.warmup) if self.config.warmup else 1.0

    def tangent(self, F: Tensor, dF: Tensor, states: States, r: float) -> Tensor:
        """g (B, *S)."""
        c = Trig().at(states.t, F)
        return -(c.alpha**2) * (F - states.velocity) - r * c.alpha * c.sigma * (states.x + dF)

    def normalised(self, g: Tensor) -> Tensor:
        if not self.config.normal:
            return g
        return g / (expand(g.flatten(1).norm(dim=1), g) + self.config.normal)

    def weighed(self, each: Tensor, t: Tensor) -> Tensor:
        """The mean of losses (B,) at times t (B,)."""
        if self.config.weight == "inverse_tan":
            each = each / torch.tan(t.double() * QUARTER).clamp(1e-4, 1e4).to(each)
        if self.expected is None:
            return each.mean()
        expected = self.expected(t).squeeze(1)
        return ((-expected).exp() * each + expected).mean()

"""MDT-dist (Zhou et al. 2025, arXiv:2509.04406): the way to the clean end, as a velocity and as a distribution.

u(x_t, t) is the mean velocity from x_t to the clean sample x_t - t u. Both terms use the residual that is zero where
it is, with v of the (guided) teacher and the derivative along the flow:

    g(x_t, t) = u - v + t du/dt
    velocity matching        |u - sg(u - g)|^2    at data, noised to t
    velocity distillation    g at the student's own samples, noised to t, is the gradient of the velocity that made them

With v_s the velocity of the student's own samples, g = (1 - t du/dx)(v_s - v): the second term has the zero of the
score gap without a critic, but not its length. The official code can normalise du/dt alone, which moves the zero of
both. The network is told no second time, so several steps renoise. Phases with ends of their own are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, add_noise, expand, remap
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.tangent import Direction, Tangent, along
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.derivative import Derivative
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.flow import as_flow
from fewstep.objectives.pieces.score_gap import surrogate
from fewstep.rollout import Rollout, Sample, renoise


@dataclass
class Config:
    name: str = "mdt_dist"
    times: Times = field(default_factory=lambda: Times(law="logit_normal", mean=1.0))
    """flow times of the first term"""
    own_times: Times = field(default_factory=lambda: Times(law="logit_normal", mean=1.0))
    """flow times of the second term"""
    matching: float = 1.0
    """weight of velocity matching; 0 = none, and no data"""
    distillation: float = 1.0
    """weight of velocity distillation; 0 = none"""
    normalise: bool = False
    """divide du/dt by its rms over a sample + .1; this moves the fixed point"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one whose sample is distilled"""
    tangent: Tangent = field(default_factory=lambda: Tangent("difference", 0.01))
    """how du/dt is taken; on the scenes' UNet the exact one drove the residual from 1.7 to 9 in 150 steps"""

    def __post_init__(self) -> None:
        if min(self.matching, self.distillation) < 0 or not self.matching + self.distillation:
            raise UserError(
                "objective.matching and distillation are at least 0, and not both 0, but "
                f"{self.matching} and {self.distillation} were given"
            )


class Objective(Derivative, base.Objective):
    roles = ("generator", "real_score")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.reads = ("x0",) if config.matching else ()

    @classmethod
    def by_derivative(cls, config: Any) -> bool:
        return True

    def refuse(self, rollout: Rollout) -> None:
        if len(rollout) > 1 and rollout.step is not renoise:
            raise UserError(
                f"{len(rollout)} jumps to the clean sample need fresh noise in between: set model.transition=renoise, "
                "or use one step"
            )

    def attach(self, x: Tensor, cond: Condition) -> None:
        self.choose_way(self.flow, x, cond)

    @property
    def flow(self) -> Backbone:
        return as_flow(self.triad.generator)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        exits, net = self.config.exits, self.triad.generator
        exit, grad = exits.at(self.rollout, batch.draw, "mdt_dist.exit"), grad and self.config.distillation > 0
        return self.rollout(net, batch.noise, batch.cond, batch.draw, exit=exit, grad=exits.window * grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        loss, logs = sample.x0.new_zeros(()), {}
        if self.config.matching:
            assert batch.x0 is not None
            x_t, t = self.noised(batch, batch.x0, self.config.times, "matching")
            g, u = self.residual(x_t, t, batch.cond), self.flow(x_t, t, batch.cond).velocity
            logs["residual"] = g.square().mean()
            loss = loss + self.config.matching * surrogate(u, g)
        if self.config.distillation:
            g = self.residual(*self.noised(batch, sample.x0.detach(), self.config.own_times, "own"), batch.cond)
            logs["gap"] = g.square().mean()
            loss = loss + self.config.distillation * surrogate(self.made_by(sample), g)
        return loss, logs

    def noised(self, batch: Batch, x0: Tensor, times: Times, purpose: str) -> tuple[Tensor, Tensor]:
        """x0 (B, *S) at random flow times: x_t and t (B,)."""
        t = times(batch.draw.uniform(f"mdt_dist.{purpose}_t"), Flow()).to(x0.device)
        return add_noise(Flow(), x0, batch.draw.normal(f"mdt_dist.{purpose}_eps", x0.shape[1:]), t), t

    @torch.no_grad()
    def residual(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """g (B, *S)."""
        v = as_flow(self.triad.real_score)(x_t, t, cond).velocity
        toward, step = Direction(v, torch.ones_like(t)), self.config.tangent.step
        du = along(self.flow, x_t, t, cond, toward, self.way, step, to=None)
        if self.config.normalise:
            du = du / (expand(du.flatten(1).square().mean(1).sqrt(), du) + 0.1)
        return self.flow(x_t, t, cond).velocity - v + expand(t, x_t) * du

    def made_by(self, sample: Sample) -> Tensor:
        """The velocity (B, *S) of the flow by which the last step made its sample."""
        schedule = self.triad.generator.schedule
        t, scale = remap(schedule, Flow(), sample.t, sample.x0)
        return (scale * sample.x_t - sample.x0) / expand(t, sample.x0)

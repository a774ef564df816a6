"""BOOT (Gu et al. 2023, arXiv:2306.05544): data-free distillation from consecutive times of one path.

A path of the teacher's flow from the noise z is x_t = alpha_t y_t + sigma_t eps with the noise eps held at what the
teacher sees in z; the signal y_t has no noise in it. It begins at the teacher's denoised z, ends at the sample, and
obeys dy/dt = lambda' (y - D(x_t, t)) with lambda = log(sigma / alpha) and D the teacher's denoised x_t. The student
y(z, t), a network that is always given z and told t as the end of its step, learns from its own earlier signal:

    L = |y(z, s) - sg(r y(z, t) + (1 - r) D(x_t, t))|^2 / (t - s)^2 + b |y(z, 1) - D(z, 1)|^2,
    r = (sigma_s / alpha_s) / (sigma_t / alpha_t)

on neighbouring times t > s of a ladder: at its end the student is as good as the teacher in as many DDIM steps. t - s
is counted in steps of an even ladder, so that both terms are of one size. One step of the student is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.core.times import Grid
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.rollout import Rollout, jumps


@dataclass
class Config:
    name: str = "boot"
    grid: Grid = field(default_factory=lambda: Grid(32))
    """neighbouring times"""
    boundary: float = 1.0
    """b, the weight of the beginning of the path"""

    def __post_init__(self) -> None:
        if not self.boundary > 0:
            raise UserError(
                f"objective.boundary is above 0, but {self.boundary} was given: a path is known by where it begins"
            )


class Objective(base.Objective):
    roles = ("generator", "real_score")

    @classmethod
    def two_times(cls, config: Any) -> bool:
        return True

    def refuse(self, rollout: Rollout) -> None:
        if not jumps(rollout.step):
            raise UserError("boot tells its student how far a step goes: set model.transition=ode")
        if len(rollout) > 1:
            raise UserError(f"boot learns one step, from pure noise, not {len(rollout)}: set model.steps=1")

    def turns(self, batch: Batch, step: int) -> Turns:
        net, cond, config = self.triad.generator, batch.cond, self.config
        z = batch.noise * net.schedule.prior_std
        noisiest = z.new_ones(len(z), dtype=torch.float32)
        t, s = config.grid.pair(batch.draw.uniform("boot.t"), net.schedule)
        with torch.no_grad():
            begin = self.triad.real_score(z, noisiest, cond)
            target = self.cleaner(net(z, noisiest, cond, to=t).x0, begin.eps, batch, t, s)
        y = net(z, noisiest, cond, to=s).x0
        along = ((y - target) / expand(config.grid.count * (t - s), y)).square().mean()
        boundary = (net(z, noisiest, cond, to=noisiest).x0 - begin.x0).square().mean()
        logs = {"along": along.detach(), "boundary": boundary.detach()}
        yield Turn("generator", along + config.boundary * boundary, {**logs, **sample_logs(y, batch)})

    def cleaner(self, y: Tensor, eps: Tensor, batch: Batch, t: Tensor, s: Tensor) -> Tensor:
        """The signal (B, *S) at s, one step of the teacher from the signal y at t."""
        at_t, at_s = (self.triad.generator.schedule.at(time, y) for time in (t, s))
        denoised = self.triad.real_score(at_t.alpha * y + at_t.sigma * eps, t, batch.cond).x0
        ratio = at_s.sigma * at_t.alpha / (at_s.alpha * at_t.sigma)
        return ratio * y + (1 - ratio) * denoised

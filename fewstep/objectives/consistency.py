"""Consistency distillation and training (Song et al. 2023, arXiv:2303.01469; LCM, arXiv:2310.04378).

L = E d(f(x_t, t), sg f'(x_s, s)) on neighbouring times t > s of a grid, where x_s is one teacher step from x_t
(distillation) or the same noise on the same image (training), and f' is a follower or the generator itself.

The boundary f(x, 0) = x holds by construction: f is the x0 reading of the prediction, exact at sigma = 0 for
epsilon, v and flow networks, and at s = 0 the target is x_s itself for every kind.

The grid is fixed during a run: the curricula N(k), mu(k) of consistency training and LCM's random guidance are not
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise, expand
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.distances import Distance, distance
from fewstep.objectives.pieces.teacher_step import Solver, teacher_step
from fewstep.rollout import Rollout, renoise


@dataclass
class Config:
    name: str = "consistency"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation: one step of the (guided) teacher; training: data alone, no teacher"""
    solver: Solver = "euler"
    """teacher step: euler (= DDIM) | heun"""
    grid: Grid = field(default_factory=Grid)
    """neighbouring times"""
    target: Literal["follower", "self"] = "follower"
    """whose answer at s is the target"""
    target_decay: float = 0.95
    """of the follower, in generator moves"""
    distance: Distance = "huber"
    """l2 | l1 | huber"""

    def __post_init__(self) -> None:
        if not 0 <= self.target_decay < 1:
            raise UserError(f"objective.target_decay is a decay in [0, 1), but {self.target_decay} was given")


class Objective(base.Objective):
    reads = ("x0",)

    def refuse(self, rollout: Rollout) -> None:
        """The noise read off a consistency function's x0 is no part of it: only all fresh noise keeps the law."""
        if len(rollout) > 1 and rollout.step is not renoise:
            raise UserError(
                f"a consistency function is no denoiser: {len(rollout)} steps of it need fresh noise in between and "
                "none of the old, so train it with model.transition=renoise, or use one step"
            )

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score") if config.mode == "distillation" else ("generator",)

    def followers(self) -> dict[str, float]:
        return {"target": self.config.target_decay} if self.config.target == "follower" else {}

    def turns(self, batch: Batch, step: int) -> Turns:
        schedule, x0 = self.triad.generator.schedule, batch.x0
        assert x0 is not None
        t, s = self.config.grid.pair(batch.draw.uniform("consistency.t"), schedule)
        eps = batch.draw.normal("consistency.eps", x0.shape[1:])
        x_t = add_noise(schedule, x0, eps, t)
        with torch.no_grad():
            x_s = self.cleaner(x_t, x0, eps, t, s, batch.cond)
            target = self.target(x_s, s, batch.cond)
        f = self.triad.generator(x_t, t, batch.cond).x0
        yield Turn("generator", distance(f, target, self.config.distance), sample_logs(f, batch))

    def cleaner(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """x_s (B, *S), the other end of the pair."""
        if self.config.mode == "training":
            return add_noise(self.triad.generator.schedule, x0, eps, s)
        return teacher_step(self.triad.real_score, x_t, t, s, cond, self.config.solver)

    def target(self, x_s: Tensor, s: Tensor, cond: Condition) -> Tensor:
        net: Backbone = self.targets.get("target", self.triad.generator)
        return torch.where(expand(s == 0, x_s), x_s, net(x_s, s, cond).x0)
